"""HTTP for the client: one call, its attempts, and its answer. It knows no routes.

A call is repeated only where that cannot have an effect twice: a read after any failure, and a creation too, by its
Idempotency-Key; a signature when no connection was made or the service itself answered that it signed nothing; another
change only when no connection was made. Redirects are not followed: they would send the token to another place.
"""

from __future__ import annotations

import email.utils
import json
import re
import secrets
import ssl
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import urllib3
from urllib3 import exceptions as http

from kms_jwks import errors
from kms_jwks.client.connections import Connections, failure_reason
from kms_jwks.client.problems import error_of, marked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CONNECT_TIMEOUT: Final = 5.0
"""Seconds to wait for a connection."""
MAX_ANSWER: Final = 32 * 1024 * 1024
"""Bytes that are read of an answer at most."""
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds between two attempts; an answer whose Retry-After is longer is raised instead of waited for."""

_VISIBLE: Final = re.compile(r"[!-~]+")


class Repeat(Enum):
    """The failures after which a call may be sent again."""

    READ = auto()
    """A call that changes nothing: after any failure."""
    SIGN = auto()
    """After a failure to connect, and when the service itself answered 429 or 503: nothing was signed."""
    CHANGE = auto()
    """Only after a failure to connect."""
    CREATE = auto()
    """A creation with an Idempotency-Key: after any failure. The service creates nothing twice."""


class _Stage(Enum):
    """How far a failed attempt got."""

    UNSENT = auto()
    LOST = auto()
    """It was sent; no answer came, or not the whole answer."""
    REFUSED = auto()
    """The service itself answered 429 or 503."""
    OBSTRUCTED = auto()
    """Something between client and service answered 429, 502, 503 or 504."""


_MAY_REPEAT: Final[Mapping[Repeat, frozenset[_Stage]]] = {
    Repeat.READ: frozenset(_Stage),
    Repeat.SIGN: frozenset({_Stage.UNSENT, _Stage.REFUSED}),
    Repeat.CHANGE: frozenset({_Stage.UNSENT}),
    Repeat.CREATE: frozenset(_Stage),
}


class _Failed(Exception):
    """A failed attempt that may be repeated; the caller gets `error` if no further attempt succeeds."""

    def __init__(self, stage: _Stage, error: errors.Error) -> None:
        self.stage = stage
        self.error = error


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer as it came, with the service's own JSON."""

    method: str
    path: str
    status: int
    body: bytes
    request_id: str | None

    def __repr__(self) -> str:
        # The body may hold a token.
        return f"Reply({self.method} {self.path}, status={self.status}, {len(self.body)} bytes)"


class Transport:
    """Calls to one service: credentials, attempts, answers. Thread-safe."""

    def __init__(
        self,
        base_url: str,
        token: Callable[[], str] | None,
        *,
        ca_cert: str | Path | None,
        client_cert: str | Path | None,
        client_key: str | Path | None,
        timeout: float,
        retries: int,
        pool_size: int,
        allow_insecure_http: bool,
        on_answer: Callable[[Reply], None] | None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connections = Connections(
            base_url,
            ca_cert=ca_cert,
            client_cert=client_cert,
            client_key=client_key,
            pool_size=pool_size,
            allow_insecure_http=allow_insecure_http,
        )
        self._url = self._connections.url
        self._prefix = quote(self._url.path.rstrip("/"), safe="/%~")
        self._token = token
        self._timeout = timeout
        self._retries = retries
        self._on_answer = on_answer
        self._sleep = sleep

    @property
    def address(self) -> str:
        """The service's URL as it was given, without a slash at its end."""
        return self._url.geturl().rstrip("/")

    def close(self) -> None:
        """Close the pooled connections; the next call opens new ones."""
        self._connections.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        repeat: Repeat,
        body: object = None,
        query: Mapping[str, str | int | None] | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> Reply:
        """Send a request and return its answer. `patience`: seconds to wait for it beyond the usual timeout.

        Raises the problem's error, ServiceUnreachable or UnexpectedAnswer.
        """
        target = self._prefix + path
        given = {name: value for name, value in (query or {}).items() if value is not None}
        if given:
            target += "?" + urlencode(given)
        content = b"" if body is None else _encode(body)
        attempt = 0
        while True:
            try:
                reply = self._once(method, path, target, content, dict(headers or {}), self._timeout + patience)
            except _Failed as failed:
                pause = _pause(failed.error, attempt)
                if attempt >= self._retries or failed.stage not in _MAY_REPEAT[repeat] or pause > LONGEST_PAUSE:
                    raise failed.error from failed.__cause__
            else:
                if self._on_answer is not None:
                    self._on_answer(reply)
                return reply
            self._sleep(pause)
            attempt += 1

    # --- one attempt

    def _once(
        self, method: str, path: str, target: str, content: bytes, headers: dict[str, str], timeout: float
    ) -> Reply:
        headers |= {"User-Agent": "kms-jwks-client", **self._credentials()}
        headers.setdefault("Accept", "application/json")
        if content:
            headers["Content-Type"] = "application/json"
        response: urllib3.BaseHTTPResponse | None = None
        try:
            response = self._connections.pool().urlopen(
                method,
                target,
                body=content or None,
                headers=headers,
                timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT, timeout), read=timeout),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            received = self._read(response, timeout)
            response.release_conn()
        except (http.HTTPError, OSError) as error:
            if response is not None:
                response.close()
            raise self._lost(error, method) from error
        except BaseException:
            if response is not None:
                response.close()
            raise
        return _judge(method, path, response, received)

    def _read(self, response: urllib3.BaseHTTPResponse, timeout: float) -> bytes:
        """Read the whole body; raise TimeoutError when that takes longer than `timeout` seconds in all."""
        assert isinstance(response, urllib3.HTTPResponse)
        end = time.monotonic() + timeout
        received = bytearray()
        while chunk := response.read1(65_536, decode_content=False):
            received += chunk
            if len(received) > MAX_ANSWER:
                raise marked(
                    errors.UnexpectedAnswer(f"The answer is longer than {MAX_ANSWER} bytes."), response.status, None
                )
            if time.monotonic() > end:
                raise http.TimeoutError("the answer did not end in time")
        return bytes(received)

    def _credentials(self) -> dict[str, str]:
        if self._token is None:
            return {}
        token = self._token()
        # Checked here: the error of http.client would repeat the whole value.
        if not _VISIBLE.fullmatch(token):
            raise errors.CredentialsMalformed("The API token is empty, or holds spaces or characters outside ASCII.")
        return {"Authorization": f"Bearer {token}"}

    def _lost(self, error: Exception, method: str) -> _Failed:
        where = f"{self._url.scheme}://{self._url.netloc}"
        if isinstance(error, http.SSLError | ssl.SSLError):
            # A failure of TLS is not repeated: a wrong certificate stays wrong.
            raise errors.ServiceUnreachable(
                f"{where}: TLS failed: {failure_reason(error)}.",
                next_step="Check KMS_JWKS_CACERT, the client certificate and the host name in KMS_JWKS_ADDR.",
            ) from error
        if isinstance(error, http.NewConnectionError | http.ConnectTimeoutError | http.NameResolutionError):
            return _Failed(_Stage.UNSENT, errors.ServiceUnreachable(f"{where}: {failure_reason(error)}."))
        timed_out = isinstance(error, http.TimeoutError)
        what = "no answer came in time" if timed_out else "the connection ended before the whole answer had come"
        if method == "GET":
            return _Failed(_Stage.LOST, errors.ServiceUnreachable(f"{where}: {what}."))
        return _Failed(
            _Stage.LOST,
            errors.ServiceUnreachable(
                f"{where}: {what}; whether the call took effect is not known.",
                next_step="Check whether it took effect before you repeat it.",
            ),
        )


