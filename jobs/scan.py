"""Job: ``stride-ray scan`` for ``ray job submit``; same arguments, same exit status (2: new findings, 1: failure)."""

import sys

from stride_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["scan", *sys.argv[1:]]))
