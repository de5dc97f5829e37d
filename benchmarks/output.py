"""Output of a benchmark: figures for people, one JSON object as the last line, and files of rows.

What prints figures returns the exit status.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(table: str, found: dict[str, Any]) -> int:
    """Print a table of the figures, and the JSON line."""
    print(table)
    print(json.dumps(found))
    return 0


def print_figures(found: dict[str, Any]) -> int:
    """Print the figures, one per line, and the JSON line."""
    return print_table("\n".join(f"{name:24}{value}" for name, value in found.items()), found)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON Lines, unless the file has the same already, whose time then stays."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
