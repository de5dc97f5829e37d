"""Types of command-line arguments: whole numbers as people write them, alone and in lists. Imports nothing heavy."""

import argparse


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
