"""Job: attribution of an instruction-tuned model, from instructions to LDS: fine-tune, retrain on halves, compare.

Makes a benchmark of the instructions (OUT/benchmark): a model fine-tuned on some of them, answers alone carrying loss,
and others as queries. Then it fine-tunes again on random halves, and compares the methods (OUT/comparison, as
jobs/evaluate.py does). A rerun of an interrupted command resumes where it stopped. Exit status as for stride-ray: 0
done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/instruction_lds.py --instructions gsm8k_train.jsonl.gz --model MODEL --out OUT [--examples 800]
"""

import argparse
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.arguments import add_compute, compute_of
from stride_ray.cli.exits import exit_status

# The paper's for instruction tuning (Table 2), and our own.
METHODS = "random,tfidf,embedding,rds,graddot,logra,less,ekfac,airrep_fitted,datamodels,stride,stride-exact"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, do what is missing, print tables and one line of JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", required=True, metavar="FILE", help="prompts with answers: JSON Lines, …")
    parser.add_argument("--model", required=True, help="the checkpoint to fine-tune: a folder or hub id")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results go; a rerun goes on there")
    parser.add_argument("--examples", type=int, default=800, help="instructions to train on (default: 800)")
    parser.add_argument("--queries", type=int, default=50, help="held-out queries (default: 50)")
    parser.add_argument("--tokens", type=int, default=320, help="longer examples are left out (default: 320)")
    parser.add_argument("--task", default="", metavar="COLUMN", help="names each one's task, for select_domains.py")
    parser.add_argument("--subsets", type=int, default=32, help="how many random halves to train on (default: 32)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each half (default: 2)")
    parser.add_argument("--epochs", type=int, default=3, help="passes of a training (default: 3)")
    parser.add_argument("--methods", default=METHODS, metavar="A,B,…", help=f"names of jobs/evaluate.py ({METHODS})")
    add_compute(parser, "trainings at a time, and STRIDE's workers (default: one per CPU or GPU)")
    parsed = parser.parse_args(arguments)

    def work() -> None:
        from stride_ray.evaluate.comparison.compare import compare
        from stride_ray.evaluate.comparison.units import chosen_methods
        from stride_ray.evaluate.retraining.instructions import write_instruction_benchmark
        from stride_ray.evaluate.retraining.recipe import DEFAULT
        from stride_ray.evaluate.retraining.retrain import retrain
        from stride_ray.runtime.storage import Store

        methods = chosen_methods([name.strip() for name in parsed.methods.split(",")], ablations=False)
        out, compute = Store(parsed.out).url, compute_of(parsed)
        sizes = (parsed.examples, parsed.queries, parsed.tokens)
        benchmark = write_instruction_benchmark(
            parsed.instructions,
            parsed.model,
            f"{out}/benchmark",
            *sizes,
            {"epochs": parsed.epochs},
            device=compute.device,
            task=parsed.task,
        )
        print(retrain(benchmark, DEFAULT, benchmark.url, parsed.subsets, 0.5, parsed.seeds, compute=compute)["summary"])
        done = compare(benchmark.url, f"{out}/comparison", methods, compute=compute)
        print(done["summary"])
        print(json.dumps(done["result"]))

    return exit_status("instruction_lds", work)


if __name__ == "__main__":
    sys.exit(main())
