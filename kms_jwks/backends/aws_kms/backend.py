"""The backend contract (`backends/base.py`) over AWS KMS."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kms_jwks import jose
from kms_jwks.algorithms import DEFAULT_RSA_BITS, Algorithm
from kms_jwks.backends.aws_kms import keys, lifecycle
from kms_jwks.backends.aws_kms.client import KmsClient
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
    from kms_jwks.config import AwsKmsOptions

_READ_TIME: Final = 10.0
"""Seconds for reading calls, which have no deadline of their own."""
_MUTATION_TIME: Final = 60.0
"""Seconds to make, list or destroy keys: several calls, and a new key is not visible everywhere at once."""


class AwsKmsBackend:
    """A `Backend` over one region of KMS. Made before the fork; each process makes its client at its first call.

    References hold `arn`, `key_id` and `region` of the key, and `account`: the one whose credentials use the key. The
    account that owns the key is in its ARN.
    """

    kind = "aws-kms"
    sign_in_place = False
    """A signature is an exchange with another machine."""

    def __init__(self, name: str, options: AwsKmsOptions) -> None:
        self.name = name
        self.recovered_at = 0.0
        self._options = options
        self._bound: KeyRef | None = None
        self._clients: dict[int, KmsClient] = {}  # by process id: botocore's clients do not survive a fork

    def bind(self, ref: KeyRef) -> None:
        """See `Backend.bind`: the account of the reference is the expected one."""
        if ref.as_dict().keys() >= {"arn", "account", "region"}:
            self._bound = self._client().bound = ref

    # --- signing and reading --------------------------------------------------------------------------------------

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        """See `Backend.sign`. The first signature with a key also reads its public key from KMS."""
        if time.monotonic() >= deadline:
            raise BackendTimeout("The deadline had passed before KMS was asked.")
        client, row = self._client(), _find_row(alg)
        arn = client.check_reference(ref)
        facts = client.get_public_key(arn, deadline)
        if not facts.fits(alg):
            raise BackendRefused(f"The key {arn} is {facts.description}, which {alg.name} does not sign with.")
        kind, message = keys.prepare_message(alg, what, facts)
        answer = client.call_for_key(
            "Sign", arn, deadline, Message=message, MessageType=kind, SigningAlgorithm=row.signing_algorithm
        )
        if answer["KeyId"] != arn:
            raise BackendRefused(f"KMS signed with {answer['KeyId']} instead of {arn}.")
        return keys.to_jose_signature(alg, answer["Signature"], facts)

    def capabilities(self) -> frozenset[str]:
        """See `Backend.capabilities`. A region may offer less: KMS says so only when `generate` is called."""
        return keys.supported_algorithms()

    def public_key(self, ref: KeyRef) -> PublicJwk:
        """See `Backend.public_key`."""
        client = self._client()
        return client.read_public_key(client.check_reference(ref), _read_deadline()).jwk

    def attributes(self, ref: KeyRef) -> Evidence:
        """See `Backend.attributes`."""
        client = self._client()
        return keys.read_evidence(client.describe_key(client.check_reference(ref), _read_deadline()))

    def list_keys(self, label_prefix: str) -> list[StoredKey]:
        """See `Backend.list_keys`. The tags of each key without an alias take one call."""
        client, deadline = self._client(), _mutation_deadline()
        return list(lifecycle.list_keys(client.connection, deadline, label_prefix, client.find_account(deadline)))

    def adopt(self, locator: str, public_jwk: PublicJwk | None = None) -> GeneratedKey:
        """Find a key by its id, its ARN, an alias (with or without `alias/`) or an alias's ARN, of any account."""
        client, key_id, deadline = self._client(), keys.parse_locator(locator), _read_deadline()
        arn = keys.Arn.parse(key_id)
        if arn is not None:
            client.check_region(arn)
        try:
            metadata = client.describe_key(key_id, deadline)
        except BackendKeyNotFound as error:
            where = f"in {self._options.region}" + (f" of account {arn.account}" if arn else "")
            raise BackendKeyNotFound(f"KMS has no key {locator!r} {where}.") from error
        _check_adoptable(metadata)
        own = self._options.account or client.find_account(deadline)
        if own is None and arn is not None:
            raise BackendRefused(
                "The account of these credentials is unknown, so a key of another account cannot be recognised.",
                next_step="Set `account` in the backend's settings, or allow kms:ListAliases.",
            )
        ref = keys.make_reference(metadata, own or metadata["AWSAccountId"])
        found = client.read_public_key(ref["arn"], deadline).jwk
        if public_jwk is not None and dict(public_jwk) != dict(found):
            raise BackendRefused(
                "The given public key is not the one that KMS holds.",
                next_step="Leave public_key out: KMS holds the public half.",
            )
        return GeneratedKey(ref, found)

    def ping(self) -> Health:
        """See `Backend.ping`."""
        client, deadline = self._client(), _read_deadline()
        client.probe(deadline)
        client.check_account(deadline)
        account = client.find_account(deadline) or client.expected_account or "unknown"
        facts = {"account": account, "region": self._options.region, "credentials": client.connection.source()}
        if self._options.endpoint_url is not None:
            facts["endpoint"] = self._options.endpoint_url
        return Health(f"AWS KMS of account {account} in {self._options.region}", facts)

    # --- making and destroying ------------------------------------------------------------------------------------

    def generate(
        self, label: str, alg: Algorithm, *, rsa_bits: int | None = None, purpose: Mapping[str, str] | None = None
    ) -> GeneratedKey:
        """See `Backend.generate`. The label becomes the key's alias; the tags hold the label and `purpose`.

        Before this returns the new key has signed once and the signature was verified. If a step fails, the deletion
        of the key is scheduled.
        """
        alias, spec, deadline = keys.make_alias(label), _find_spec(alg, rsa_bits), _mutation_deadline()
        client, connection = self._client(), self._client().connection
        client.check_account(deadline)
        with suppress(BackendKeyNotFound):
            connection.call("DescribeKey", deadline, KeyId=alias)
            raise KeyExists(f"KMS holds a key under {alias}.")
        metadata = lifecycle.create_key(
            connection, deadline, label, spec, purpose=purpose or {}, policy_file=self._options.key_policy_file
        )
        try:
            return self._finish(metadata, alias, alg, rsa_bits, deadline)
        except BaseException as error:
            self._discard(metadata["Arn"], error)
            raise

    def distrust(self, ref: KeyRef) -> None:
        """See `Backend.distrust`. Calls to KMS share no session, so there is nothing to discard."""

    def schedule_destroy(self, ref: KeyRef, days: int) -> bool:
        """See `Backend.schedule_destroy`. A key that is gone counts as destroyed."""
        with suppress(BackendKeyNotFound):
            lifecycle.schedule_destroy(self._connection_for(ref), _mutation_deadline(), ref, days)
        return True

    def cancel_destroy(self, ref: KeyRef) -> None:
        """See `Backend.cancel_destroy`. The key is enabled again."""
        lifecycle.cancel_destroy(self._connection_for(ref), _mutation_deadline(), ref)

    def destroy(self, ref: KeyRef) -> None:
        """See `Backend.destroy`. Schedules the deletion in 7 days unless it is scheduled already."""
        lifecycle.destroy(self._connection_for(ref), _mutation_deadline(), ref)

    def close(self) -> None:
        """Close this process's connections."""
        client = self._clients.pop(os.getpid(), None)
        if client is not None:
            client.connection.close()

    # --- helpers --------------------------------------------------------------------------------------------------

    def _client(self) -> KmsClient:
        pid = os.getpid()
        client = self._clients.get(pid)
        if client is None:
            client = self._clients.setdefault(pid, KmsClient(self._options, self._note_opened, self._bound))
        return client

    def _connection_for(self, ref: KeyRef) -> Connection:
        """The connection, after a check of the reference. Raises BackendRefused."""
        client = self._client()
        client.check_reference(ref)
        return client.connection

    def _note_opened(self) -> None:
        self.recovered_at = time.monotonic()

    def _finish(
        self, metadata: Mapping[str, Any], alias: str, alg: Algorithm, rsa_bits: int | None, deadline: float
    ) -> GeneratedKey:
        """Read a new key back until KMS shows it, create its alias, and sign with it once."""
        client, ref = self._client(), keys.make_reference(metadata, metadata["AWSAccountId"])
        arn = ref["arn"]
        client.check_same_account(metadata["AWSAccountId"])
        evidence = keys.read_evidence(lifecycle.retry_until_found(lambda: client.describe_key(arn, deadline), deadline))
        if evidence.weaknesses:
            raise BackendRefused(f"KMS says of the new key that {', '.join(evidence.weaknesses)}.")
        facts = lifecycle.retry_until_found(lambda: client.read_public_key(arn, deadline), deadline)
        if not facts.fits(alg) or (rsa_bits and facts.rsa_bits != rsa_bits):
            raise BackendRefused(f"KMS made {facts.description} instead of one for {alg.name}.")
        lifecycle.retry_until_found(
            lambda: lifecycle.create_alias(client.connection, deadline, alias, ref["key_id"]), deadline
        )
        trial = os.urandom(32)
        signature = lifecycle.retry_until_found(lambda: self.sign(ref, alg, Message(trial), deadline), deadline)
        try:
            jose.verify_signature(alg, facts.jwk, trial, signature)
        except TokenSignatureInvalid as error:
            raise BackendRefused("The new key's public key does not verify its signature.") from error
        return GeneratedKey(ref, facts.jwk)

    def _discard(self, arn: str, error: BaseException) -> None:
        """Schedule the deletion of a new key that failed, since keys cost money. If that fails too, `error` says so."""
        try:
            lifecycle.discard_key(self._client().connection, _read_deadline(), arn)
        except BackendError as failure:
            if isinstance(error, BackendError):
                step = f"Schedule the deletion of {arn} in KMS ({failure.detail.rstrip('.')}); doctor lists it."
                error.next_step = f"{error.next_step} {step}".lstrip()


