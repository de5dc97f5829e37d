"""Job: the trust panel of an attributed query set; prints a table, a verdict and, on the last line, one JSON object.

Exit status as for stride-ray: 0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/trust.py RUN --name NAME [--exact | --no-exact]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.trust import trust
from stride_ray.runtime.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the checks and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run directory, a path or fsspec URL")
    parser.add_argument("--name", required=True, help="of the query set")
    parser.add_argument(
        "--exact", action=argparse.BooleanOptionalAction, help="of the exact answer, or not (default: the run's)"
    )
    parsed = parser.parse_args(arguments)

    def work() -> None:
        found = trust(
            Run(parsed.run, changes={} if parsed.exact is None else {"attribute.exact": parsed.exact}), parsed.name
        )
        print(found.as_table())
        print(json.dumps(dataclasses.asdict(found)).replace("NaN", "null"))

    return exit_status("trust", work)


if __name__ == "__main__":
    sys.exit(main())
