"""The client's connections: the service's address, TLS, and a pool that a forked process does not share."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import threading
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3 import exceptions as http

from kms_jwks import errors

if TYPE_CHECKING:
    from pathlib import Path

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")


class Connections:
    """The pool of connections to one service. Thread-safe; a forked child gets a pool of its own."""

    def __init__(
        self,
        base_url: str,
        *,
        ca_cert: str | Path | None,
        client_cert: str | Path | None,
        client_key: str | Path | None,
        pool_size: int,
        allow_insecure_http: bool,
    ) -> None:
        """Raises ConfigurationError. No connection is made yet."""
        self.url = _checked_url(base_url, allow_insecure_http=allow_insecure_http)
        self._tls = _tls_context(ca_cert, client_cert, client_key) if self.url.scheme == "https" else None
        self._pool_size = pool_size
        self._lock = threading.Lock()
        self._open: tuple[int, urllib3.HTTPConnectionPool] | None = None
        """The process that made the pool, and the pool."""

    def pool(self) -> urllib3.HTTPConnectionPool:
        """The pool of this process."""
        pid = os.getpid()
        with self._lock:
            if self._open is None or self._open[0] != pid:
                # The sockets of a parent process stay open: reading from them would take the parent's answers.
                self._open = (pid, self._new_pool())
            return self._open[1]

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        with self._lock:
            if self._open is not None:
                self._open[1].close()
            self._open = None

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        host, port = self.url.hostname or "", self.url.port
        if self._tls is None:
            return urllib3.HTTPConnectionPool(host, port or 80, maxsize=self._pool_size)
        return urllib3.HTTPSConnectionPool(host, port or 443, maxsize=self._pool_size, ssl_context=self._tls)


def _checked_url(url: str, *, allow_insecure_http: bool) -> SplitResult:
    try:
        parts = urlsplit(url)
        sound = parts.port is None or parts.port > 0
    except ValueError:
        parts, sound = urlsplit(""), False
    host = parts.hostname or ""
    sound = sound and parts.scheme in ("http", "https") and _HOST.fullmatch(host) is not None and url.isprintable()
    if not sound or "@" in parts.netloc or "?" in url or "#" in url or " " in url:
        # The message does not repeat the URL: it may hold a password.
        raise errors.ConfigurationError(
            "The service's address must be an http or https URL without user, query or fragment.",
            next_step="Set KMS_JWKS_ADDR, for example to https://keys.example.com.",
        )
    if parts.scheme == "http" and not allow_insecure_http and not _is_loopback(host):
        raise errors.ConfigurationError(
            f"{host} is not this machine: over plain http the network between could read the API token.",
            next_step="Use https, or allow plain http explicitly (--allow-insecure-http, allow_insecure_http=True).",
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _tls_context(
    ca_cert: str | Path | None, client_cert: str | Path | None, client_key: str | Path | None
) -> ssl.SSLContext:
    """Read the certificates once, so that a wrong path is a configuration error and not an error of every call."""
    if client_key is not None and client_cert is None:
        raise errors.ConfigurationError("A client key needs its client certificate (KMS_JWKS_CLIENT_CERT).")
    try:
        context = ssl.create_default_context(cafile=None if ca_cert is None else os.fspath(ca_cert))
    except (OSError, ssl.SSLError) as error:
        raise errors.ConfigurationError(
            f"KMS_JWKS_CACERT: {ca_cert} cannot be used: {failure_reason(error)}."
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if client_cert is not None:
        try:
            # An empty password keeps OpenSSL from asking for one on the terminal.
            context.load_cert_chain(client_cert, client_key, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise errors.ConfigurationError(
                f"KMS_JWKS_CLIENT_CERT: {client_cert} cannot be used: {failure_reason(error)}."
            ) from None
    return context


def failure_reason(error: BaseException) -> str:
    """The innermost cause of a failed connection, as text."""
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
