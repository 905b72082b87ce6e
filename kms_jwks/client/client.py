"""The client as one class: the address, the credentials, and every call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from kms_jwks import errors
from kms_jwks.client.administration import Administration
from kms_jwks.client.signing import Signing
from kms_jwks.client.transport import Reply, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8080"
"""The service's default address."""


class Client(Signing, Administration):
    """A pool of connections to one service. Thread-safe, and usable after a fork; close it, or use it in a `with`.

    Every call raises the `kms_jwks.errors` class that the answer's problem type names, with `detail`, `next_step`,
    `fields`, `retry_after` (seconds), `status` (HTTP) and `request_id`; UnexpectedAnswer for an answer that this client
    does not understand; ServiceUnreachable where no answer came.
    """

    def __init__(
        self,
        base_url: str,
        token: str | Callable[[], str] | None = None,
        *,
        ca_cert: str | Path | None = None,
        client_cert: str | Path | None = None,
        client_key: str | Path | None = None,
        timeout: float = 10.0,
        retries: int = 2,
        pool_size: int = 10,
        allow_insecure_http: bool = False,
        on_answer: Callable[[Reply], None] | None = None,
    ) -> None:
        """`token`: an API token, or a function that returns one for each call; a public JWKS needs none.

        `timeout`: seconds to wait for an answer; `retries`: further attempts where repeating is safe; `pool_size`:
        connections kept open; `ca_cert`, `client_cert`, `client_key`: PEM files. Plain http to another machine is
        refused unless `allow_insecure_http`. `on_answer` is called with each successful answer.
        Raises ConfigurationError. No connection is made yet.
        """
        self._transport = Transport(
            base_url,
            # Wrapped in a function, whose repr does not show the token.
            (lambda: token) if isinstance(token, str) else token,
            ca_cert=ca_cert,
            client_cert=client_cert,
            client_key=client_key,
            timeout=timeout,
            retries=retries,
            pool_size=pool_size,
            allow_insecure_http=allow_insecure_http,
            on_answer=on_answer,
        )

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        timeout: float = 10.0,
        retries: int = 2,
        pool_size: int = 10,
        allow_insecure_http: bool = False,
    ) -> Self:
        """A client with the settings of the environment; empty variables count as unset.

        KMS_JWKS_ADDR (default http://127.0.0.1:8080), KMS_JWKS_TOKEN or KMS_JWKS_TOKEN_FILE (read for each call),
        KMS_JWKS_CACERT, KMS_JWKS_CLIENT_CERT, KMS_JWKS_CLIENT_KEY.
        """
        given = os.environ if environ is None else environ
        file = given.get("KMS_JWKS_TOKEN_FILE")
        return cls(
            given.get("KMS_JWKS_ADDR") or DEFAULT_ADDRESS,
            given.get("KMS_JWKS_TOKEN") or (token_file(file) if file else None),
            ca_cert=given.get("KMS_JWKS_CACERT") or None,
            client_cert=given.get("KMS_JWKS_CLIENT_CERT") or None,
            client_key=given.get("KMS_JWKS_CLIENT_KEY") or None,
            timeout=timeout,
            retries=retries,
            pool_size=pool_size,
            allow_insecure_http=allow_insecure_http,
        )

    def close(self) -> None:
        """Close the pooled connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._transport.address!r})"


def token_file(path: str | Path) -> Callable[[], str]:
    """A function that reads the API token from a file at each call, so that a replaced file is used at once."""

    def read() -> str:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise errors.ConfigurationError(
                f"The token file {path} cannot be read: {reason}.", next_step="Name a file that holds one API token."
            ) from None

    return read
