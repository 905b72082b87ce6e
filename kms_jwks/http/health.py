"""`python -m kms_jwks.http.health`: whether this node's service answers /healthz, for a container's health check."""

from __future__ import annotations

import http.client
import ssl
import sys

from kms_jwks import errors
from kms_jwks.config import Settings, load_settings

_TIMEOUT = 2.0
"""Seconds."""


def answers(settings: Settings) -> bool:
    """Whether the first address that the settings bind answers 200. Nothing secret is sent, so TLS is not checked."""
    host, _, port = settings.bind[0].rpartition(":")
    host = host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - where to ask, not where to listen
    connection: http.client.HTTPConnection
    if settings.tls_cert is not None:
        unchecked = ssl.create_default_context()
        unchecked.check_hostname = False
        unchecked.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, int(port), timeout=_TIMEOUT, context=unchecked)
    else:
        connection = http.client.HTTPConnection(host, int(port), timeout=_TIMEOUT)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> int:
    """0 where it answers, 1 where it does not or the settings cannot be read."""
    try:
        return 0 if answers(load_settings()) else 1
    except errors.ConfigurationError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
