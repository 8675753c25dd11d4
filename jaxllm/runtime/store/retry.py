"""Repeats operations on a store that fail for a while: which errors pass, and how long to wait."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from jaxllm.config import Ending, InputError

# The clients try again themselves, for half a minute or so; these are attempts beyond that.
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds; doubled after every attempt
LONGEST_PAUSE = 30.0
# HTTP statuses that pass: request time-out, too many requests, and errors of the server.
_PASSING = {408, 429, 500, 502, 503, 504}
_REFUSED = {401, 403}
# Errors of the clients that have no credentials to send, and S3's codes for those that are too old.
_OF_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "RefreshError")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")


class Refused(InputError):
    """The store does not let this process in."""


class Unavailable(Ending):
    """The store could not be reached in several attempts."""


def repeated(what: str, run: Callable[[], Any], attempts: int = ATTEMPTS) -> Any:
    """The result of `run`, which is called again while its errors are such that pass.

    Args:
        what: the operation and its object, for errors: "write gs://bucket/run/result.json".
        run: the operation. It must be possible to repeat it after any failure.
        attempts: how often it is called at most.

    Raises:
        Refused: the credentials are wrong, missing or expired; at once.
        Unavailable: every attempt failed.
        FileNotFoundError, FileExistsError: the answers of the store, which are none of its failures.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, attempts + 1):
        try:
            return run()
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            _raise_if_refused(what, error)
            if not passes(error):
                raise
            if attempt == attempts:
                raise Unavailable(
                    f"{what}: failed {attempts} times, at last with {_short(error)}; run the same command again when the "
                    "store answers"
                ) from error
        # Jitter: the hosts of a job that failed together must not come back together.
        time.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError("not reached")


def passes(error: BaseException) -> bool:
    """Whether an error may be gone at the next attempt."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    # Time-outs, resets, cut bodies; the clients' own errors are no OSErrors, but come from one of their modules.
    if isinstance(error, OSError | asyncio.TimeoutError | EOFError):
        return True
    return type(error).__module__.partition(".")[0] in (
        "aiohttp",
        "botocore",
        "aiobotocore",
        "gcsfs",
    )


def _raise_if_refused(what: str, error: BaseException) -> None:
    named = type(error).__name__ in _OF_CREDENTIALS or _s3_code(error) in _EXPIRED
    if named or isinstance(error, PermissionError) or _status(error) in _REFUSED:
        # The text of the error may hold parts of a request, signatures among them.
        raise Refused(
            f"{what}: the store refuses it ({type(error).__name__}); check this machine's credentials "
            "(gcloud auth application-default login, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and its rights "
            "in the bucket"
        ) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error reports, in any of the ways of the clients; None: it is not one of HTTP."""
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    status = _s3_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _s3_code(error: BaseException) -> str:
    return _s3_response(error).get("Error", {}).get("Code", "")


def _s3_response(error: BaseException) -> dict[str, Any]:
    """What S3 has answered, of botocore's ClientError and of s3fs's errors made of one; {} of others."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
