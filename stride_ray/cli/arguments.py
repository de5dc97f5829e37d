"""Command-line arguments of several programs: whole numbers as people write them, where to run. Imports little."""

import argparse

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig


def count(text: str) -> int:
    """A whole number of at least 1, 1e6 among them; an ArgumentTypeError for anything else."""
    try:
        number = float(text)
        whole = int(number)
    except (ValueError, OverflowError):
        whole = 0
    if whole < 1 or whole != number:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1, such as 5000 or 1e6")
    return whole


def counts(text: str) -> list[int]:
    """Such numbers with commas between them."""
    return [count(part) for part in text.split(",")]


def add_compute(parser: argparse.ArgumentParser, workers: str) -> None:
    """The options that say where a job runs; ``workers`` explains their number."""
    parser.add_argument("--address", default="", help="Ray address; empty: RAY_ADDRESS, else a local Ray")
    parser.add_argument("--workers", type=int, default=0, help=workers)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def compute_of(parsed: argparse.Namespace) -> ComputeConfig:
    """What the options of ``add_compute`` ask for."""
    return ComputeConfig(address=parsed.address, workers=parsed.workers, device=parsed.device)


def assignment(text: str) -> tuple[str, str]:
    """The two sides of ``section.key=value``.

    Raises:
        StrideError: where there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise StrideError(f"--set {text!r} has no value; write --set section.key=value.")
    return name.strip(), value.strip()
