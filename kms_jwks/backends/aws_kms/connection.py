"""The clients of one process: made at the first call, with deadlines, two attempts and no vendor exception beyond."""

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
from botocore import xform_name
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    DeferredRefreshableCredentials,
)

from kms_jwks.backends.aws_kms.error_map import meaning_of, translated
from kms_jwks.errors import BackendError, BackendTimeout, BackendUnavailable

if TYPE_CHECKING:
    from kms_jwks.backends.aws_kms.options import AwsKmsOptions

_ATTEMPTS: Final = 2
_PAUSE: Final = (0.03, 0.12)
"""Seconds between two attempts, at random: not all callers come back at once."""
_SHARES: Final = (1.0, 0.5, 0.25, 0.1)
"""Read timeouts on offer, as shares of the configured one. botocore fixes a client's when it is made, so there is a
client for each, and a call takes the longest that ends about when its deadline comes."""
_SLACK: Final = 1.25
_REOPEN_EVERY: Final = 5.0
"""Seconds within which credentials that are refused are not looked for again."""
_MEMBERS: Final = {
    "CreateKey": "KeyMetadata",
    "DescribeKey": "KeyMetadata",
    "GetPublicKey": "PublicKey",
    "ListAliases": "Aliases",
    "ListKeys": "Keys",
    "ListResourceTags": "Tags",
    "Sign": "Signature",
}
"""What is in an answer. botocore takes any page for an empty one, a captive portal's too."""
_QUIET: Final = ("boto3", "botocore")
"""Loggers that tell signatures, headers and session tokens, and repeat the vendor's words in warnings. What they would
say of a failure, the error that it becomes says."""


class Connection:
    """Calls KMS. Thread-safe, and of one process alone: botocore's clients do not survive a fork.

    `opened` is called whenever a session with fresh credentials was made.
    """

    def __init__(self, options: AwsKmsOptions, opened: Callable[[], None]) -> None:
        self._options = options
        self._opened = opened
        self._lock = threading.Lock()
        self._session: Any = None
        self._made_at = 0.0
        self._clients: dict[float, Any] = {}

    def call(self, operation: str, deadline: float, *, attempts: int = _ATTEMPTS, **parameters: Any) -> dict[str, Any]:
        """The answer to an operation by its API name ("Sign"); `deadline` is an instant of `time.monotonic()`.

        Raises BackendError. With `attempts` 1 for what must not be done twice.
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
                meaning = meaning_of(error)
                if meaning.reopen:
                    self._reopen()
                pause = random.uniform(*_PAUSE)  # noqa: S311 - no secret
                if not meaning.again or attempts <= 0 or time.monotonic() + pause >= deadline:
                    raise translated(error, operation) from error
            else:
                member = _MEMBERS.get(operation)
                if member is not None and member not in answer:
                    raise BackendUnavailable(
                        f"What answered {operation} is not KMS.",
                        next_step="See endpoint_url, and what stands between this machine and KMS.",
                        retry_after=5,
                    )
                return answer
            time.sleep(pause)

    def own_account(self) -> str | None:
        """The account of the credentials, where they say it themselves. Raises BackendError."""
        try:
            with self._lock:
                credentials = self._held_session().get_credentials()
            return None if credentials is None else credentials.get_frozen_credentials().account_id
        except Exception as error:
            raise translated(error, "GetCredentials") from error

    def source(self) -> str:
        """By which way boto3 found the credentials ("env", "assume-role", "iam-role"); empty before the first call."""
        try:
            with self._lock:
                credentials = self._session.get_credentials() if self._session is not None else None
        except Exception as error:
            raise translated(error, "GetCredentials") from error
        return str(credentials.method) if credentials is not None else ""

    def close(self) -> None:
        """Give up the connections."""
        with self._lock:
            clients, self._clients, self._session = list(self._clients.values()), {}, None
        for client in clients:
            client.close()

    def _client(self, deadline: float) -> Any:
        left = (deadline - time.monotonic()) * _SLACK
        wanted = [self._options.read_timeout * share for share in _SHARES]
        read_timeout = next((seconds for seconds in wanted if seconds <= left), wanted[-1])
        client = self._clients.get(read_timeout)
        if client is not None:
            return client
        # Somebody may be looking for credentials, which asks other services.
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise BackendTimeout("Credentials for KMS were not found in time.")
        try:
            if read_timeout not in self._clients:
                self._clients[read_timeout] = self._make(read_timeout)
            return self._clients[read_timeout]
        finally:
            self._lock.release()

    def _make(self, read_timeout: float) -> Any:
        options = self._options
        return self._held_session().client(
            "kms",
            region_name=options.region,
            endpoint_url=options.endpoint_url,
            config=Config(
                connect_timeout=min(options.connect_timeout, read_timeout),
                read_timeout=read_timeout,
                max_pool_connections=options.connections,
                retries={"mode": "standard", "total_max_attempts": 1},  # they are made here, within the deadline
                tcp_keepalive=True,
                ignore_configured_endpoint_urls=True,  # a variable must not lead elsewhere: the settings say where
                user_agent_extra="kms-jwks",
            ),
        )

    def _held_session(self) -> Any:
        """The session; made first where there is none. Called with the lock held."""
        if self._session is None:
            for name in _QUIET:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            self._session = _new_session(self._options)
            self._made_at = time.monotonic()
            self._opened()
        return self._session

    def _reopen(self) -> None:
        """Forget session and credentials, so that the next call looks for new ones. Calls under way go on."""
        with self._lock:
            if time.monotonic() - self._made_at >= _REOPEN_EVERY or not self._clients:
                self._session, self._clients = None, {}


def _new_session(options: AwsKmsOptions) -> Any:
    core = _core(options)
    if options.role_arn is not None:
        role = _Role(_core(options), options)
        core.register_component("credential_provider", CredentialResolver(providers=[role]))
    return boto3.Session(botocore_session=core, region_name=options.region)


def _core(options: AwsKmsOptions) -> Any:
    """A session whose clients, those that fetch credentials among them (STS, SSO), end in time."""
    session = botocore.session.Session(profile=options.profile)
    session.set_default_client_config(
        Config(
            connect_timeout=options.connect_timeout,
            read_timeout=options.read_timeout,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        )
    )
    return session


class _Role(CredentialProvider):  # type: ignore[misc] # botocore has no types
    """Credentials of a role, fetched at the first call and again before they expire."""

    METHOD = "assume-role"

    def __init__(self, source: Any, options: AwsKmsOptions) -> None:
        super().__init__()
        self._source = source
        self._options = options

    def load(self) -> Any:
        """Part of botocore's contract: None where there are no credentials to assume the role with."""
        found = self._source.get_credentials()
        if found is None:
            return None
        options = self._options
        config = Config(
            connect_timeout=options.connect_timeout,
            read_timeout=options.read_timeout,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        )
        fetcher = AssumeRoleCredentialFetcher(
            client_creator=partial(self._source.create_client, region_name=options.region, config=config),
            source_credentials=found,
            role_arn=options.role_arn,
            extra_args={"RoleSessionName": "kms-jwks"},
        )
        return DeferredRefreshableCredentials(method=self.METHOD, refresh_using=fetcher.fetch_credentials)
