"""Job: stride-ray respond, for 'ray job submit -- python jobs/respond.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["respond", *sys.argv[1:]]))
