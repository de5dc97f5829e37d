"""Shared command-line arguments: integers in scientific notation, compute resources. Imports little."""

import argparse

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig


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


def assignment(text: str) -> tuple[str, str]:
    """Split ``section.key=value`` into key and value.

    Raises:
        StrideError: there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise StrideError(f"--set {text!r} has no value; write --set section.key=value.")
    return name.strip(), value.strip()
