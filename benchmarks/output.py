"""What a benchmark prints: a line each for people, and one JSON object as the last line."""

import json
from typing import Any


def printed(found: dict[str, Any]) -> int:
    """Print what was found, a line each for people, and the JSON line."""
    for name, value in found.items():
        print(f"{name:24}{value}")
    print(json.dumps(found))
    return 0
