"""Webhook: post a night's summary as JSON. The report is published first, so a failure loses nothing."""

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from stride_ray.runtime.urls import redact_url, redacted_error

SECONDS = 10.0


def shown_webhook(url: str) -> str:
    """Return a webhook's server for messages and reports; the path is left out, as it may be a secret."""
    parts = urlsplit(redact_url(url))
    return f"{parts.scheme}://{parts.netloc}/…" if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}"


def post(url: str, payload: dict[str, Any]) -> str:
    """POST a JSON object; returns an empty string if the server accepted it (2xx), else the error as a clause."""
    data = json.dumps(payload).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
        if request.type not in ("http", "https"):
            return f"{shown_webhook(url)} is not an HTTP URL"
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        return f"{shown_webhook(url)} answered {error.code}"
    except (OSError, ValueError) as error:
        why = redacted_error(error, url).replace(url, shown_webhook(url))
        return f"{shown_webhook(url)} cannot be reached ({why})"
    return ""
