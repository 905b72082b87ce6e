"""One process's client of KMS: looks keys up, keeps their public keys, and checks account and region."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kms_jwks.backends.aws_kms import keys, lifecycle
from kms_jwks.backends.aws_kms.connection import Connection
from kms_jwks.backends.aws_kms.error_map import is_about_state, is_denial
from kms_jwks.errors import BackendError, BackendKeyNotFound, BackendRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from kms_jwks.backends.base import KeyRef
    from kms_jwks.config import AwsKmsOptions

_LOOKUP_TIME: Final = 1.0
"""Seconds for which a key that KMS does not find is looked up again: a new key is not visible everywhere at once."""
_ACCOUNT_LIFETIME: Final = 60.0
"""Seconds for which the account of the credentials is kept."""


class KmsClient:
    """`bound` is a reference of the registry's keys, whose account is expected; the `account` option wins over it."""

    def __init__(self, options: AwsKmsOptions, opened: Callable[[], None], bound: KeyRef | None) -> None:
        self.connection = Connection(options, opened)
        self.bound = bound
        self._options = options
        self._public_keys: dict[str, keys.PublicKeyFacts] = {}
        self._account: tuple[float, str | None] | None = None

    # --- keys -----------------------------------------------------------------------------------------------------

    def describe_key(self, key_id: str, deadline: float) -> dict[str, Any]:
        """DescribeKey's KeyMetadata. Raises BackendError."""
        metadata: dict[str, Any] = self.call_for_key("DescribeKey", key_id, deadline)["KeyMetadata"]
        return metadata

    def read_public_key(self, arn: str, deadline: float) -> keys.PublicKeyFacts:
        """The public key as KMS holds it now. Raises BackendError."""
        return keys.parse_public_key(self.call_for_key("GetPublicKey", arn, deadline)["PublicKey"])

    def get_public_key(self, arn: str, deadline: float) -> keys.PublicKeyFacts:
        """The public key, read from KMS once and then from memory: it never changes. Raises BackendError."""
        facts = self._public_keys.get(arn)
        if facts is None:
            facts = self._public_keys[arn] = self.read_public_key(arn, deadline)
        return facts

    def call_for_key(self, operation: str, key_id: str, deadline: float, **parameters: Any) -> dict[str, Any]:
        """A call about one key. Raises BackendError; BackendKeyNotFound after repeated lookups."""
        lookup_end = min(deadline, time.monotonic() + _LOOKUP_TIME)
        try:
            return lifecycle.retry_until_found(
                lambda: self.connection.call(operation, deadline, KeyId=key_id, **parameters), lookup_end
            )
        except BackendKeyNotFound as error:
            raise BackendKeyNotFound(f"KMS in {self._options.region} holds no key {key_id}.") from error
        except BackendRefused as error:
            raise self._explain(error, key_id, deadline) from error

    def _explain(self, error: BackendRefused, key_id: str, deadline: float) -> BackendRefused:
        """The refusal with its cause, which takes further calls: the key's state, or credentials of another account."""
        try:
            if is_about_state(error):
                metadata = self.connection.call("DescribeKey", deadline, KeyId=key_id)["KeyMetadata"]
                state = metadata["KeyState"]
                return BackendRefused(
                    f"The key {metadata['Arn']} is in state {state}.",
                    next_step=error.next_step,
                    fields={"key_state": state},
                )
            known, expected = self.find_account(deadline), self.expected_account
            if known is not None and expected is not None and known != expected:
                return _wrong_account(known, expected, error.detail)
            arn = keys.Arn.parse(key_id)
            if known is not None and arn is not None and known != arn.account:
                return BackendRefused(
                    f"{error.detail} The credentials are of account {known}, the key is of account {arn.account}.",
                    next_step=f"Give the service credentials of account {arn.account}, or: {error.next_step}",
                )
        except BackendError:
            pass
        return error

    # --- accounts and regions -------------------------------------------------------------------------------------

    @property
    def expected_account(self) -> str | None:
        """The account whose credentials are expected; None if neither the options nor the registry name one."""
        return self._options.account or (self.bound["account"] if self.bound is not None else None)

    def find_account(self, deadline: float) -> str | None:
        """The account of the credentials; None if they may not read it. Raises BackendUnavailable and its like."""
        if self._account is not None and time.monotonic() < self._account[0]:
            return self._account[1]
        account = self.connection.own_account()
        if account is None:
            with suppress(BackendRefused):
                aliases = self.connection.call("ListAliases", deadline, Limit=1)["Aliases"]
                arn = keys.Arn.parse(aliases[0]["AliasArn"]) if aliases else None
                account = arn.account if arn is not None else None
        self._account = (time.monotonic() + _ACCOUNT_LIFETIME, account)
        return account

    def check_account(self, deadline: float) -> None:
        """Raise BackendRefused if the credentials are of another account than the expected one."""
        known = self.find_account(deadline) if self.expected_account is not None else None
        if known is not None:
            self.check_same_account(known)

    def check_same_account(self, known: str) -> None:
        """Raise BackendRefused if `known` is not the expected account."""
        expected = self.expected_account
        if expected is not None and known != expected:
            raise _wrong_account(known, expected)

    def check_region(self, arn: keys.Arn) -> None:
        """Raise BackendRefused for a key of another region, which this region's endpoint does not know."""
        if arn.region != self._options.region:
            raise BackendRefused(
                f"The key {arn.text} is in {arn.region}, and this backend in {self._options.region}.",
                next_step="Correct `region` in the backend's settings, or configure a backend for each region.",
            )

    def check_reference(self, ref: KeyRef) -> str:
        """The ARN of a reference. Raises BackendRefused if it is of another backend, region or account."""
        parts = ref.as_dict()
        arn = keys.Arn.parse(parts.get("arn", ""))
        if arn is None or arn.is_alias or not parts.get("account"):
            raise BackendRefused(f"The reference {parts} is not one of an AWS KMS backend.")
        self.check_region(arn)
        if self._options.account not in (None, parts["account"]):
            raise BackendRefused(
                f"The key {arn.text} is reached by account {parts['account']}, and this backend is of account "
                f"{self._options.account}.",
                next_step="Correct `account` in the backend's settings, or configure a backend for each account.",
            )
        return arn.text

    def probe(self, deadline: float) -> None:
        """Make KMS answer one call. Raises BackendError.

        The call is DescribeKey of a key that the registry knows, which every worker may make, or else ListAliases. KMS
        has checked the credentials before it denies ListAliases, so a denial counts as an answer.
        """
        if self.bound is not None and self.bound["region"] == self._options.region:
            with suppress(BackendKeyNotFound):
                self.describe_key(self.bound["arn"], deadline)
                return
        try:
            self.connection.call("ListAliases", deadline, Limit=1)
        except BackendRefused as error:
            if not is_denial(error):
                raise


def _wrong_account(known: str, expected: str, before: str = "") -> BackendRefused:
    return BackendRefused(
        f"{before} The credentials are of account {known}, and this backend is bound to account {expected}.".lstrip(),
        next_step=f"Give the service credentials of account {expected}, or correct `account` in the backend's "
        "settings.",
    )
