"""Job: stride-ray attribute, for 'ray job submit -- python jobs/attribute.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["attribute", *sys.argv[1:]]))
