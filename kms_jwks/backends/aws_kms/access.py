"""One process's way to the keys: looking them up, whose credentials reach them, and in which region."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kms_jwks.backends.aws_kms import keys, making
from kms_jwks.backends.aws_kms.connection import Connection
from kms_jwks.backends.aws_kms.error_map import is_about_state, is_denial
from kms_jwks.errors import BackendError, BackendKeyNotFound, BackendRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from kms_jwks.backends.aws_kms.options import AwsKmsOptions
    from kms_jwks.backends.base import KeyRef

_LOOKING: Final = 1.0
"""Seconds for which a key that KMS does not find is looked for again: one that was just made may be late somewhere."""
_ACCOUNT_KNOWN: Final = 60.0
"""Seconds for which the answer to whose credentials these are is kept."""


class Access:
    """`bound_to` is the account that the registry's keys want; what the options name counts more."""

    def __init__(self, options: AwsKmsOptions, opened: Callable[[], None], bound: KeyRef | None) -> None:
        self.connection = Connection(options, opened)
        self.bound = bound
        self._options = options
        self._facts: dict[str, keys.Facts] = {}
        self._account: tuple[float, str | None] | None = None

    # --- keys -----------------------------------------------------------------------------------------------------

    def described(self, key_id: str, deadline: float) -> dict[str, Any]:
        """DescribeKey's KeyMetadata."""
        metadata: dict[str, Any] = self.found("DescribeKey", key_id, deadline)["KeyMetadata"]
        return metadata

    def public_half(self, arn: str, deadline: float) -> keys.Facts:
        """The public half as KMS holds it now."""
        return keys.facts_of(self.found("GetPublicKey", arn, deadline)["PublicKey"])

    def facts_of(self, arn: str, deadline: float) -> keys.Facts:
        """What never changes about a key, asked once."""
        facts = self._facts.get(arn)
        if facts is None:
            facts = self._facts[arn] = self.public_half(arn, deadline)
        return facts

    def found(self, operation: str, key_id: str, deadline: float, **parameters: Any) -> dict[str, Any]:
        """A call about one key. Raises BackendKeyNotFound only when it was looked for a while; BackendError."""
        looking = min(deadline, time.monotonic() + _LOOKING)
        try:
            return making.seen(lambda: self.connection.call(operation, deadline, KeyId=key_id, **parameters), looking)
        except BackendKeyNotFound as error:
            raise BackendKeyNotFound(f"KMS in {self._options.region} holds no key {key_id}.") from error
        except BackendRefused as error:
            raise self._explained(error, key_id, deadline) from error

    def _explained(self, error: BackendRefused, key_id: str, deadline: float) -> BackendRefused:
        """A refusal with its cause, which is asked for only now: the key's state, or credentials of another account."""
        try:
            if is_about_state(error):
                metadata = self.connection.call("DescribeKey", deadline, KeyId=key_id)["KeyMetadata"]
                state = metadata["KeyState"]
                return BackendRefused(
                    f"The key {metadata['Arn']} is in state {state}.",
                    next_step=error.next_step,
                    fields={"key_state": state},
                )
            known, wanted = self.account(deadline), self.expected_account
            if known is not None and wanted is not None and known != wanted:
                return _of_another_account(known, wanted, error.detail)
            arn = keys.Arn.of(key_id)
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
        """Whose credentials are wanted; None where nobody said."""
        return self._options.account or (self.bound["account"] if self.bound is not None else None)

    def account(self, deadline: float) -> str | None:
        """The account of the credentials, as far as they may know it. Raises BackendUnavailable and its like."""
        if self._account is not None and time.monotonic() < self._account[0]:
            return self._account[1]
        account = self.connection.own_account()
        if account is None:
            with suppress(BackendRefused):
                listed = self.connection.call("ListAliases", deadline, Limit=1)["Aliases"]
                arn = keys.Arn.of(listed[0]["AliasArn"]) if listed else None
                account = arn.account if arn is not None else None
        self._account = (time.monotonic() + _ACCOUNT_KNOWN, account)
        return account

    def check_account(self, deadline: float) -> None:
        """Nothing is made in an account that is not the expected one. Raises BackendRefused."""
        known = self.account(deadline) if self.expected_account is not None else None
        if known is not None:
            self.check_same_account(known)

    def check_same_account(self, known: str) -> None:
        """Raise BackendRefused where `known` is not the expected account."""
        wanted = self.expected_account
        if wanted is not None and known != wanted:
            raise _of_another_account(known, wanted)

    def check_region(self, arn: keys.Arn) -> None:
        """Raise BackendRefused for what is in another region: there it would have to be asked."""
        if arn.region != self._options.region:
            raise BackendRefused(
                f"The key {arn.text} is in {arn.region}, and this backend in {self._options.region}.",
                next_step="Correct `region` in the backend's settings, or configure a backend for each region.",
            )

    def arn_of(self, ref: KeyRef) -> str:
        """The ARN of a reference of ours. Raises BackendRefused for others, and for keys of another region."""
        parts = ref.as_dict()
        arn = keys.Arn.of(parts.get("arn", ""))
        if arn is None or arn.is_alias or not parts.get("account"):
            raise BackendRefused(f"The reference {parts} is none of an AWS KMS backend.")
        self.check_region(arn)
        if self._options.account not in (None, parts["account"]):
            raise BackendRefused(
                f"The key {arn.text} is reached by account {parts['account']}, and this backend is of account "
                f"{self._options.account}.",
                next_step="Correct `account` in the backend's settings, or configure a backend for each account.",
            )
        return arn.text

    def touch(self, deadline: float) -> None:
        """Have KMS answer something: DescribeKey of a key that the registry knows, which every worker may ask, or
        ListAliases. One that says no to the latter has looked at the credentials, and is well. Raises BackendError.
        """
        if self.bound is not None and self.bound["region"] == self._options.region:
            with suppress(BackendKeyNotFound):
                self.described(self.bound["arn"], deadline)
                return
        try:
            self.connection.call("ListAliases", deadline, Limit=1)
        except BackendRefused as error:
            if not is_denial(error):
                raise


def _of_another_account(known: str, wanted: str, before: str = "") -> BackendRefused:
    return BackendRefused(
        f"{before} The credentials are of account {known}, and this backend is bound to account {wanted}.".lstrip(),
        next_step=f"Give the service credentials of account {wanted}, or correct `account` in the backend's settings.",
    )
