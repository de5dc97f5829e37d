"""Job: stride-ray rescore, for 'ray job submit -- python jobs/rescore.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["rescore", *sys.argv[1:]]))
