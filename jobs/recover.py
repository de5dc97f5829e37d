"""Job: stride-ray recover, for 'ray job submit -- python jobs/recover.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["recover", *sys.argv[1:]]))
