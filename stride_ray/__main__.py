"""``python -m stride_ray``: the command line."""

import sys

from stride_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
