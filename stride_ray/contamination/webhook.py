"""Webhook: post a night's summary as JSON. The report is published first, so a failure loses nothing."""

import base64
import contextlib
import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from stride_ray.runtime.urls import redact_url, redacted_error

SECONDS = 10.0
_REDIRECTS = (301, 302, 303, 307, 308)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Has redirects fail: a redirected POST becomes a GET without its content, which any page accepts."""

    def redirect_request(self, *_: Any) -> None:
        return None


def shown_webhook(url: str) -> str:
    """Return a webhook's server for messages and reports; the path is left out, as it may be a secret."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(redact_url(url))
        if parts.scheme and parts.netloc:
            return f"{parts.scheme}://{parts.netloc}/…" if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}"
    return "the webhook's URL" if url else ""


def post(url: str, payload: dict[str, Any]) -> str:
    """POST a JSON object; returns an empty string if the server accepted it (2xx), else the error as a clause."""
    try:
        request = _request(url, json.dumps(payload).encode())
    except ValueError:
        return f"{shown_webhook(url)} is not an HTTP URL, such as https://host/path"
    try:
        # The status is all that counts; a server may send its response for ever.
        urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        moved = " (a redirect; give the URL that it leads to)" if error.code in _REDIRECTS else ""
        return f"{shown_webhook(url)} answered {error.code}{moved}"
    except (OSError, ValueError, HTTPException) as error:
        why = redacted_error(error, url).replace(url, shown_webhook(url))
        return f"{shown_webhook(url)} cannot be reached ({why})"
    return ""


def _request(url: str, data: bytes) -> urllib.request.Request:
    """Return the request, with user and password of the URL in a header.

    Raises:
        ValueError: not an HTTP URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(url)
    headers = {"Content-Type": "application/json"}
    user, at, server = parts.netloc.rpartition("@")
    if at:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
    host = server.encode("idna").decode() if not server.isascii() else server
    # What may not stand in a request is escaped, as browsers do.
    path = quote(parts._replace(scheme="", netloc="", fragment="").geturl(), safe="/%:?#[]@!$&'()*+,;=~")
    return urllib.request.Request(f"{parts.scheme}://{host}{path}", data, headers, method="POST")
