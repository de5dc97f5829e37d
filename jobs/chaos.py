"""Job: strike runs at random on a cluster of several nodes, and compare their bytes with an undisturbed run's.

Nodes are removed without grace, workers and drivers killed, in every stage, sometimes twice in a row; all on this
machine. Prints a line a round and a table; the last line is one JSON object. Exit status: 0 only if every round ended
with equal bytes, else 1. Run again, it does the rounds that are missing.

    python jobs/chaos.py --rounds 50 --out FOLDER [--seed 0]
"""

import argparse
import json
import sys
from collections.abc import Sequence

from stride_ray.cli import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, strike, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="(default: 50)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="what is made, and rounds that differ")
    parser.add_argument("--seed", type=int, default=0, help="of what is struck when (default: 0)")
    parsed = parser.parse_args(arguments)
    equal = 0

    def work() -> None:
        from stride_ray.evaluate.chaos import chaos, counted

        nonlocal equal
        rounds = chaos(parsed.out, parsed.rounds, parsed.seed)
        equal = sum(each.equal for each in rounds)
        strikes = counted(rounds)
        print("| struck | times |\n|---|---|")
        for name, count in strikes.items():
            print(f"| {name} | {count} |")
        print(f"{equal} of {len(rounds)} rounds ended with the undisturbed run's bytes.")
        seconds = [round(each.seconds) for each in rounds]
        print(json.dumps({"rounds": len(rounds), "equal": equal, "strikes": strikes, "seconds": seconds}))

    return exit_status("chaos", work) or int(equal < parsed.rounds)


if __name__ == "__main__":
    sys.exit(main())
