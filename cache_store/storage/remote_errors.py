"""What the errors of object stores mean: refused for good, keys that have expired, or a fault that may pass.

Each store's client has errors of its own, and its package may not be installed. So they are told apart by the names of their
classes and by the codes that the stores answer with.
"""

import socket
from collections.abc import Iterator
from enum import Enum

_WITHOUT_KEYS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "CredentialsError",
}
_WRONG_SETTINGS = {"ParamValidationError", "NoRegionError", "InvalidRegionError", "UnknownEndpointError", "ConfigParseError"}
_EXPIRED_CODES = {"ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException", "RequestExpired"}
_REFUSED_CODES = {
    *("AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed", "InvalidAccessKeyId", "InvalidBucketName"),
    *("InvalidRegion", "InvalidToken", "KeyTooLongError", "EntityTooLarge", "MethodNotAllowed", "NotImplemented"),
    *("PermanentRedirect", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "301", "400", "401", "403", "405", "501"),
}


class Cause(Enum):
    """Why a request to a store failed."""

    PASSING = "may pass"
    EXPIRED = "the keys have expired"
    REFUSED = "refused for good"


def cause_of(error: BaseException) -> tuple[Cause, str]:
    """The cause of an error, and what the user can do about one that does not pass."""
    chain = list(_chain(error))
    if any(_code(one) in _EXPIRED_CODES or "token has expired" in str(one).lower() for one in chain):
        return Cause.EXPIRED, "The keys have expired: renew them, then run the same command again"
    for one in chain:
        name, code = type(one).__name__, _code(one)
        if name in _WITHOUT_KEYS:
            return Cause.REFUSED, "Set credentials (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
        if isinstance(one, NotImplementedError):
            return Cause.REFUSED, "This kind of storage does not support it: choose another --cache"
        if isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME:
            return Cause.REFUSED, "No machine has this name: check the URL and the endpoint (FSSPEC_S3_ENDPOINT_URL)"
        if name in _WRONG_SETTINGS:
            return Cause.REFUSED, "Check the URL, the region and the endpoint"
        if isinstance(one, PermissionError) or code in _REFUSED_CODES:
            return Cause.REFUSED, "Check the credentials and their rights, the region and this machine's clock"
    return Cause.PASSING, ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and what the client of the network found."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "os_error", None)
        error = error.__cause__ or error.__context__ or (inner if isinstance(inner, BaseException) else None)


def _code(error: BaseException) -> str:
    """The code that a store answered with; "" where the error has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    # Other clients (aiohttp's too) have codes for what did not arrive whole.
    return str(getattr(error, "code", "")) if type(error).__name__ == "HttpError" else ""
