"""Job: metasmoothness of a training recipe, from three trainings per draw: can attribution work for it at all?

The benchmark folder contains pool.parquet, queries.parquet, model/ and, if training started from a checkpoint, start/.
A rerun of an interrupted command resumes where it stopped. Exit status as for stride-ray.

    python jobs/metasmoothness.py --benchmark FOLDER --out FOLDER [--draws 3]
"""

import argparse
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import add_compute, compute_of
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.metasmoothness import STEP, metasmoothness
from stride_ray.evaluate.retraining.recipe import DEFAULT


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, train and print the summary; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, metavar="FOLDER", help="the benchmark: a path or fsspec URL")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where trainings go; a rerun goes on there")
    parser.add_argument("--draws", type=int, default=3, help="directions of the weights (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the directions and the trainings (default: 0)")
    parser.add_argument("--step", type=float, default=STEP, help=f"h, in units of a block's weight (default: {STEP})")
    parser.add_argument("--recipe", default=DEFAULT, help=f"package.module:attribute or file.py:attribute ({DEFAULT})")
    add_compute(parser, "trainings at a time (default: one per CPU or GPU)")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        benchmark = read_benchmark(parsed.benchmark)
        done = metasmoothness(
            benchmark, parsed.recipe, parsed.out, parsed.draws, parsed.seed, parsed.step, compute_of(parsed)
        )
        print(done["summary"])

    return exit_status("metasmoothness", work)


if __name__ == "__main__":
    sys.exit(main())
