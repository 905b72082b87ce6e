"""HTTP for the client: pooled connections, what is repeated and what is not, and nothing about routes.

A call is sent again only where that cannot do a thing twice: reads whatever happened, signatures when the connection
never stood or the service itself said that it signed nothing, changes only when the connection never stood.
Redirects are never followed: they would carry the token to another place.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import re
import secrets
import ssl
import threading
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import SplitResult, quote, urlencode, urlsplit

import msgspec
import urllib3
from urllib3 import exceptions as http

from kms_jwks import errors
from kms_jwks.client.problems import error_of, marked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CONNECT_TIMEOUT: Final = 5.0
"""Seconds until a connection must stand."""
MAX_ANSWER: Final = 32 * 1024 * 1024
"""Bytes of an answer that are read at most."""
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds between two attempts; an answer whose Retry-After is longer is raised instead of waited for."""

_VISIBLE: Final = re.compile(r"[!-~]+")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")


class Repeat(Enum):
    """Which failures of a call may be answered by sending it again."""

    READ = auto()
    """It changes nothing: any."""
    SIGN = auto()
    """The connection never stood, or the service said 429 or 503 itself: nothing was signed."""
    CHANGE = auto()
    """The connection never stood."""


class _Stage(Enum):
    """How far an attempt got."""

    UNSENT = auto()
    LOST = auto()
    """Sent; no answer, or not the whole of it."""
    REFUSED = auto()
    """The service itself answered 429 or 503."""
    OBSTRUCTED = auto()
    """Something between answered 429, 502, 503 or 504."""


_MAY_REPEAT: Final[Mapping[Repeat, frozenset[_Stage]]] = {
    Repeat.READ: frozenset(_Stage),
    Repeat.SIGN: frozenset({_Stage.UNSENT, _Stage.REFUSED}),
    Repeat.CHANGE: frozenset({_Stage.UNSENT}),
}


class _Failed(Exception):
    """An attempt that another one may mend; `error` is what the caller gets when none does."""

    def __init__(self, stage: _Stage, error: errors.Error) -> None:
        self.stage = stage
        self.error = error


@dataclass(frozen=True, slots=True)
class Reply:
    """A success as it came: for programs that want the service's own JSON."""

    method: str
    path: str
    status: int
    body: bytes
    request_id: str | None

    def __repr__(self) -> str:
        # The body may hold a token.
        return f"Reply({self.method} {self.path}, status={self.status}, {len(self.body)} bytes)"


