"""Job: fine-tune a model on instructions, and attribute its answers to individual instructions.

The model is trained on a sample of the instructions, and others are the queries. Only answers carry loss, in training,
blocks and queries. It prints the most helpful and most harmful instructions per query, the losses before and after,
tail-patch, and how often near copies planted in the training set are found; the last line is one JSON object. A rerun
of an interrupted command resumes where it stopped. Exit status: 0 done, 1 failed with a message on standard error, 130
interrupted.

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
    """Parse the arguments, train, attribute and print; returns the exit status."""
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
