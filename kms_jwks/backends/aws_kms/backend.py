"""The backend contract (backends/base.py) over AWS KMS. Clients, error translation and life cycle live beside it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kms_jwks import jose
from kms_jwks.algorithms import DEFAULT_RSA_BITS, Algorithm
from kms_jwks.backends.aws_kms import keys, making
from kms_jwks.backends.aws_kms.access import Access
from kms_jwks.backends.base import Digest, Evidence, GeneratedKey, Health, KeyRef, Message, PublicJwk, StoredKey
from kms_jwks.errors import (
    BackendError,
    BackendKeyNotFound,
    BackendRefused,
    BackendTimeout,
    KeyExists,
    TokenSignatureInvalid,
    UnsupportedAlgorithm,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kms_jwks.backends.aws_kms.connection import Connection
    from kms_jwks.backends.aws_kms.options import AwsKmsOptions

_READING: Final = 10.0
"""Seconds for calls without a deadline of their own."""
_MAKING: Final = 60.0
"""The same for making, listing and destroying: several calls, and a new key that is not seen everywhere at once."""


class AwsKmsBackend:
    """A `Backend` over one region of KMS. Made before the fork; each process makes its clients at its own first call.

    References hold `arn` and `key_id` (the key's), `region`, and `account`: the one whose credentials reach the key.
    A key of another account has that account in its ARN.
    """

    kind = "aws-kms"
    sign_in_place = False
    """A signature is a round trip to another machine."""

    def __init__(self, name: str, options: AwsKmsOptions) -> None:
        self.name = name
        self.recovered_at = 0.0
        self._options = options
        self._bound: KeyRef | None = None
        self._accesses: dict[int, Access] = {}  # by process: botocore's clients do not survive a fork

    def bind(self, ref: KeyRef) -> None:
        """See `Backend.bind`: the account whose credentials are wanted."""
        if ref.as_dict().keys() >= {"arn", "account", "region"}:
            self._bound = self._access().bound = ref

    # --- signing and reading --------------------------------------------------------------------------------------

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        """See `Backend.sign`. The first signature with a key asks KMS for its public half too."""
        if time.monotonic() >= deadline:
            raise BackendTimeout("The deadline had passed before KMS was asked.")
        access, row = self._access(), _row(alg)
        arn = access.arn_of(ref)
        facts = access.facts_of(arn, deadline)
        if not facts.fits(alg):
            raise BackendRefused(f"The key {arn} is {facts.kind}, which {alg.name} does not sign with.")
        kind, message = keys.prepared(alg, what, facts)
        answer = access.found(
            "Sign", arn, deadline, Message=message, MessageType=kind, SigningAlgorithm=row.signing_algorithm
        )
        if answer["KeyId"] != arn:
            raise BackendRefused(f"KMS signed with {answer['KeyId']} instead of {arn}.")
        return keys.in_jose_form(alg, answer["Signature"], facts)

    def capabilities(self) -> frozenset[str]:
        """See `Backend.capabilities`. KMS does not say what a region offers: `generate` may still refuse the newest."""
        return keys.every_algorithm()

    def public_key(self, ref: KeyRef) -> PublicJwk:
        """See `Backend.public_key`."""
        access = self._access()
        return access.public_half(access.arn_of(ref), _reading()).jwk

    def attributes(self, ref: KeyRef) -> Evidence:
        """See `Backend.attributes`."""
        access = self._access()
        return keys.evidence_of(access.described(access.arn_of(ref), _reading()))

    def list_keys(self, label_prefix: str) -> list[StoredKey]:
        """See `Backend.list_keys`. Keys without an alias are asked for their tags, one call each."""
        access, deadline = self._access(), _making()
        return list(making.listed(access.connection, deadline, label_prefix, access.account(deadline)))

    def adopt(self, locator: str, public_jwk: PublicJwk | None = None) -> GeneratedKey:
        """Find a key by its id, its ARN, an alias (with or without `alias/`) or an alias's ARN, of any account."""
        access, key_id, deadline = self._access(), keys.key_id_of(locator), _reading()
        arn = keys.Arn.of(key_id)
        if arn is not None:
            access.check_region(arn)
        try:
            metadata = access.described(key_id, deadline)
        except BackendKeyNotFound as error:
            where = f"in {self._options.region}" + (f" of account {arn.account}" if arn else "")
            raise BackendKeyNotFound(f"KMS knows no key {locator!r} {where}.") from error
        _check_signs(metadata)
        own = self._options.account or access.account(deadline)
        if own is None and arn is not None:
            raise BackendRefused(
                "These credentials do not say which account they are of, so that a key of another one cannot be told.",
                next_step="Set `account` in the backend's settings, or allow kms:ListAliases.",
            )
        ref = keys.reference(metadata, own or metadata["AWSAccountId"])
        found = access.public_half(ref["arn"], deadline).jwk
        if public_jwk is not None and dict(public_jwk) != dict(found):
            raise BackendRefused("The public key that was given is not the one that KMS holds.")
        return GeneratedKey(ref, found)

    def ping(self) -> Health:
        """See `Backend.ping`."""
        access, deadline = self._access(), _reading()
        access.touch(deadline)
        access.check_account(deadline)
        account = access.account(deadline) or access.expected_account or "unknown"
        facts = {"account": account, "region": self._options.region, "credentials": access.connection.source()}
        if self._options.endpoint_url is not None:
            facts["endpoint"] = self._options.endpoint_url
        return Health(f"AWS KMS of account {account} in {self._options.region}", facts)

    # --- making and destroying ------------------------------------------------------------------------------------

    def generate(
        self, label: str, alg: Algorithm, *, rsa_bits: int | None = None, purpose: Mapping[str, str] | None = None
    ) -> GeneratedKey:
        """See `Backend.generate`. The label is the key's alias, and with `purpose` in its tags.

        The key has signed, and the signature was verified, when this returns. Where something fails on the way its
        deletion is scheduled.
        """
        alias, spec, deadline = keys.alias_of(label), _spec(alg, rsa_bits), _making()
        access, connection = self._access(), self._access().connection
        access.check_account(deadline)
        with suppress(BackendKeyNotFound):
            connection.call("DescribeKey", deadline, KeyId=alias)
            raise KeyExists(f"KMS holds a key under {alias}.")
        metadata = making.created(
            connection, deadline, label, spec, purpose=purpose or {}, policy_file=self._options.key_policy_file
        )
        try:
            return self._finished(metadata, alias, alg, rsa_bits, deadline)
        except BaseException as error:
            self._given_up(metadata["Arn"], error)
            raise

    def distrust(self, ref: KeyRef) -> None:
        """Each call stands alone: nothing."""

    def schedule_destroy(self, ref: KeyRef, days: int) -> bool:
        """See `Backend.schedule_destroy`. A key that is gone already is as good as destroyed."""
        with suppress(BackendKeyNotFound):
            making.scheduled(self._to(ref), _making(), ref, days)
        return True

    def cancel_destroy(self, ref: KeyRef) -> None:
        """See `Backend.cancel_destroy`. The key is enabled again."""
        making.cancelled(self._to(ref), _making(), ref)

    def destroy(self, ref: KeyRef) -> None:
        """See `Backend.destroy`: schedules the deletion in 7 days where none is, and says how long it still takes."""
        making.ended(self._to(ref), _making(), ref)

    def close(self) -> None:
        """Give up this process's connections."""
        access = self._accesses.pop(os.getpid(), None)
        if access is not None:
            access.connection.close()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _access(self) -> Access:
        pid = os.getpid()
        access = self._accesses.get(pid)
        if access is None:
            access = self._accesses.setdefault(pid, Access(self._options, self._opened, self._bound))
        return access

    def _to(self, ref: KeyRef) -> Connection:
        """The connection, for a reference that it may be asked about. Raises BackendRefused."""
        access = self._access()
        access.arn_of(ref)
        return access.connection

    def _opened(self) -> None:
        self.recovered_at = time.monotonic()

    def _finished(
        self, metadata: Mapping[str, Any], alias: str, alg: Algorithm, rsa_bits: int | None, deadline: float
    ) -> GeneratedKey:
        """Read a new key back until KMS shows it, name it, and sign with it once."""
        access, ref = self._access(), keys.reference(metadata, metadata["AWSAccountId"])
        arn = ref["arn"]
        access.check_same_account(metadata["AWSAccountId"])
        evidence = keys.evidence_of(making.seen(lambda: access.described(arn, deadline), deadline))
        if evidence.weaknesses:
            raise BackendRefused(f"KMS says of the new key that {', '.join(evidence.weaknesses)}.")
        facts = making.seen(lambda: access.public_half(arn, deadline), deadline)
        if not facts.fits(alg) or (rsa_bits and facts.rsa_bits != rsa_bits):
            raise BackendRefused(f"KMS made {facts.kind} instead of one for {alg.name}.")
        making.seen(lambda: making.named(access.connection, deadline, alias, ref["key_id"]), deadline)
        trial = os.urandom(32)
        signature = making.seen(lambda: self.sign(ref, alg, Message(trial), deadline), deadline)
        try:
            jose.verify_signature(alg, facts.jwk, trial, signature)
        except TokenSignatureInvalid as error:
            raise BackendRefused("The new key's public half does not verify what it signs.") from error
        return GeneratedKey(ref, facts.jwk)

    def _given_up(self, arn: str, error: BaseException) -> None:
        """What was made of a key that failed is not left to cost money; where even that fails the error says so."""
        try:
            making.given_up(self._access().connection, time.monotonic() + _READING, arn)
        except BackendError as failure:
            if isinstance(error, BackendError):
                step = f"Schedule the deletion of {arn} in KMS ({failure.detail.rstrip('.')}); doctor lists it."
                error.next_step = f"{error.next_step} {step}".lstrip()


def _row(alg: Algorithm) -> keys.Row:
    try:
        return keys.ROWS[alg.name]
    except KeyError:
        raise UnsupportedAlgorithm(f"KMS has no {alg.name}.") from None


def _spec(alg: Algorithm, rsa_bits: int | None) -> str:
    if alg.is_rsa:
        rsa_bits = rsa_bits or DEFAULT_RSA_BITS
    elif rsa_bits is not None:
        raise BackendRefused(f"{alg.name} keys have no RSA modulus.")
    spec = _row(alg).specs.get(rsa_bits)
    if spec is None:
        raise UnsupportedAlgorithm(f"{alg.name} keys have 2048, 3072 or 4096 bits, not {rsa_bits}.")
    return spec


def _check_signs(metadata: Mapping[str, Any]) -> None:
    """Raise UnsupportedAlgorithm or BackendRefused for a key that cannot be adopted, whatever is accepted."""
    spec, usage, state = (metadata.get(name) for name in ("KeySpec", "KeyUsage", "KeyState"))
    if spec not in keys.SPECS:
        raise UnsupportedAlgorithm(f"The key has KeySpec {spec}, with which no JOSE signature is made.")
    if usage != "SIGN_VERIFY":
        raise BackendRefused(
            f"The key has KeyUsage {usage}, and KMS signs with SIGN_VERIFY alone.", next_step="Name a signing key."
        )
    if state != "Enabled":
        raise BackendRefused(f"The key is in state {state}.", next_step="Enable it in KMS first.")


def _reading() -> float:
    return time.monotonic() + _READING


def _making() -> float:
    return time.monotonic() + _MAKING
