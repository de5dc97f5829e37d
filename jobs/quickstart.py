"""Job: stride-ray quickstart, for 'ray job submit -- python jobs/quickstart.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
