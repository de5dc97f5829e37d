"""Job: plant leaks of a question set in other text, and measure how well a scan finds them.

``write`` creates the corpus with planted leaks, the evaluation set, the controls and the ground truth. ``measure``
trains a small model on the corpus (minutes on two cores), scans it, and prints recall and precision of each channel by
kind of leak and by whether the model memorised it, with the paper's protocol for comparison, and one JSON object on the
last line. Exit status: 0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/plant.py write FOLDER --questions gsm8k_train.jsonl.gz --text lib/ [--rate 0.5] [--copies 1 4 16]
    python jobs/plant.py measure FOLDER [--no-baseline]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.leaks.planting import Planting, plant


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, plant or measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="make a planting")
    write.add_argument("folder", help="output folder")
    write.add_argument("--questions", required=True, help="JSON Lines (.gz too) with question and answer")
    write.add_argument("--text", required=True, action="append", help="file or folder to plant into; repeatable")
    usual = Planting()
    write.add_argument("--items", type=int, default=usual.items, help=f"evaluated (default: {usual.items})")
    write.add_argument("--rate", type=float, default=usual.rate, help=f"share that leaks (default: {usual.rate:g})")
    write.add_argument("--copies", type=int, nargs="+", default=usual.copies, help="copies of a leak, in turn")
    write.add_argument("--controls", type=int, default=usual.controls, help=f"(default: {usual.controls})")
    write.add_argument("--characters", type=int, default=0, help="of the text to use (default: all)")
    write.add_argument("--seed", type=int, default=0)
    measured = verbs.add_parser("measure", help="train, scan, compare with the truth")
    measured.add_argument("folder", help="what 'write' made")
    measured.add_argument("--no-baseline", action="store_true", help="leave LoGRA out")
    measured.add_argument("--epochs", type=int, default=0, help="passes over the corpus in training")
    measured.add_argument("--seed", type=int, default=0, help="of the training")
    measured.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the run")
    parsed = parser.parse_args(arguments)
    return exit_status("plant", lambda: _write(parsed) if parsed.verb == "write" else _measure(parsed))


def _write(parsed: argparse.Namespace) -> None:
    options = Planting(parsed.items, parsed.rate, tuple(parsed.copies), parsed.controls, parsed.characters, parsed.seed)
    print(json.dumps(plant(Path(parsed.questions), parsed.text, Path(parsed.folder), options)))


def _measure(parsed: argparse.Namespace) -> None:
    from stride_ray.evaluate.leaks.planted import EPOCHS, as_table, measure, planted_run
    from stride_ray.runtime.tasks import connected

    changes = dict(assignment(each) for each in parsed.set)
    root = Path(parsed.folder)
    run = planted_run(root, changes, parsed.epochs or EPOCHS, parsed.seed)
    with connected(run.config.compute):
        lines = measure(root, run, not parsed.no_baseline)
    print(as_table(lines))
    print(json.dumps([dataclasses.asdict(line) for line in lines]).replace("NaN", "null"))


if __name__ == "__main__":
    sys.exit(main())
