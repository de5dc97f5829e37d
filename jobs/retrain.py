"""Job: ground truth for attribution accuracy: train on random subsets of a benchmark's pool and record query losses.

The benchmark folder contains pool.parquet, queries.parquet, model/ and, if training started from a checkpoint, start/.
A rerun of an interrupted command resumes where it stopped; more subsets or seeds extend existing results. --recipe
replaces the benchmarks' recipe with a callable of your own, for example recipe.py:make. Exit status as for stride-ray:
0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/retrain.py --benchmark FOLDER --out FOLDER [--subsets 64 --fraction 0.5 --seeds 3]
"""

import argparse
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import add_compute, compute_of
from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.recipe import DEFAULT
from stride_ray.evaluate.retraining.retrain import retrain


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, train and print the summary; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, metavar="FOLDER", help="the benchmark: a path or fsspec URL")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results go; a rerun goes on there")
    parser.add_argument("--subsets", type=int, default=64, help="how many random subsets (default: 64)")
    parser.add_argument("--fraction", type=float, default=0.5, help="share of the pool in a subset (default: 0.5)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each subset (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the subsets (default: 0)")
    parser.add_argument("--like", action="store_true", help="take the subsets of the benchmark's own results instead")
    parser.add_argument("--recipe", default=DEFAULT, help=f"package.module:attribute or file.py:attribute ({DEFAULT})")
    add_compute(parser, "trainings at a time (default: one per CPU or GPU)")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        done = retrain(
            read_benchmark(parsed.benchmark),
            parsed.recipe,
            parsed.out,
            subsets=parsed.subsets,
            fraction=parsed.fraction,
            seeds=parsed.seeds,
            seed=parsed.seed,
            like=parsed.like,
            compute=compute_of(parsed),
        )
        print(done["summary"])

    return exit_status("retrain", work)


if __name__ == "__main__":
    sys.exit(main())