def _judge(method: str, path: str, response: urllib3.BaseHTTPResponse, body: bytes) -> Reply:
    """Return a success; raise _Failed for an answer after which the call may be repeated, else the error."""
    status, headers = response.status, response.headers
    request_id = _plain(headers.get("X-Request-Id"))
    if 200 <= status < 300:
        return Reply(method, path, status, body, request_id)
    if 300 <= status < 400:
        raise marked(
            errors.UnexpectedAnswer(
                f"Status {status} points elsewhere{_elsewhere(headers.get('Location'))}; redirects are not followed.",
                next_step="Give KMS_JWKS_ADDR the service's final URL.",
            ),
            status,
            request_id,
        )
    error = error_of(status, body, request_id=request_id, retry_after=_retry_after(headers.get("Retry-After")))
    if status in (429, 503) and not isinstance(error, errors.UnexpectedAnswer):
        raise _Failed(_Stage.REFUSED, error)
    if status in (429, 502, 503, 504):
        raise _Failed(_Stage.OBSTRUCTED, error)
    raise error


def segment(value: str, field: str) -> str:
    """One segment of a path, percent-encoded. Raises InvalidField for a value that would change the path."""
    if value in ("", ".", ".."):
        raise errors.InvalidField(f"{field}: {value!r} is not a name", fields={"field": field})
    return quote(value, safe="")


# --- inside -----------------------------------------------------------------------------------------------------------


def _encode(body: object) -> bytes:
    """The body as JSON. Raises MalformedBody for a value that JSON cannot hold, such as NaN."""
    try:
        return json.dumps(msgspec.to_builtins(body), allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise errors.MalformedBody(f"The request cannot be written as JSON: {reason}.") from None


T = TypeVar("T")


def decode(reply: Reply, into: type[T]) -> T:
    """The body of an answer as a struct; unknown members are ignored. Raises UnexpectedAnswer."""
    try:
        return msgspec.json.decode(reply.body, type=into)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise marked(
            errors.UnexpectedAnswer(f"{reply.method} {reply.path}: the body is not what this route answers: {error}."),
            reply.status,
            reply.request_id,
        ) from None


def _pause(error: errors.Error, attempt: int) -> float:
    """Seconds before the next attempt: what the service asked for, or a growing pause with jitter."""
    if error.retry_after is not None:
        return float(error.retry_after)
    most = min(FIRST_PAUSE * 2.0**attempt, LONGEST_PAUSE)
    return most * (0.5 + secrets.randbelow(1000) / 2000)


def _retry_after(header: str | None) -> int | None:
    """Whole seconds of a Retry-After header: a number or a date (RFC 9110 §10.2.3)."""
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return int(text[:9])
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0, round(when.timestamp() - time.time()))


def _elsewhere(location: str | None) -> str:
    """Scheme and host of a Location; its other parts are not shown."""
    try:
        parts = urlsplit(location or "")
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f" ({parts.scheme}://{host})" if parts.scheme and host.isprintable() and host else ""


def _plain(value: str | None) -> str | None:
    return value if value is not None and len(value) <= 200 and value.isprintable() else None
