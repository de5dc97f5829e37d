"""URLs of files: their file systems, and how they are shown without secrets."""

import os
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stride_ray.runtime.errors import StrideError

# An object store that is too busy says so in bursts; boto's own few tries end within seconds.
TRIES = 6


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it; raises what fsspec and its packages do."""
    retries = {"retries": {"mode": "standard", "total_max_attempts": TRIES}}
    options = {"config_kwargs": retries} if url.startswith(("s3://", "s3a://")) else {}
    # No cache of listings: another process's file would be missing from it.
    return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)


def safe_url(url: str) -> str:
    """The URL without user, password and query, fit for messages and logs."""
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def first_line(error: BaseException) -> str:
    """An exception's first line, for a sentence; its class name where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it.

    Raises:
        StrideError: unknown protocol, its package is not installed, or nobody answers there.
    """
    # A local name may well hold "::" (Perl's manual pages do), which fsspec would take for a chain of URLs.
    if url.startswith("file://") or ("://" not in url and ("::" not in url or os.path.lexists(url))):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    try:
        return open_url(url)
    except (ValueError, ImportError) as error:
        raise StrideError(
            f"{redacted(url)} is not a path or URL that can be opened ({redacted_error(error, url)})."
        ) from None
    except Exception as error:  # some connect at once, and raise classes of their own
        raise StrideError(
            f"{redacted(url)} cannot be reached ({redacted_error(error, url)}); "
            "check the address, the credentials and the network."
        ) from None


def redacted(text: str) -> str:
    """A URL, or a message that holds some, without user names, passwords and queries (which may be signatures)."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    text = re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1", text)
    # Elsewhere a question mark may belong to a glob; a query has an equals sign.
    return re.sub(r"(://[^\s?]*)\?[^\s'\"]*=[^\s'\"]*", r"\1", text)


def redacted_error(error: BaseException, url: str) -> str:
    """What went wrong with a URL, without the secrets that it carries."""
    text = redacted(str(error))
    # The error may repeat the URL without its scheme, or parts of it.
    secrets = re.findall(r"://([^/\s]*)@", url) + re.findall(r"\?([^?\s]*=[^?\s]*)", url)
    parts = [part for secret in secrets for part in re.split("[:&=]", secret) if len(part) > 3]
    for known in secrets + parts:
        text = text.replace(f"{known}@", "").replace(known, "…")
    return f"{type(error).__name__}: {text}"
