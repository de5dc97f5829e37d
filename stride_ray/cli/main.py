"""The command line: parses a verb of verbs.py with its options and runs it.

Exit status: 0 done; 1 failed, with a message on standard error; 3 done, but the fit is not distinguishable from noise;
130 interrupted, 143 by SIGTERM. argparse exits with 2 on a bad command line, except for ``scan``, where 2 means new
findings (scan.py).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from stride_ray import __version__
from stride_ray.cli import scan
from stride_ray.cli.arguments import assignment
from stride_ray.cli.exits import exit_status
from stride_ray.cli.verbs import VERBS, Verb
from stride_ray.runtime.config import Config, loads, option_fields
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

# Options with a flag in every verb that takes options.
EVERYWHERE = ("compute.address", "compute.workers", "compute.device")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if strange := next((each for each in given if any("\ud800" <= c <= "\udfff" for c in each)), None):
        print(f"stride-ray: the argument {strange!r} is not valid UTF-8; rename what it names", file=sys.stderr)
        return 1
    # scan has exit statuses of its own, for a bad command line too.
    return scan.status_of(lambda: _parse_and_run(given)) if given[:1] == ["scan"] else _parse_and_run(given)


def _parse_and_run(given: list[str]) -> int:
    if given[:2] == ["scan", "compare"]:
        return exit_status("stride-ray", lambda: scan.compare_nights(given[2:]))
    if given[:2] == ["scan", "review"]:
        return exit_status("stride-ray", lambda: scan.review_alarms(given[2:]))
    return exit_status("stride-ray", lambda: _run(_parser().parse_args(given)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stride-ray", description="Which training data made a language model do this.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.about, description=verb.about, allow_abbrev=False)
        for add in verb.arguments:
            add(sub)
        if verb.options:
            _add_options(sub, verb)
    return parser


def _add_options(parser: argparse.ArgumentParser, verb: Verb) -> None:
    """Add a flag for each of the verb's own options, and --config and --set for all others."""
    parser.add_argument("--config", metavar="FILE", help="TOML with any options ('stride-ray config' lists them)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any option, as in --set fit.steps=800"
    )
    declared, defaults = option_fields(), Config().flat()
    for name in (*verb.options, *EVERYWHERE):
        flag = "--model" if name == "model.path" else "--" + name.rpartition(".")[2].replace("_", "-")
        extra: dict[str, Any] = {"action": "append"} if isinstance(defaults[name], list) else {}
        if declared[name].metadata["choices"]:
            extra["choices"] = declared[name].metadata["choices"]
        else:
            extra["metavar"] = name.rpartition(".")[2].upper()
        parser.add_argument(flag, dest=name, help=declared[name].metadata["help"].replace("%", "%%"), **extra)


def _run(parsed: argparse.Namespace) -> int:
    verb = VERBS[parsed.verb]
    if verb.options:
        return verb.do(_opened(parsed), parsed)
    return verb.do(Run(parsed.run) if "run" in parsed else None, parsed)


def run_of(arguments: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    """For scripts: the run that a verb's arguments select, with their options applied, and the parsed arguments."""
    parsed = _parser().parse_args(arguments)
    return _opened(parsed), parsed


def _opened(parsed: argparse.Namespace) -> Run:
    return Run(parsed.run, _config(parsed), _changes(parsed))


def _config(parsed: argparse.Namespace) -> Config | None:
    if parsed.config is None:
        return None
    if not parsed.config.strip():
        raise StrideError("--config names no file; give the path of a TOML file, or leave it out.")
    folder, slash, leaf = parsed.config.rpartition("/")
    return loads(Store(folder or slash or ".").read_text(leaf), redact_url(parsed.config))


def _changes(parsed: argparse.Namespace) -> dict[str, Any]:
    changes = {name: value for name, value in vars(parsed).items() if "." in name and value is not None}
    return changes | dict(assignment(item) for item in parsed.set)
