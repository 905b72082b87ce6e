"""Calls to KMS: botocore clients of one process, deadlines, at most two attempts, and only errors of ours leave it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import boto3
import botocore.session
import structlog
from botocore import xform_name
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    DeferredRefreshableCredentials,
)

from kms_jwks.backends.aws_kms.error_map import find_row, translate
from kms_jwks.errors import BackendError, BackendTimeout, BackendUnavailable

if TYPE_CHECKING:
    from kms_jwks.config import AwsKmsOptions

log = structlog.get_logger(__name__)

_ATTEMPTS: Final = 2
_PAUSE: Final = (0.03, 0.12)
"""Seconds between two attempts, at random, so that callers do not all repeat at once."""
_SHARES: Final = (1.0, 0.5, 0.25, 0.1)
"""The read timeouts of the clients, as shares of the configured one. botocore fixes a client's read timeout when it is
made, so there is one client for each share, and a call takes the longest that ends at about its deadline."""
_SLACK: Final = 1.25
_RENEW_EVERY: Final = 5.0
"""Seconds between two searches for new credentials."""
_MEMBERS: Final = {
    "CreateKey": "KeyMetadata",
    "DescribeKey": "KeyMetadata",
    "GetPublicKey": "PublicKey",
    "ListAliases": "Aliases",
    "ListKeys": "Keys",
    "ListResourceTags": "Tags",
    "Sign": "Signature",
}
"""The member that an operation's answer must have: botocore reads a captive portal's page as an empty answer."""
_SILENCED_LOGGERS: Final = ("boto3", "botocore")
"""These loggers write signatures, headers, session tokens and messages of KMS. The error that a failure becomes has its
cause without them."""


class Connection:
    """Thread-safe, and of one process: botocore's clients do not survive a fork.

    `opened` is called after each new session, that is after each search for credentials.
    """

    def __init__(self, options: AwsKmsOptions, opened: Callable[[], None]) -> None:
        self._options = options
        self._read_timeouts = [options.read_timeout_ms / 1000 * share for share in _SHARES]
        self._opened = opened
        self._lock = threading.Lock()
        self._session: Any = None
        self._made_at = 0.0
        self._clients: dict[float, Any] = {}

    def call(self, operation: str, deadline: float, *, attempts: int = _ATTEMPTS, **parameters: Any) -> dict[str, Any]:
        """The answer to an operation by its API name ("Sign"); `deadline` is an instant of `time.monotonic()`.

        Raises BackendError. Calls that must not be made twice pass `attempts` 1.
        """
        while True:
            attempts -= 1
            if time.monotonic() >= deadline:
                raise BackendTimeout(f"The deadline had passed before KMS was asked to {operation}.")
            try:
                answer: dict[str, Any] = getattr(self._client(deadline), xform_name(operation))(**parameters)
            except BackendError:
                raise
            except Exception as error:
                row = find_row(error)
                if row.renew_credentials:
                    self._forget_session()
                pause = random.uniform(*_PAUSE)  # noqa: S311 - no secret
                if not row.retry or attempts <= 0 or time.monotonic() + pause >= deadline:
                    raise translate(error, operation) from error
            else:
                member = _MEMBERS.get(operation)
                if member is not None and member not in answer:
                    raise BackendUnavailable(
                        f"The answer to {operation} is not one of KMS.",
                        next_step="Check endpoint_url, and proxies between this machine and KMS.",
                        retry_after=5,
                    )
                return answer
            time.sleep(pause)

    def own_account(self) -> str | None:
        """The account that the credentials themselves name, or None. Raises BackendError."""
        try:
            with self._lock:
                credentials = self._get_session().get_credentials()
            return None if credentials is None else credentials.get_frozen_credentials().account_id
        except Exception as error:
            raise translate(error, "GetCredentials") from error

    def source(self) -> str:
        """How boto3 found the credentials ("env", "assume-role", "iam-role"); empty before the first call."""
        try:
            with self._lock:
                credentials = self._session.get_credentials() if self._session is not None else None
        except Exception as error:
            raise translate(error, "GetCredentials") from error
        return str(credentials.method) if credentials is not None else ""

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            clients, self._clients, self._session = list(self._clients.values()), {}, None
        for client in clients:
            client.close()

    def _client(self, deadline: float) -> Any:
        left = (deadline - time.monotonic()) * _SLACK
        read_timeout = next((seconds for seconds in self._read_timeouts if seconds <= left), self._read_timeouts[-1])
        client = self._clients.get(read_timeout)
        if client is not None:
            return client
        # Another thread may be searching for credentials, which calls other services.
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise BackendTimeout("Credentials for KMS were not found in time.")
        try:
            if read_timeout not in self._clients:
                client = self._make_client(read_timeout)
                if not self._clients:
                    log.info("kms_session_opened", region=self._options.region)
                self._clients[read_timeout] = client
            return self._clients[read_timeout]
        finally:
            self._lock.release()

    def _make_client(self, read_timeout: float) -> Any:
        options = self._options
        return self._get_session().client(
            "kms",
            region_name=options.region,
            endpoint_url=options.endpoint_url,
            config=Config(
                connect_timeout=min(options.connect_timeout_ms / 1000, read_timeout),
                read_timeout=read_timeout,
                max_pool_connections=options.waiting,  # as many as threads call at once
                retries={"mode": "standard", "total_max_attempts": 1},  # `call` repeats, within the deadline
                tcp_keepalive=True,
                ignore_configured_endpoint_urls=True,  # only the settings say where KMS is, not a variable
                user_agent_extra="kms-jwks",
            ),
        )

    def _get_session(self) -> Any:
        """The session, made if there is none. Called with the lock held."""
        if self._session is None:
            for name in _SILENCED_LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            self._session = _new_session(self._options)
            self._made_at = time.monotonic()
            self._opened()
        return self._session

    def _forget_session(self) -> None:
        """Forget session and credentials, so that the next call searches for new ones. Running calls continue."""
        with self._lock:
            if time.monotonic() - self._made_at >= _RENEW_EVERY or not self._clients:
                if self._clients:
                    log.warning("kms_session_discarded", region=self._options.region)
                self._session, self._clients = None, {}


def _new_session(options: AwsKmsOptions) -> Any:
    core = _core_session(options)
    if options.role_arn is not None:
        role = _RoleProvider(_core_session(options), options)
        core.register_component("credential_provider", CredentialResolver(providers=[role]))
    return boto3.Session(botocore_session=core, region_name=options.region)


def _core_session(options: AwsKmsOptions) -> Any:
    """A botocore session. Its timeouts also apply to the clients that fetch credentials (STS, SSO)."""
    session = botocore.session.Session(profile=options.profile)
    session.set_default_client_config(_credentials_config(options))
    return session


def _credentials_config(options: AwsKmsOptions) -> Config:
    return Config(
        connect_timeout=options.connect_timeout_ms / 1000,
        read_timeout=options.read_timeout_ms / 1000,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )


class _RoleProvider(CredentialProvider):  # type: ignore[misc] # botocore has no types
    """Credentials of an assumed role, fetched at the first call and again before they expire."""

    METHOD = "assume-role"

    def __init__(self, source: Any, options: AwsKmsOptions) -> None:
        super().__init__()
        self._source = source
        self._options = options

    def load(self) -> Any:
        """Part of botocore's contract: None if there are no credentials with which to assume the role."""
        found = self._source.get_credentials()
        if found is None:
            return None
        config = _credentials_config(self._options)
        fetcher = AssumeRoleCredentialFetcher(
            client_creator=partial(self._source.create_client, region_name=self._options.region, config=config),
            source_credentials=found,
            role_arn=self._options.role_arn,
            extra_args={"RoleSessionName": "kms-jwks"},
        )
        return DeferredRefreshableCredentials(method=self.METHOD, refresh_using=fetcher.fetch_credentials)