class Transport:
    """One service's address with its pool of connections. Thread-safe; a forked child gets a pool of its own."""

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
        self._url = _checked_url(base_url, allow_insecure_http=allow_insecure_http)
        self._prefix = quote(self._url.path.rstrip("/"), safe="/%~")
        self._tls = _tls(ca_cert, client_cert, client_key) if self._url.scheme == "https" else None
        self._token = token
        self._timeout = timeout
        self._retries = retries
        self._pool_size = pool_size
        self._on_answer = on_answer
        self._sleep = sleep
        self._lock = threading.Lock()
        self._open: tuple[int, urllib3.HTTPConnectionPool] | None = None

    @property
    def address(self) -> str:
        """The service's URL as it was given, without a slash at its end."""
        return self._url.geturl().rstrip("/")

    def close(self) -> None:
        """Close the pooled connections; the next call opens new ones."""
        with self._lock:
            if self._open is not None:
                self._open[1].close()
            self._open = None

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
        """Send a request and return its success. `patience`: seconds to wait for the answer beyond the usual timeout.

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
            response = self._pool().urlopen(
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
        """The whole body within `timeout` seconds, however slowly it trickles."""
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
        # http.client would repeat the whole value in its own complaint.
        if not _VISIBLE.fullmatch(token):
            raise errors.CredentialsMalformed("The API token is empty, or holds spaces or characters outside ASCII.")
        return {"Authorization": f"Bearer {token}"}

    def _pool(self) -> urllib3.HTTPConnectionPool:
        pid = os.getpid()
        with self._lock:
            if self._open is None or self._open[0] != pid:
                # Sockets shared with a parent process would hand out the parent's answers: they are left alone.
                self._open = (pid, self._new_pool())
            return self._open[1]

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        host, port = self._url.hostname or "", self._url.port
        if self._tls is None:
            return urllib3.HTTPConnectionPool(host, port or 80, maxsize=self._pool_size)
        return urllib3.HTTPSConnectionPool(host, port or 443, maxsize=self._pool_size, ssl_context=self._tls)

    def _lost(self, error: Exception, method: str) -> _Failed:
        where = f"{self._url.scheme}://{self._url.netloc}"
        if isinstance(error, http.SSLError | ssl.SSLError):
            # Not worth another attempt: certificates do not mend themselves.
            raise errors.ServiceUnreachable(
                f"{where}: TLS failed: {_why(error)}.",
                next_step="Check KMS_JWKS_CACERT, the client certificate and the host name in KMS_JWKS_ADDR.",
            ) from error
        if isinstance(error, http.NewConnectionError | http.ConnectTimeoutError | http.NameResolutionError):
            return _Failed(_Stage.UNSENT, errors.ServiceUnreachable(f"{where}: {_why(error)}."))
        timed_out = isinstance(error, http.TimeoutError)
        what = "no answer came in time" if timed_out else "the connection ended before the whole answer had come"
        if method == "GET":
            return _Failed(_Stage.LOST, errors.ServiceUnreachable(f"{where}: {what}."))
        return _Failed(
            _Stage.LOST,
            errors.ServiceUnreachable(
                f"{where}: {what}; whether the call took effect is not known.",
                next_step="Look whether it took effect before you repeat it.",
            ),
        )


def _judge(method: str, path: str, response: urllib3.BaseHTTPResponse, body: bytes) -> Reply:
    """Success, an attempt that another may mend, or the error itself."""
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
    """One segment of a path, percent-encoded. Raises InvalidField for what would make another path of it."""
    if value in ("", ".", ".."):
        raise errors.InvalidField(f"{field}: {value!r} names nothing", fields={"field": field})
    return quote(value, safe="")


# --- inside -----------------------------------------------------------------------------------------------------------


def _checked_url(url: str, *, allow_insecure_http: bool) -> SplitResult:
    try:
        parts = urlsplit(url)
        sound = parts.port is None or parts.port > 0
    except ValueError:
        parts, sound = urlsplit(""), False
    host = parts.hostname or ""
    sound = sound and parts.scheme in ("http", "https") and _HOST.fullmatch(host) is not None and url.isprintable()
    if not sound or "@" in parts.netloc or "?" in url or "#" in url or " " in url:
        # Not repeated: somebody may have put a password into it.
        raise errors.ConfigurationError(
            "The service's address must be an http or https URL without user, query or fragment.",
            next_step="Set KMS_JWKS_ADDR, for example to https://keys.example.com.",
        )
    if parts.scheme == "http" and not allow_insecure_http and not _is_loopback(host):
        raise errors.ConfigurationError(
            f"{host} is not this machine, and over plain http anybody on the way could read the API token.",
            next_step="Use https, or allow plain http explicitly (--allow-insecure-http, allow_insecure_http=True).",
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _tls(ca_cert: str | Path | None, client_cert: str | Path | None, client_key: str | Path | None) -> ssl.SSLContext:
    """Certificates are read now, so that a wrong path is an error of the configuration and not of every call."""
    if client_key is not None and client_cert is None:
        raise errors.ConfigurationError("A client key needs its client certificate (KMS_JWKS_CLIENT_CERT).")
    try:
        context = ssl.create_default_context(cafile=None if ca_cert is None else os.fspath(ca_cert))
    except (OSError, ssl.SSLError) as error:
        raise errors.ConfigurationError(f"KMS_JWKS_CACERT: {ca_cert} cannot be used: {_why(error)}.") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if client_cert is not None:
        try:
            # The password is never asked for on the terminal of a service.
            context.load_cert_chain(client_cert, client_key, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise errors.ConfigurationError(
                f"KMS_JWKS_CLIENT_CERT: {client_cert} cannot be used: {_why(error)}."
            ) from None
    return context


def _encode(body: object) -> bytes:
    """JSON that never turns a value into another one silently, as `null` for NaN would be."""
    try:
        return json.dumps(msgspec.to_builtins(body), allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise errors.MalformedBody(f"The request cannot be written as JSON: {reason}.") from None


T = TypeVar("T")


def decode(reply: Reply, into: type[T]) -> T:
    """The body of a success as a struct; members this client does not know are ignored. Raises UnexpectedAnswer."""
    try:
        return msgspec.json.decode(reply.body, type=into)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise marked(
            errors.UnexpectedAnswer(
                f"{reply.method} {reply.path}: the body is not what this route answers: {error}.",
                next_step="Check that KMS_JWKS_ADDR names the service, and that client and service fit each other.",
            ),
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
    """Scheme and host of a Location, whose rest may hold anything."""
    try:
        parts = urlsplit(location or "")
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f" ({parts.scheme}://{host})" if parts.scheme and host.isprintable() and host else ""


def _plain(value: str | None) -> str | None:
    return value if value is not None and len(value) <= 200 and value.isprintable() else None


def _why(error: BaseException) -> str:
    """The innermost reason, in the system's words."""
    inner: BaseException = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    if isinstance(inner, ssl.SSLCertVerificationError):
        return inner.verify_message
    if isinstance(inner, ssl.SSLError):
        return (inner.reason or "handshake failed").lower().replace("_", " ")
    if isinstance(inner, TimeoutError | http.TimeoutError):
        return "it did not answer in time"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror[:1].lower() + inner.strerror[1:]
    return type(inner).__name__