def _find_row(alg: Algorithm) -> keys.AlgorithmRow:
    try:
        return keys.ROWS[alg.name]
    except KeyError:
        raise UnsupportedAlgorithm(f"KMS does not sign with {alg.name}.") from None


def _find_spec(alg: Algorithm, rsa_bits: int | None) -> str:
    if alg.is_rsa:
        rsa_bits = rsa_bits or DEFAULT_RSA_BITS
    elif rsa_bits is not None:
        raise BackendRefused(f"{alg.name} keys have no RSA modulus.")
    spec = _find_row(alg).specs.get(rsa_bits)
    if spec is None:
        raise UnsupportedAlgorithm(f"{alg.name} keys have 2048, 3072 or 4096 bits, not {rsa_bits}.")
    return spec


def _check_adoptable(metadata: Mapping[str, Any]) -> None:
    """Raise UnsupportedAlgorithm or BackendRefused for a key that cannot be adopted in any case."""
    spec, usage, state = (metadata.get(name) for name in ("KeySpec", "KeyUsage", "KeyState"))
    if spec not in keys.SPECS:
        raise UnsupportedAlgorithm(f"The key has KeySpec {spec}, which no JOSE algorithm uses.")
    if usage != "SIGN_VERIFY":
        raise BackendRefused(
            f"The key has KeyUsage {usage}; only SIGN_VERIFY keys sign.", next_step="Name a signing key."
        )
    if state != "Enabled":
        step = _STATE_STEPS.get(str(state), "Wait until KMS shows it as Enabled, or name another key.")
        raise BackendRefused(f"The key is in state {state}.", next_step=step)


_STATE_STEPS: Final = {
    "Disabled": "Enable it in KMS first (EnableKey).",
    "PendingDeletion": "Cancel its deletion in KMS (CancelKeyDeletion) and enable it (EnableKey).",
    "PendingReplicaDeletion": "Cancel its deletion in KMS (CancelKeyDeletion) and enable it (EnableKey).",
    "PendingImport": "Import its key material in KMS first, or name another key.",
}


def _read_deadline() -> float:
    return time.monotonic() + _READ_TIME


def _mutation_deadline() -> float:
    return time.monotonic() + _MUTATION_TIME
