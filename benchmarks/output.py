"""Output of a benchmark: figures for people, and one JSON object as the last line. Both return the exit status."""

import json
from typing import Any


def print_table(table: str, found: dict[str, Any]) -> int:
    """Print a table of the figures, and the JSON line."""
    print(table)
    print(json.dumps(found))
    return 0


def print_figures(found: dict[str, Any]) -> int:
    """Print the figures, one per line, and the JSON line."""
    return print_table("\n".join(f"{name:24}{value}" for name, value in found.items()), found)
