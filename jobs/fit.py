"""Job: stride-ray fit, for 'ray job submit -- python jobs/fit.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
