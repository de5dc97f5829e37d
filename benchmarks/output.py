"""Output of a benchmark: one line per figure, and one JSON object as the last line."""

import json
from typing import Any


def printed(found: dict[str, Any]) -> int:
    """Print the figures, one per line, and the JSON line."""
    for name, value in found.items():
        print(f"{name:24}{value}")
    print(json.dumps(found))
    return 0
