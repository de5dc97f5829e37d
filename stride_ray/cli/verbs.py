"""The verbs of the command line, one entry each in VERBS: arguments, action and output.

Stages are imported only when a verb runs: they import torch and Ray, which would slow down --help and --version.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stride_ray.cli import scan
from stride_ray.cli.arguments import add_compute, compute_of, count
from stride_ray.runtime.config import Config, dumps
from stride_ray.runtime.run import Run

# Names shown of a list that may be long.
_SHOWN_NAMES = 10
MODES = {
    "--exact": ("true", "score every block exactly, in a pass over the pool; needs no operators"),
    "--no-exact": ("false", "estimates from the operators, exact influence of the candidates (the default)"),
}


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        about: description for --help.
        arguments: functions that add the arguments that are not options of the run.
        do: runs the verb, given the run (None if it takes none) and the parsed arguments; returns the exit status.
        options: options of the run (config.py) with a flag of their own, beside those of every verb (main.EVERYWHERE);
            all others are set with --set or --config. Empty: the verb uses the run's stored configuration and has
            neither.
    """

    about: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]
    do: Callable[[Any, argparse.Namespace], int]
    options: tuple[str, ...] = ()


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory: a path or any fsspec URL, s3://… included")


def _name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="queries", help="name of the query set, a folder's (default: queries)")


