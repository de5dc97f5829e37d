"""The command line: one verb per stage, the same as the scripts in jobs/.

Exit status: 0 done; 1 a sentence on standard error says what is wrong; 3 done, but the fit learned nothing that can
be told from noise; 130 interrupted, 143 by SIGTERM. ``scan`` has its own (scan/command.py): 2 says that there are new
findings.
"""

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stride_ray import __version__
from stride_ray.arguments import count
from stride_ray.config import Config, dumps, loads, option_fields
from stride_ray.errors import StrideError, Terminated
from stride_ray.run import Run
from stride_ray.scan import command as scan_command
from stride_ray.storage import Store

# The handful of options that a verb shows; all others are set by --set section.key=value or in --config FILE.
SHOWN: dict[str, tuple[str, ...]] = {
    "shard": ("corpus.input", "corpus.tokenizer", "corpus.columns", "corpus.layout", "corpus.block_tokens"),
    "fit": (
        "model.path",
        "model.dtype",
        "operators.form",
        "operators.budget_gb",
        "operators.rows",
        "membership.subsets",
        "membership.degree",
    ),
    "respond": ("respond.mode",),
    "recover": ("recover.penalty_ratio",),
    "rescore": ("attribute.candidates",),
    "attribute": ("model.path", "attribute.candidates", "attribute.top"),
    "scan": ("scan.words", "scan.overlap", "scan.influence", "scan.false_discovery", "scan.alarm"),
    "select": ("select.by", "select.documents", "select.tokens", "select.drop", "select.drop_at", "select.earlier"),
}
EVERYWHERE = ("compute.address", "compute.workers", "compute.device")
MODES = {
    "--exact": ("true", "score every block exactly, in a pass over the pool; needs no operators"),
    "--no-exact": ("false", "estimates from the operators, exact influence of the candidates (the default)"),
}
ABOUT = {
    "shard": "documents to blocks: tokenise a corpus and cut it into blocks in Parquet",
    "fit": "blocks to operators: one pass over the pool, or the paper's training loop",
    "respond": "queries to responses: how each operator moves each query's loss",
    "recover": "responses to estimates of every query's influence; a Lasso per query where operators are of subsets",
    "rescore": "estimates to ranked tables: exact influence of every query's candidates, estimates for the rest",
    "attribute": "respond, recover and rescore at once, with a console summary and a page: which blocks made the model "
    "answer like this",
    "scan": "did evaluation items leak into the corpus, and does the model lean on them? (and: scan compare A B)",
    "select": "influence on target queries to training data, with a reason for every document and a random arm",
    "status": "what is done and what is missing in a run directory",
    "plan": "what a larger run will read, write, hold and take, from what this one did on a sample",
    "config": "every option with its default and meaning, as TOML for --config",
    "quickstart": "everything on a small real corpus and a model trained on the spot",
}


# What is wrong with a disk, a path or a limit, and not with this package.
OUTSIDE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if strange := next((each for each in given if any("\ud800" <= c <= "\udfff" for c in each)), None):
        print(f"stride-ray: the argument {strange!r} is no valid UTF-8; rename what it names", file=sys.stderr)
        return 1
    if given[:1] == ["scan"]:
        return scan_command.status_of(lambda: _scanned(given))
    parsed = _parser().parse_args(given)
    return exit_status("stride-ray", lambda: _run(parsed))


def _scanned(given: list[str]) -> int:
    """The verb scan, which reads its arguments under its own exit statuses."""
    if given[1:2] == ["compare"]:
        return exit_status("stride-ray", lambda: scan_command.compare_nights(given[2:]))
    parsed = _parser().parse_args(given)
    return exit_status("stride-ray", lambda: _run(parsed))


