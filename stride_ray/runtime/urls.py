"""File URLs: opening their file systems, and redacting secrets for display."""

import os
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stride_ray.runtime.errors import StrideError

# Attempts per request. Object stores throttle in bursts, which outlast boto's default number of retries.
TRIES = 6


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; exceptions of fsspec and its backends pass through."""
    retries = {"retries": {"mode": "standard", "total_max_attempts": TRIES}}
    options = {"config_kwargs": retries} if url.startswith(("s3://", "s3a://")) else {}
    # A listings cache would miss files that other processes write.
    return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)


def safe_url(url: str) -> str:
    """The URL without user, password and query, for messages and logs."""
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it.

    Raises:
        StrideError: unknown protocol, missing package of a protocol, or failed connection.
    """
    # A local name may contain "::" (Perl's manual pages do), which fsspec would parse as a chained URL.
    if url.startswith("file://") or ("://" not in url and ("::" not in url or os.path.lexists(url))):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    try:
        return open_url(url)
    except (ValueError, ImportError) as error:
        raise StrideError(
            f"{redacted(url)} is not a path or URL that can be opened ({redacted_error(error, url)})."
        ) from None
    except Exception as error:  # some backends connect immediately and raise their own classes
        raise StrideError(
            f"{redacted(url)} cannot be reached ({redacted_error(error, url)}); "
            "check the address, the credentials and the network."
        ) from None


def redacted(text: str) -> str:
    """A URL, or a message that contains URLs, without user names, passwords and queries (which may be signatures)."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    text = re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1", text)
    # With other protocols a question mark may belong to a glob; a query contains an equals sign.
    return re.sub(r"(://[^\s?]*)\?[^\s'\"]*=[^\s'\"]*", r"\1", text)


def redacted_error(error: BaseException, url: str) -> str:
    """Class and message of an error about ``url``, without the secrets in the URL."""
    text = redacted(str(error))
    # The error may repeat the URL without its scheme, or parts of it.
    secrets = re.findall(r"://([^/\s]*)@", url) + re.findall(r"\?([^?\s]*=[^?\s]*)", url)
    parts = [part for secret in secrets for part in re.split("[:&=]", secret) if len(part) > 3]
    for known in secrets + parts:
        text = text.replace(f"{known}@", "").replace(known, "…")
    return f"{type(error).__name__}: {text}"
