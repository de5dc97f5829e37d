"""File URLs: opening their file systems, and redacting secrets for display."""

import logging
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stride_ray.runtime.errors import StrideError, storage_reason

# gcsfs logs the traceback of every error that it also raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
# Attempts per request. Object stores throttle in bursts, which outlast boto's default number of retries.
TRIES = 6
# Our extras that hold the packages of protocols.
EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "azure"),
}


def looks_local(place: str) -> bool:
    """Whether a text that could be a hub id ("name" or "owner/name") can only be a local path, existing or not.

    Such a path must not be looked up on the hub, which takes long to report a missing name.
    """
    rooted = place.startswith((".", "~", os.sep)) or place.endswith((os.sep, ".gguf", ".json"))
    return rooted or place.count("/") > 1 or ("/" in place and os.path.isdir(place.partition("/")[0]))


def anchored(place: str, maybe_hub: bool = False) -> str:
    """Return the absolute form of a local path or pattern; URLs, "" and, with ``maybe_hub``, hub ids unchanged."""
    path = os.path.expanduser(place)
    if not place or "://" in place or (maybe_hub and not (os.path.exists(path) or looks_local(place))):
        return place
    return os.path.abspath(path)


def redact_url(url: str) -> str:
    """Remove user names, passwords, queries and fragments (which may be signatures) from a path or URL; never raises.

    Example:
        >>> redact_url("s3://key:secret@bucket/a b/part-?.jsonl"), redact_url("https://host/a.jsonl?signature=x")
        ('s3://bucket/a b/part-?.jsonl', 'https://host/a.jsonl')
    """
    return "::".join(_redact_single_url(link) for link in url.split("::"))  # chained, as in filecache::s3://…


def _redact_single_url(link: str) -> str:
    link = re.sub(r"^([\w+.-]+://)[^/]*@", r"\1", link)
    link = re.sub(rf"^([\w+.-]+://){_SLASHED}.*@", r"\1", link)
    scheme, separator, rest = link.partition("://")
    # Outside HTTP, "?" and "#" may belong to a name; a query is recognised by its equals sign, a secret by its key.
    for mark, sign in ("?", r"="), ("#", rf"(?i)(?:^|&)(?:{_NAMES}|token)="):
        before, _, after = rest.partition(mark)
        rest = before if separator and (scheme.startswith("http") or re.search(sign, after)) else rest
    return f"{scheme}{separator}{rest}"


def redact_message(text: str) -> str:
    """Remove credentials from a message: those in URLs, which end at white space, and those that stand alone.

    Example:
        >>> redact_message("403 for url: /b/a?sig=x; sent Authorization: Bearer y; AccountKey=z;EndpointSuffix=w")
        '403 for url: /b/a; sent Authorization: …; AccountKey=…;EndpointSuffix=w'
    """
    shown = text[:_LONGEST]
    for pattern, kept in _REDACTED:
        shown = pattern.sub(kept, shown)
    return shown if len(text) <= _LONGEST else f"{shown}…"


