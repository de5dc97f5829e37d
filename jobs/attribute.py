"""Job: runs the stride-ray verb of the same name, for ``ray job submit -- python jobs/VERB.py …``; see --help."""

import sys
from pathlib import Path

from stride_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main([Path(__file__).stem, *sys.argv[1:]]))
