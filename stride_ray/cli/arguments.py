"""Shared command-line arguments: integers in scientific notation, compute resources, removals. Imports little."""

import argparse
from typing import TYPE_CHECKING

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig

if TYPE_CHECKING:
    from stride_ray.evaluate.comparison.removals import RemovalCurve


def count(text: str) -> int:
    """Parse an integer of at least 1, also as 1e6; ArgumentTypeError for anything else."""
    try:
        number = float(text)
        whole = int(number)
    except (ValueError, OverflowError):
        whole = 0
    if whole < 1 or whole != number:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1, such as 5000 or 1e6")
    return whole


def counts(text: str) -> list[int]:
    """Parse a comma-separated list of ``count`` values."""
    return [count(part) for part in text.split(",")]


def add_compute(parser: argparse.ArgumentParser, workers: str) -> None:
    """Add --address, --workers and --device; ``workers`` is the help text of --workers."""
    parser.add_argument("--address", default="", help="Ray address; empty: RAY_ADDRESS, else a local Ray")
    parser.add_argument("--workers", type=int, default=0, help=workers)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def compute_of(parsed: argparse.Namespace) -> ComputeConfig:
    """The values of the ``add_compute`` options."""
    return ComputeConfig(address=parsed.address, workers=parsed.workers, device=parsed.device)


def shares(text: str) -> tuple[float, ...]:
    """Parse comma-separated shares, each between 0 and 1; ArgumentTypeError for anything else."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share < 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares between 0 and 1, such as 0.01,0.05")
    return found


def add_removal(parser: argparse.ArgumentParser) -> None:
    """Add --removal and --per-query: retraining without the blocks that each method ranks first."""
    about = "also retrain without the top shares of the pool by each method, such as 0.01,0.02,0.05,0.1"
    parser.add_argument("--removal", type=shares, metavar="A,B,…", help=about)
    about = "with --removal: for each of the first N queries by itself (default: by scores summed over all queries)"
    parser.add_argument("--per-query", type=count, default=0, metavar="N", help=about)


def removal_of(parsed: argparse.Namespace) -> "RemovalCurve | None":
    """The values of the ``add_removal`` options; None without --removal."""
    from stride_ray.evaluate.comparison.removals import RemovalCurve

    return RemovalCurve(parsed.removal, parsed.per_query) if parsed.removal else None


def assignment(text: str) -> tuple[str, str]:
    """Split ``section.key=value`` into key and value.

    Raises:
        StrideError: there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise StrideError(f"--set {text!r} has no value; write --set section.key=value.")
    return name.strip(), value.strip()