# Maximum characters of a message: nobody reads more, and some patterns take quadratic time.
_LONGEST = 2000
# A user and a password that contains a slash, as secret keys may; a number after the colon is a port.
_SLASHED = r"[^/\s:@'\"]+:(?!\d+/)[^\s/@]*/"
# Names of secrets in queries, headers, connection strings, JSON and XML.
_NAMES = (
    r"[\w-]{0,40}(?:password|passwd|passphrase|pwd|secret|signature(?:provided)?|[-_]sig|credential|authorization|"
    r"(?:api|access|account|private|secret|shared|subscription|client|service)[-_]?key(?:[-_]?id)?|googleaccessid|"
    r"(?:access|refresh|auth|session|security|api|bearer|oauth|hf|sas|csrf|subject)[-_]?token)|sig|id[-_]token"
)
_VALUE = (
    r"""(?:\\"[^"\\]*\\"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|"""
    r"""(?:(?:bearer|basic|token|digest|negotiate|sharedkey(?:lite)?|aws|apikey)\s+)?[^\s"'<>,;&)\]}]+)"""
)
_IS = r"""\\?["']?\s{0,8}(?::|=>?)\s{0,8}"""
# "token" and short names are ordinary words too, so a number or an empty value after them is not a secret.
_TOKEN = r"(?:x-[\w-]{0,40})?token"
_SHORT = r"auth|pass|key"
_NOTHING = r"(?!\\?[\"']?(?:\d{1,7}|none|null|true|false|undefined)\b)"
_WORDS = r"(?:to|is|or|and|was|for|needs?|with|in|as|must|has|holds|not|cannot|which|of)\b"
_REDACTED = [
    (re.compile(pattern), kept)
    for pattern, kept in (
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", "…"),
        (r"://[^/\s]*@", "://"),
        (rf"://{_SLASHED}[^\s]*@", "://"),
        (r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1"),
        (r"(://[^\s?]*)\?[^\s'\"]*=[^\s'\"]*", r"\1"),
        (rf"(?i)(://[^\s#]*)#(?:[^\s'\"]*&)?(?:{_NAMES}|token)=[^\s'\"]*", r"\1"),
        (r"((?<![\w?/])/[^\s?'\"]*)\?[\w%.~-]+=[^\s'\"]*", r"\1"),  # a URL without its host
        (r"(?<![\w:/])(//)[^/\s:@'\"]+:[^/\s@]*@", r"\1"),
        (r"(?i)(%3a%2f%2f)(?:(?!%2f|%40)[^\s/'\"])*%40", r"\1"),  # URLs in queries
        (rf"(?i)((?:%3f|%26)(?:{_NAMES}|token|{_SHORT})%3d)(?:(?!%26)[^\s'\"&])+", r"\1…"),
        (rf"""(?i)(?<![\w-])((?:[\w-]{{0,40}})authorization{_IS}["']?)(?:[\w-]+\s)?[^\s"'<>,;&)\]}}]+""", r"\1…"),
        (rf"""(?i)(?<![\w-])((?:{_NAMES}){_IS}){_VALUE}""", r"\1…"),
        (rf"(?i)(?<![\w-])({_TOKEN}{_IS}){_NOTHING}{_VALUE}", r"\1…"),
        (
            rf"""(?i)((?<![\w-])(?:auth|pass)=|[?&](?:{_SHORT})=|["'](?:auth|pass)["']\s{{0,8}}:\s{{0,8}}){_NOTHING}{_VALUE}""",
            r"\1…",
        ),
        (rf"(?i)(?<![\w-])(--(?:{_NAMES}|token|pass)\s+)(?!-|{_WORDS}){_VALUE}", r"\1…"),
        (rf"(?i)(<(token|{_SHORT})>)[^<]+(?=</\2>)", r"\1…"),
        (r"(?i)\b(cookie[\"']?\s?[:=]\s?).*", r"\1…"),
        (rf"(?i)(<({_NAMES})>)[^<]*", r"\1…"),
        (r"(?i)\b(bearer\s+)(?!(?:auth\w*|tokens?|realm|scheme|header|error)\b)[^\s\"'<>,;)]+", r"\1…"),
        (r"\b(Basic\s+)[A-Za-z0-9+/_-]{8,}={0,2}(?<=[\d=])", r"\1…"),
        # What tokens and keys look like: Hugging Face, AWS, GitHub, GitLab, OpenAI, Slack, Google, Stripe, npm, PyPI,
        # JSON Web Tokens; and addresses that are secret as a whole.
        (r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[a-z]-|xapp-|ya29\.|AIza|dapi)[\w.-]{10,}", r"\1…"),
        (r"\b([sr]k_(?:live|test)_|whsec_|npm_(?=[A-Za-z0-9]{10})|pypi-(?=[\w-]{16}))[\w-]{8,}", r"\1…"),
        (r"(?i)\b(hooks\.slack\.com/\w+/|discord(?:app)?\.com/api/webhooks/)[^\s'\"]+", r"\1…"),
        (r"\b(?:AKIA|ASIA|GOOG)[0-9A-Z]{12,}\b", "…"),
        (r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?", "…"),
    )
]


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without credentials, or its class name if it has no message."""
    text = str(error).strip()
    return redact_message(text.splitlines()[0]) if text else type(error).__name__


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in it.

    Raises:
        StrideError: unknown protocol, missing package of a protocol, or failed connection.
    """
    if url.startswith("file://") or "://" not in url:  # a local name may contain "::" (Perl's manual pages do)
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    protocol = url.rpartition("::")[2].partition("://")[0]
    retries = {"retries": {"mode": "standard", "total_max_attempts": TRIES}}
    options = {"config_kwargs": retries} if protocol in ("s3", "s3a") else {}
    try:
        # A listings cache would miss files that other processes write.
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        package = f"pip install 'stride-ray[{EXTRAS[protocol]}]'" if protocol in EXTRAS else first_line(error)
        raise StrideError(f"{redact_url(url)} needs a package that is not installed: {package}") from None
    except ValueError as error:
        raise StrideError(
            f"{redact_url(url)} is not a path or URL that can be opened ({redacted_error(error, url)})."
        ) from None
    except Exception as error:  # some backends connect immediately and raise their own classes
        raise StrideError(
            f"{redact_url(url)} cannot be reached ({redacted_error(error, url)}); "
            "check the address, the credentials and the network."
        ) from None


def check_folder_name(url: str) -> None:
    """Raise StrideError for an empty path, which would be the root, a bare protocol, or a name with a NUL."""
    if not url.strip() or "\0" in url or re.fullmatch(r"\w[\w+.-]*://+", url):
        raise StrideError(f"{redact_url(url)!r} names no folder; give a path or URL (is a variable empty?).")


def exists(fs: Any, path: str) -> bool:
    """Whether a file or folder exists; raises if the store cannot be reached or refuses to answer.

    fsspec's own check returns False when a web server fails, and adlfs returns True when Azure refuses (409: the
    container is being deleted).
    """
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    if "http" not in protocols and "abfs" not in protocols:
        return bool(fs.exists(path))
    try:
        fs.info(path)
    except FileNotFoundError as error:  # raised for every kind of failure
        if storage_reason(error) in ("", "there is no such file"):
            return False
        raise
    return True


def with_secrets(url: str, given: Iterable[str]) -> str:
    """Restore the secrets of a URL that was stored without them, from the URLs given to a command.

    A signed URL must match in full, one with user and password in its scheme and host.

    Example:
        >>> with_secrets("https://host/a.jsonl", ["https://me:word@host/"])
        'https://me:word@host/a.jsonl'
    """
    links = [link for each in given for link in each.split("::") if "://" in link]
    return "::".join(_with_secret_of(link, links) for link in url.split("::"))


def _with_secret_of(stored: str, links: list[str]) -> str:
    if same := next((link for link in links if redact_url(link) == stored), ""):
        return same
    at = urlsplit(stored)
    for each in map(urlsplit, links):
        user, at_sign, host = each.netloc.rpartition("@")
        if at_sign and at.scheme and (each.scheme, host) == (at.scheme, at.netloc):
            return urlunsplit(at._replace(netloc=f"{user}@{host}"))
    return stored


def redacted_error(error: BaseException, url: str) -> str:
    """Return the reason, class and first line of an error about ``url``, without the secrets in the URL."""
    text = first_line(error)
    # The error may repeat the URL without its scheme, or parts of it.
    secrets = re.findall(r"://([^/]*)@", url) + re.findall(r"\?([^?\s]*=[^?\s]*)", url)
    parts = [part for secret in secrets for part in re.split("[:&=]", secret) if len(part) > 3]
    for known in secrets + parts:
        text = text.replace(f"{known}@", "").replace(known, "…")
    reason = storage_reason(error)
    described = text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
    return f"{reason}; {described}" if reason else described
