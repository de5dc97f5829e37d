"""The exception for user errors (one sentence: what is wrong, where, how to fix it), and reasons of storage failures.

Clients of object stores and web servers raise exceptions of many libraries (botocore, google-auth, azure-core,
aiohttp), which need not be installed. They are recognised by the names of their classes and the codes that they carry.
"""

import asyncio
from typing import Any

# Packages whose exceptions are failures of a store or the network, never bugs of this program.
_LIBRARIES = frozenset(
    "botocore aiobotocore aiohttp s3fs gcsfs google adlfs azure urllib3 requests httpx paramiko smbprotocol".split()
)
# By reason: the error codes of stores, and the classes that libraries raise before they reach a store.
_REASONS = {
    "no such bucket": "NoSuchBucket InvalidBucketName ContainerNotFound FilesystemNotFound",
    "no such account": "ResourceNotFoundError AccountNotFound",
    "no credentials": (
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound DefaultCredentialsError "
        "CredentialUnavailableError NoAuthenticationInformation ParamValidationError NoCredentials"
    ),
    "credentials have expired": (
        "ExpiredToken ExpiredTokenException TokenRefreshRequired RefreshError SSOTokenLoadError "
        "UnauthorizedSSOTokenError TokenRetrievalError"
    ),
    "credentials are not accepted": (
        "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken AuthenticationFailed ClientAuthenticationError 401"
    ),
    "clocks differ": "RequestTimeTooSkewed",
    "access denied": "AccessDenied AllAccessDisabled AuthorizationFailure AuthorizationPermissionMismatch 403",
    "another program holds it": (
        "LeaseAlreadyPresent LeaseIdMissing LeaseIdMismatchWithBlobOperation LeaseIdMismatchWithContainerOperation "
        "LeaseLost OperationAborted"
    ),
    "it is being deleted": "ContainerBeingDeleted AccountBeingDeleted",
    "it must not be changed": "BlobImmutableDueToPolicy BlobImmutableDueToLegalHold ObjectLocked",
    "it is archived and must be restored first": "InvalidObjectState BlobArchived",
    "the store throttles requests": "SlowDown ServerBusy TooManyRequests 429",
    "the store fails": "InternalError ServiceUnavailable 500 502 503 504",
    "timed out": (
        "ConnectTimeoutError ReadTimeoutError RequestTimeout ServerTimeoutError ConnectionTimeoutError TimeoutError "
        "SocketTimeoutError ServiceResponseTimeoutError ServiceRequestTimeoutError 408"
    ),
    "TLS fails, by its certificate or protocol": "SSLError ClientConnectorCertificateError SSLCertVerificationError",
    "no host of that name is found": "gaierror ClientConnectorDNSError NameResolutionError",
    "the connection failed": (
        "EndpointConnectionError ConnectionClosedError ClientConnectorError ClientOSError ServerDisconnectedError "
        "ClientPayloadError IncompleteReadError ConnectionError ConnectionRefusedError ConnectionResetError "
        "ServiceRequestError ServiceResponseError ResponseStreamingError ProtocolError TransportError"
    ),
    "there is no such file": "NoSuchKey BlobNotFound 404",
}
_REASON = {name: reason for reason, names in _REASONS.items() for name in names.split()}
# Messages of libraries that raise a plain class.
_MESSAGES = {
    "bucket does not exist": "no such bucket",
    "specified container does not exist": "no such bucket",
    "Name or service not known": "no host of that name is found",
    "Temporary failure in name resolution": "no host of that name is found",
    "Could not connect to the endpoint": "the connection failed",
    "connection_string or account_name": "no credentials",
    "Anonymous caller": "no credentials",
    "Forbidden: ": "access denied",
    "Bad Request: ": "the store does not understand the request",
    "CERTIFICATE_VERIFY_FAILED": "TLS fails, by its certificate or protocol",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as an exception; like Ctrl-C, an interruption and not an error."""


class StrideError(Exception):
    """Bad input, configuration or environment, described in one sentence.

    The command line prints only this sentence and exits with status 1. Any other exception is a bug in this package
    and keeps its traceback.
    """


def storage_reason(error: BaseException) -> str:
    """Return why a store could not be used, as a clause for a message; empty if unknown.

    Example:
        >>> storage_reason(ConnectionRefusedError(111, "Connection refused"))
        'the connection failed'
    """
    chain = _chain(error)
    # Names are more specific than HTTP statuses: Azure returns 403 for a wrong key and names it in an outer exception.
    codes = sorted((code for each in chain for code in _codes(each)), key=str.isdigit)
    reasons = (*map(_REASON.get, codes), *map(_by_message, chain))
    return next((reason for reason in reasons if reason), "")


def is_storage_error(error: BaseException) -> bool:
    """Whether an exception is a failure of a store or the network, not a bug of this program."""
    library = type(error).__module__.partition(".")[0] in _LIBRARIES
    # gcsfs raises a ValueError for some responses, which only the message identifies.
    return library or isinstance(error, (OSError, TimeoutError, asyncio.TimeoutError)) or bool(_by_message(error))


def _chain(error: BaseException) -> list[BaseException]:
    """Return the exception and its causes, innermost (the most specific) first."""
    chain = [error]
    while (inner := chain[0].__cause__ or chain[0].__context__) is not None and inner not in chain:
        chain.insert(0, inner)
    return chain


def storage_codes(error: BaseException) -> set[str]:
    """Return the error codes, HTTP statuses and class names of an exception and its causes."""
    chain = _chain(error)
    statuses = (_response(each).get("ResponseMetadata", {}).get("HTTPStatusCode") for each in chain)
    return {code for each in chain for code in _codes(each)} | {str(status) for status in statuses if status}


def _response(error: BaseException) -> dict[str, Any]:
    """Return botocore's parsed response; empty for other libraries, whose ``response`` is not a dict."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _codes(error: BaseException) -> list[str]:
    """Return the store's error code, the HTTP status and the exception's class names, the most specific first."""
    codes = [_response(error).get("Error", {}).get("Code"), getattr(error, "error_code", None)]
    codes += [getattr(error, name, None) for name in ("status", "status_code", "code")]
    names = [each.__name__ for each in type(error).__mro__]
    return [str(getattr(code, "value", code)) for code in [*codes, *names] if code]


def _by_message(error: BaseException) -> str:
    """Return the reason that an exception's message implies (_MESSAGES); empty if none."""
    return next((reason for part, reason in _MESSAGES.items() if part in str(error)), "")
