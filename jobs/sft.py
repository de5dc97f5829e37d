"""Job: fine-tune a model on instructions, and print which of them taught it each answer.

A sample of the instructions is trained on and others are asked; only answers carry loss, in training, in the blocks and
in the queries. It prints, per query, the instructions that helped and harmed most, then the losses before and after,
tail-patch, and how often near copies planted in the training set are found; the last line is one JSON object. A command
that was killed goes on where it stopped. Exit status: 0 done, 1 with a sentence on standard error, 130 interrupted.

    python jobs/sft.py --instructions FILE --model MODEL --out FOLDER [--examples 200 --queries 8 --epochs 1]
        [--set attribute.exact=true]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.instruction_tuning import Options, attribute_instructions


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, attribute, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", required=True, metavar="FILE", help="JSON Lines (.gz too) or Parquet")
    parser.add_argument("--model", required=True, help="to start from: a folder, hub id, URL or .gguf file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything goes; a rerun goes on there")
    usual = Options()
    parser.add_argument("--examples", type=int, default=usual.examples, help="to train on (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=usual.queries, help="to attribute (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=usual.held_out, help="for the loss only (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=usual.epochs, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=usual.learning_rate, help="peak (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the run")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        options = Options(*(getattr(parsed, each.name) for each in dataclasses.fields(Options)))
        changes = dict(assignment(each) for each in parsed.set)
        found = attribute_instructions(parsed.instructions, parsed.model, parsed.out, options, changes)
        print(found.as_table())
        print(json.dumps(dataclasses.asdict(found)).replace("NaN", "null"))

    return exit_status("sft", work)


if __name__ == "__main__":
    sys.exit(main())
