"""Telling somebody: a night's summary posted as JSON. The report is published before, so that failing harms nothing."""

import json
import urllib.error
import urllib.request
from typing import Any

from stride_ray.runtime.urls import first_line, redacted, redacted_error

SECONDS = 10.0


def post(url: str, payload: dict[str, Any]) -> str:
    """POST a JSON object; empty when the other side took it (2xx), else what went wrong, in a clause."""
    data = json.dumps(payload).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
        if request.type not in ("http", "https"):
            return f"{redacted(url)} is no http address"
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        return f"{redacted(url)} answered {error.code}"
    except (OSError, ValueError) as error:
        return f"{redacted(url)} cannot be reached ({redacted_error(error, url)})" if str(error) else first_line(error)
    return ""