def _queries(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", required=True, metavar="FILE", help="JSON Lines, Parquet or text files")


def _mode(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group()
    for flag, (value, about) in MODES.items():
        either.add_argument(flag, dest="attribute.exact", action="store_const", const=value, help=about)


def _shard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", dest="model.path", help="take the tokenizer from this model", metavar="PATH")


def _shard(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.corpus.readers import Rejected
    from stride_ray.corpus.shard import shard

    manifest = shard(run)
    print(
        f"{manifest['documents']} documents became {manifest['blocks']} blocks of {manifest['block_tokens']} tokens "
        f"({manifest['tokens']} tokens, {manifest['target_tokens']} of them targets) in {len(manifest['parts'])} "
        f"part(s) under {run.stage('blocks').store.display_url('')}"
    )
    if run.config.corpus.layout == "pack" and manifest["documents"] > manifest["blocks"] > 0:
        print(
            f"A block has {manifest['documents'] / manifest['blocks']:.1f} documents on average, and its influence is "
            "divided among them by tokens; --layout split gives each document blocks of its own."
        )
    if manifest["repeated"]:
        source, name = manifest["first_repeated"]
        print(
            f"Documents with the id of an earlier one of their source: {manifest['repeated']}; each is named by its id "
            f"and the place of its row, the first {name!r} (source {source!r})."
        )
    if manifest["shared_ids"]:
        print(f"Ids in several sources: {manifest['shared_ids']}; a document is its source and its id together.")
    if manifest["rejected"]:
        print(f"{manifest['rejected']} rows were rejected; the first:")
    for reject in manifest["rejects"][:5]:
        print(f"  {Rejected(**reject).sentence()}")
    if manifest["unused"]:
        print(f"Columns that are in no document: {_some(map(repr, manifest['unused']))}; --columns would map them.")
    if manifest.get("unrendered"):
        print(f"The chat template leaves out {_some(manifest['unrendered'])}: no block has it; check the template.")
    if manifest["left_out"]:
        print(f"Files left out, since they hold no documents: {_some(manifest['left_out'])}.")
    return 0


def _some(items: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(items)
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _fit(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.corpus.failures import FAILED_BLOCKS_FILE, failed_blocks_note
    from stride_ray.operators.fit import fit

    facts = fit(run)
    print(facts["verdict"], file=sys.stdout if facts["learned"] else sys.stderr)
    if failed := facts.get("not_finite", 0):
        print(failed_blocks_note(failed, run.stage("operators").store.display_url(FAILED_BLOCKS_FILE)))
    return 0 if facts["learned"] else 3


def _respond(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.attribution.respond import respond

    done = respond(run, parsed.queries, parsed.name)
    alike = f" (correlation with steered ones {done['correlation']:.4f})" if done.get("correlation") else ""
    print(f"{done['queries']} queries, {done['failed']} failed, {done['mode']} responses{alike}.")
    return 0


def _recover(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.attribution.recover import recover_estimates

    done = recover_estimates(run, parsed.name)
    print(
        f"{done['queries']} queries, {done['failed']} failed; median {done['median_nonzeros']:g} blocks with an "
        f"estimate, largest relative duality gap {done['largest_gap']:.1e}."
    )
    return 0


def _rescore(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.attribution.rescore import rescore
    from stride_ray.corpus.failures import FAILED_BLOCKS_FILE, failed_blocks_note

    done = rescore(run, parsed.name)
    print(f"{done['queries']} queries, {done['failed']} failed; {done['exact']} of {done['rows']} rows are exact.")
    if failed := done.get("not_finite", 0):
        print(failed_blocks_note(failed, run.stage("influence", parsed.name).store.display_url(FAILED_BLOCKS_FILE)))
    return 0


def _attribute(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.attribution.attribute import attribute

    attribute(run, parsed.queries, parsed.name)
    return 0


def _select_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", action="append", required=True, help="a target query set; may be given again")
    parser.add_argument("--out", required=True, metavar="URL", help="folder for the data set")
    parser.add_argument("--blocks", action="store_true", help="write token blocks in place of the input's rows")


def _select(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.selection.select import describe, select

    print(describe(select(run, parsed.name, parsed.out, parsed.blocks), parsed.out))
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--share", type=float, default=0.01, help="of the pool to remove (default: 0.01)")
    parser.add_argument("--seeds", type=count, default=3, help="trainings on each choice of blocks (default: 3)")
    parser.add_argument("--recipe", help="how to train: package.module:attribute or file.py:attribute (default: AdamW)")
    parser.add_argument(
        "--per-query",
        type=count,
        default=0,
        metavar="N",
        help="remove blocks for each of the first N queries alone",
    )


def _verify(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.evaluate.retraining.recipe import DEFAULT
    from stride_ray.evaluate.verify import verify

    found = verify(run, parsed.name, parsed.share, parsed.seeds, parsed.recipe or DEFAULT, parsed.per_query)
    print(found.as_text())
    return 0


def _timeline(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.evaluate.timeline import as_text, timeline

    print(as_text(timeline(run, parsed.name, sys.stdout), list(run.config.model.checkpoints)))
    return 0


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=count, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument("--queue", type=count, default=32, help="requests that may wait (default: 32)")
    add_compute(parser, "copies of the model, each answering one request at a time (default: 1)")


def _serve(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.serve.application import Options, run_service

    options = Options(run=parsed.run, replicas=max(1, parsed.workers), queue=parsed.queue, host=parsed.host)
    run_service(options, parsed.port, compute_of(parsed), sys.stdout)
    return 0


def _status(run: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.cli.status import status

    print(status(run))
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="queries", help="of the run's query set (default: queries)")
    parser.add_argument("--blocks", type=count, required=True, metavar="N", help="blocks of the larger run")
    parser.add_argument("--queries", type=count, required=True, metavar="Q", help="queries of the larger run")
    parser.add_argument("--workers", type=count, required=True, metavar="W", help="workers of the larger run")


def _plan(pilot: Run, parsed: argparse.Namespace) -> int:
    from stride_ray.cli.plan import accuracy, memory, plan, table

    size = (parsed.blocks, parsed.queries, parsed.workers)
    estimates = plan(pilot, parsed.name, *size)
    print(table(estimates, *size))
    print(memory(pilot.config, estimates), end="")
    print(accuracy(pilot.config, parsed.blocks), end="")
    return 0


def _config(run: None, parsed: argparse.Namespace) -> int:
    print(dumps(Config(), comments=True), end="")
    return 0


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="quickstart", help="output folder")


def _quickstart(run: None, parsed: argparse.Namespace) -> int:
    from stride_ray.cli.quickstart import quickstart

    quickstart(parsed.folder)
    return 0


VERBS = {
    "shard": Verb(
        "documents to blocks: tokenise a corpus and cut it into blocks in Parquet",
        (_run, _shard_arguments),
        _shard,
        ("corpus.input", "corpus.tokenizer", "corpus.columns", "corpus.layout", "corpus.block_tokens"),
    ),
    "fit": Verb(
        "blocks to operators: one pass over the pool, or the paper's training loop",
        (_run,),
        _fit,
        (
            *("model.path", "model.dtype", "operators.form", "operators.budget_gb", "operators.rows"),
            *("membership.subsets", "membership.degree"),
        ),
    ),
    "respond": Verb(
        "queries to responses: how each operator moves each query's loss",
        (_run, _queries, _name),
        _respond,
        ("respond.mode",),
    ),
    "recover": Verb(
        "responses to estimates of every query's influence; a Lasso per query where operators are of subsets",
        (_run, _name),
        _recover,
        ("recover.penalty_ratio",),
    ),
    "rescore": Verb(
        "estimates to ranked tables: exact influence of every query's candidates, estimates for the rest",
        (_run, _name),
        _rescore,
        ("attribute.candidates",),
    ),
    "attribute": Verb(
        "respond, recover and rescore at once, with a console summary and a page: which blocks made the model answer "
        "like this",
        (_run, _queries, _mode, _name),
        _attribute,
        ("model.path", "attribute.candidates", "attribute.top"),
    ),
    "scan": Verb(
        "did evaluation items leak into the corpus, and does the model lean on them? (and: scan compare A B)",
        (_run, _mode, scan.add_arguments),
        scan.run_scan,
        ("scan.words", "scan.overlap", "scan.influence", "scan.false_discovery", "scan.alarm"),
    ),
    "select": Verb(
        "influence on target queries to training data, with a reason for every document and a random arm",
        (_run, _mode, _select_arguments),
        _select,
        ("select.by", "select.documents", "select.tokens", "select.drop", "select.drop_at", "select.earlier"),
    ),
    "verify": Verb(
        "train again without the blocks ranked first, and without random ones: what do the queries cost more?",
        (_run, _name, _mode, _verify_arguments),
        _verify,
        ("model.start",),
    ),
    "timeline": Verb(
        "when in training was it learnt: losses and influence of a query set's blocks at each checkpoint",
        (_run, _name, _mode),
        _timeline,
        ("model.checkpoints",),
    ),
    "serve": Verb(
        "an answer while you wait: a page and an HTTP interface that attribute one query at a time",
        (_run, _serve_arguments),
        _serve,
    ),
    "status": Verb("what is done and what is missing in a run directory", (_run,), _status),
    "plan": Verb(
        "what a larger run will read, write, hold and take, from what this one did on a sample",
        (_run, _plan_arguments),
        _plan,
    ),
    "config": Verb("every option with its default and meaning, as TOML for --config", (), _config),
    "quickstart": Verb(
        "everything on a small real corpus and a model trained on the spot", (_quickstart_arguments,), _quickstart
    ),
}
