"""Webhook: post a night's summary as JSON. The report is published first, so a failure loses nothing."""

import json
import urllib.error
import urllib.request
from typing import Any

from stride_ray.runtime.urls import first_line, redacted, redacted_error

SECONDS = 10.0


def post(url: str, payload: dict[str, Any]) -> str:
    """POST a JSON object; returns an empty string if the server accepted it (2xx), else the error as a clause."""
    data = json.dumps(payload).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
        if request.type not in ("http", "https"):
            return f"{redacted(url)} is not an HTTP URL"
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        return f"{redacted(url)} answered {error.code}"
    except (OSError, ValueError) as error:
        return f"{redacted(url)} cannot be reached ({redacted_error(error, url)})" if str(error) else first_line(error)
    return ""
