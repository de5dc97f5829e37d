"""Job: stride-ray shard, for 'ray job submit -- python jobs/shard.py …'; see --help."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
