"""Job: attribution of a classifier, from labelled examples to LDS: a network, retrainings, every method's accuracy.

Makes a benchmark of the examples (OUT/benchmark), retrains on random halves of them, and compares the methods
(OUT/comparison, as jobs/evaluate.py does, with --removal too). OUT/comparison/examples.html shows, for some queries,
the examples with the most positive and the most negative influence: as pictures for digits and mnist, else as tables. A
rerun of an interrupted command resumes where it stopped. Exit status as for stride-ray: 0 done, 1 failed with a message
on standard error, 130 interrupted.

    python jobs/classification.py --examples digits --out digits
    python jobs/classification.py --examples parkinsons.csv --label status --drop name --out parkinsons
    python jobs/classification.py --examples digits --out digits --removal 0.01,0.02,0.05,0.1 --per-query 10
    python jobs/classification.py --examples mnist --patch 4 --out convolutional
"""

import argparse
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import add_compute, add_removal, compute_of, count, removal_of
from stride_ray.cli.exits import exit_status

# Those that need no words, no encoder of texts and no corpus.
METHODS = (
    "random,featsim,graddot,tracin,logra,logra_damped100,trak,trak_damped10,ekfac,ekfac_damped100,astra_lent_damped1,"
    "astra_lent_damped100,stride,stride-negative-scores-whole-damping-x-100,stride-logit"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, do what is missing, print tables, the page's path and a line of JSON; returns the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", required=True, help="digits, breast_cancer, mnist, or a CSV or Parquet file")
    parser.add_argument("--label", default="", help="the column of a table that holds the classes")
    parser.add_argument("--drop", default="", metavar="A,B,…", help="columns of a table that are no features")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results go; a rerun goes on there")
    parser.add_argument("--queries", type=int, default=100, help="examples to hold out and ask about (default: 100)")
    parser.add_argument("--subsets", type=int, default=100, help="how many random halves to train on (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each half (default: 3)")
    parser.add_argument(
        "--hidden-size", type=int, default=64, help="width, or channels, of the hidden layers (default: 64)"
    )
    parser.add_argument("--layers", type=int, default=2, help="number of hidden layers (default: 2)")
    parser.add_argument(
        "--patch",
        type=int,
        default=0,
        metavar="SIDE",
        help="read images in patches of SIDE × SIDE pixels, by 3 × 3 convolutions over them (default: an MLP)",
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes of a training (default: 30)")
    parser.add_argument("--methods", default=METHODS, metavar="A,B,…", help=f"names of jobs/evaluate.py ({METHODS})")
    parser.add_argument("--shown", type=count, default=10, metavar="N", help="queries on the page (default: 10)")
    add_removal(parser)
    add_compute(parser, "trainings at a time, and STRIDE's workers (default: one per CPU or GPU)")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        from stride_ray.evaluate.comparison.classifier_page import write_classifier_page
        from stride_ray.evaluate.comparison.compare import compare
        from stride_ray.evaluate.comparison.units import chosen_methods
        from stride_ray.evaluate.retraining.classification import load_examples, write_benchmark
        from stride_ray.evaluate.retraining.recipe import DEFAULT
        from stride_ray.evaluate.retraining.retrain import retrain
        from stride_ray.runtime.storage import Store

        methods = chosen_methods([name.strip() for name in parsed.methods.split(",")], ablations=False)
        out = Store(parsed.out).url
        examples = load_examples(parsed.examples, parsed.label, [each for each in parsed.drop.split(",") if each])
        sizes = (parsed.queries, parsed.hidden_size, parsed.layers)
        hyperparameters = {"epochs": parsed.epochs}
        benchmark = write_benchmark(examples, f"{out}/benchmark", *sizes, hyperparameters, patch=parsed.patch)
        compute = compute_of(parsed)
        print(retrain(benchmark, DEFAULT, benchmark.url, parsed.subsets, 0.5, parsed.seeds, compute=compute)["summary"])
        done = compare(benchmark.url, f"{out}/comparison", methods, compute=compute, removal=removal_of(parsed))
        print(done["summary"])
        if done["scores"]:
            comparison, name = Store(f"{out}/comparison"), parsed.examples.rpartition("/")[2]
            print(write_classifier_page(comparison, benchmark, examples, done["scores"], name, parsed.shown))
        print(json.dumps(done["result"]))

    return exit_status("classification", work)


if __name__ == "__main__":
    sys.exit(main())