def exit_status(program: str, work: Callable[[], int | None]) -> int:
    """Do a program's work; a StrideError becomes a sentence on standard error and 1, an interrupt 130, None 0.

    SIGTERM interrupts too, with 143.
    """
    try:
        with _stoppable():
            return work() or 0
    except StrideError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        told = f"{error.strerror}{where}; put that right and run the same command again: what is done is kept"
        print(f"{program}: {told}", file=sys.stderr)
        return 1
    except Terminated:
        print(f"{program}: told to stop (SIGTERM); run the same command again to go on", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM becomes an exception, so that what is open is closed."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def assignment(text: str) -> tuple[str, str]:
    """The two sides of ``section.key=value``.

    Raises:
        StrideError: where there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise StrideError(f"--set {text!r} has no value; write --set section.key=value.")
    return name.strip(), value.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stride-ray", description="Which training data made a language model do this.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    declared = option_fields()
    for verb, about in ABOUT.items():
        sub = verbs.add_parser(verb, help=about, description=about, allow_abbrev=False)
        if verb == "config":
            continue
        if verb == "quickstart":
            sub.add_argument("folder", nargs="?", default="quickstart", help="where everything is made")
            continue
        sub.add_argument("run", metavar="RUN", help="run directory: a path or any fsspec URL, s3://… included")
        if verb == "status":
            continue
        if verb == "plan":
            sub.add_argument("--name", default="queries", help="of the run's query set (default: queries)")
            sub.add_argument("--blocks", type=count, required=True, metavar="N", help="blocks of the larger run")
            sub.add_argument("--queries", type=count, required=True, metavar="Q", help="queries of the larger run")
            sub.add_argument("--workers", type=count, required=True, metavar="W", help="workers of the larger run")
            continue
        if verb in ("respond", "attribute"):
            sub.add_argument("--queries", required=True, metavar="FILE", help="JSON Lines, Parquet or text files")
        if verb in ("attribute", "scan", "select"):
            either = sub.add_mutually_exclusive_group()
            for flag, (value, about) in MODES.items():
                either.add_argument(flag, dest="attribute.exact", action="store_const", const=value, help=about)
        if verb in ("respond", "recover", "rescore", "attribute"):
            sub.add_argument("--name", default="queries", help="name of the query set, a folder's (default: queries)")
        if verb == "scan":
            scan_command.add_arguments(sub)
        if verb == "select":
            sub.add_argument("--name", action="append", required=True, help="a target query set; may be given again")
            sub.add_argument("--out", required=True, metavar="URL", help="folder for the data set")
            sub.add_argument("--blocks", action="store_true", help="write token blocks in place of the input's rows")
        sub.add_argument("--config", metavar="FILE", help="TOML with any options ('stride-ray config' lists them)")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="any option, as in --set fit.steps=800"
        )
        for name in (*SHOWN[verb], *EVERYWHERE):
            flag = "--model" if name == "model.path" else "--" + name.rpartition(".")[2].replace("_", "-")
            extra: dict[str, Any] = {"action": "append"} if name in ("corpus.input", "select.earlier") else {}
            if declared[name].metadata["choices"]:
                extra["choices"] = declared[name].metadata["choices"]
            else:
                extra["metavar"] = name.rpartition(".")[2].upper()
            sub.add_argument(flag, dest=name, help=declared[name].metadata["help"].replace("%", "%%"), **extra)
        if verb == "shard":
            sub.add_argument("--model", dest="model.path", help="take the tokenizer from this model", metavar="PATH")
    return parser


def _run(parsed: argparse.Namespace) -> int:
    # Stages import torch and Ray; --help and --version do not wait for them.
    if parsed.verb == "config":
        print(dumps(Config(), comments=True), end="")
        return 0
    if parsed.verb == "quickstart":
        from stride_ray.quickstart import quickstart

        quickstart(parsed.folder)
        return 0
    if parsed.verb == "status":
        from stride_ray.status import status

        print(status(Run(parsed.run)))
        return 0
    if parsed.verb == "plan":
        from stride_ray.plan import accuracy, memory, plan, table

        size = (parsed.blocks, parsed.queries, parsed.workers)
        pilot = Run(parsed.run)
        estimates = plan(pilot, parsed.name, *size)
        print(table(estimates, *size))
        print(memory(pilot.config, estimates), end="")
        print(accuracy(pilot.config, parsed.blocks), end="")
        return 0
    run = _opened(parsed)
    if parsed.verb == "scan":
        return scan_command.run_scan(run, parsed)
    if parsed.verb == "shard":
        from stride_ray.shard import shard

        print(_shard_summary(run, shard(run)))
    elif parsed.verb == "fit":
        from stride_ray.fit import fit

        facts = fit(run)
        print(facts["verdict"], file=sys.stdout if facts["learned"] else sys.stderr)
        return 0 if facts["learned"] else 3
    elif parsed.verb == "respond":
        from stride_ray.respond import respond

        done = respond(run, parsed.queries, parsed.name)
        alike = f" (correlation with steered ones {done['correlation']:.4f})" if done.get("correlation") else ""
        print(f"{done['queries']} queries, {done['failed']} failed, {done['mode']} responses{alike}.")
    elif parsed.verb == "recover":
        from stride_ray.estimates import recover_estimates

        done = recover_estimates(run, parsed.name)
        print(
            f"{done['queries']} queries, {done['failed']} failed; median {done['median_nonzeros']:g} blocks with an "
            f"estimate, largest relative duality gap {done['largest_gap']:.1e}."
        )
    elif parsed.verb == "rescore":
        from stride_ray.rescore import rescore

        done = rescore(run, parsed.name)
        print(f"{done['queries']} queries, {done['failed']} failed; {done['exact']} of {done['rows']} rows are exact.")
    elif parsed.verb == "select":
        from stride_ray.select import select, told

        print(told(select(run, parsed.name, parsed.out, parsed.blocks), parsed.out))
    else:
        from stride_ray.attribute import attribute

        attribute(run, parsed.queries, parsed.name)
    return 0


def run_of(arguments: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    """The run that a verb's arguments name, with the options that they set, and the arguments, for scripts."""
    parsed = _parser().parse_args(arguments)
    return _opened(parsed), parsed


def _opened(parsed: argparse.Namespace) -> Run:
    return Run(parsed.run, _config(parsed), _changes(parsed))


def _config(parsed: argparse.Namespace) -> Config | None:
    if not parsed.config:
        return None
    folder, slash, leaf = parsed.config.rpartition("/")
    return loads(Store(folder or slash or ".").read_text(leaf), parsed.config)


def _changes(parsed: argparse.Namespace) -> dict[str, Any]:
    changes = {name: value for name, value in vars(parsed).items() if "." in name and value is not None}
    return changes | dict(assignment(item) for item in parsed.set)


def _shard_summary(run: Run, manifest: dict[str, Any]) -> str:
    from stride_ray.readers import Rejected

    lines = [
        f"{manifest['documents']} documents became {manifest['blocks']} blocks of {manifest['block_tokens']} tokens "
        f"({manifest['tokens']} tokens, {manifest['target_tokens']} of them targets) in {len(manifest['parts'])} "
        f"part(s) under {run.stage('blocks').store.name_of('')}"
    ]
    if manifest["rejected"]:
        lines.append(f"{manifest['rejected']} rows were rejected; the first:")
        lines += [f"  {Rejected(**reject).told()}" for reject in manifest["rejects"][:5]]
    return "\n".join(lines)
