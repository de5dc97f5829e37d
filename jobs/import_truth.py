"""Job: convert retraining results that another project published into ground truth for a benchmark.

The benchmark folder contains pool.parquet and queries.parquet in the order of the project's datasets, and model/. The
job writes retraining_<project>.npz into it, which jobs/evaluate.py then uses. Several folders are several seeds of the
same subsets. Exit status as for stride-ray: 0 done, 1 failed with a message on standard error.

    python jobs/import_truth.py --from kronfluence --files FOLDER --benchmark FOLDER
"""

import argparse
import sys
from collections.abc import Sequence

from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.foreign_results import READERS, VALUES, import_results


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, convert and print the summary; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="project", required=True, choices=tuple(READERS), help="who wrote the files")
    parser.add_argument("--files", nargs="+", required=True, metavar="FOLDER", help="the files: paths or fsspec URLs")
    parser.add_argument("--benchmark", required=True, metavar="FOLDER", help="the benchmark: a path or fsspec URL")
    parser.add_argument("--values", choices=VALUES, help="what the files hold (default: as the project documents it)")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        benchmark = read_benchmark(parsed.benchmark)
        print(import_results(benchmark, parsed.project, parsed.files, parsed.values)["summary"])

    return exit_status("import_truth", work)


if __name__ == "__main__":
    sys.exit(main())
