"""Job: stride-ray select and, with --retrain, a closed-loop measurement of the selection by retraining.

With --retrain, models are trained on the selected, a random and rival methods' arms of equal token count with the given
recipe and several seeds each, and evaluated on queries that were not used for selection: half of each target set, or
the sets of --measure. Rivals are tfidf (the default), bm25, embedding, airrep, rds, dsir, less, dsdm, ekfac and logra;
they hold the pool in memory. It prints a table and, on the last line, one JSON object. Exit status as for stride-ray:
0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/select.py RUN --name NAME --out URL --tokens 0.25
    python jobs/select.py RUN --name NAME --out URL --tokens 0.25 --retrain [--measure OTHER --seeds 3]
        [--rivals tfidf,dsdm]
"""

import sys

if __name__ == "select":
    # Python puts a script's folder first on sys.path, where this file would shadow the standard library's select.
    import importlib.machinery
    import importlib.util
    import os

    _here = os.path.dirname(os.path.abspath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec("select", [p for p in sys.path if os.path.abspath(p) != _here])
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError("No module named 'select'")
    sys.modules["select"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    import argparse
    import dataclasses
    import json
    from collections.abc import Sequence

    from stride_ray.cli.exits import exit_status
    from stride_ray.cli.main import main as verb
    from stride_ray.cli.main import run_of
    from stride_ray.evaluate.closed_loop.arms import closed_loop
    from stride_ray.evaluate.closed_loop.rivals import USUAL
    from stride_ray.evaluate.retraining.recipe import DEFAULT


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Parse the arguments and select; with --retrain also train and print. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--retrain", action="store_true")
    parser.add_argument("--measure", action="append", default=[], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default=DEFAULT)
    parser.add_argument("--rivals", default=",".join(USUAL))
    mine, others = parser.parse_known_args(given)
    if "--help" in given or "-h" in given:
        print(__doc__)
    if not mine.retrain:
        return verb(["select", *given])

    def work() -> None:
        run, parsed = run_of(["select", *others])
        rivals = list(filter(None, mine.rivals.split(",")))
        found = closed_loop(run, parsed.name, parsed.out, mine.measure, mine.seeds, mine.recipe, rivals)
        print(found.as_table())
        print(json.dumps(dataclasses.asdict(found)))

    return exit_status("select", work)


if __name__ == "__main__":
    sys.exit(main())
