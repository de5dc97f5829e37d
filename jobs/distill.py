"""Job: distil influence into a small scorer of documents, and select from another corpus by it.

``fit`` fits ridge regression on hashed word n-grams to the influence of a run's documents on query sets, and prints its
rank correlation on documents left out. ``select`` scores the documents of any sharded run, which needs no model, and
selects by the scores, with the options, files and manifest of stride-ray select. The last line is one JSON object.
Exit status as for stride-ray: 0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/distill.py fit RUN --name NAME [--name OTHER] --out SCORER
    python jobs/distill.py select OTHER_RUN --scorer SCORER --out CHOSEN --tokens 0.2
"""

import argparse
import json
import sys
from collections.abc import Sequence

from stride_ray.cli.exits import exit_status
from stride_ray.cli.main import run_of
from stride_ray.runtime.run import Run
from stride_ray.selection.distillation import QUERY, distill, scored_target
from stride_ray.selection.select import describe, select_by, target_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, fit or select, and print; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fit = verbs.add_parser("fit", help="fit a scorer to influence")
    fit.add_argument("run", help="run directory with influence on the query sets")
    fit.add_argument("--name", action="append", required=True, help="query set; repeatable")
    fit.add_argument("--out", required=True, metavar="URL", help="folder of the scorer")
    select = verbs.add_parser("select", help="select from a sharded corpus by a scorer", allow_abbrev=False)
    select.add_argument("--scorer", required=True, metavar="URL", help="folder of the scorer")
    parsed, others = parser.parse_known_args(given)
    if parsed.verb == "fit" and others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")

    def work() -> None:
        if parsed.verb == "fit":
            run = Run(parsed.run)
            facts = distill(run, [target_of(run, name) for name in parsed.name], parsed.out).facts
            folds = ", ".join(f"{each:.2f}" for each in facts["folds"])
            print(f"Rank correlation with influence on documents left out: {facts['correlation']:.2f} ({folds}).")
            print(f"Fitted to {facts['documents']} documents, penalty {facts['penalty']:g}: {parsed.out}")
            print(json.dumps(facts))
            return
        run, options = run_of(["select", *others, "--name", QUERY])
        chosen = select_by(run, [scored_target(run, parsed.scorer)], options.out, options.blocks)
        print(describe(chosen, options.out))
        print(json.dumps(chosen))

    return exit_status("distill", work)


if __name__ == "__main__":
    sys.exit(main())
