"""Adoption of a key pair that a module holds already: the pair is examined, then written as a version.

`examine` asks the module and writes nothing, so it runs outside every transaction; its result is checked against the
registry inside one. The private key never leaves the module: a key that is not in the module cannot be adopted.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from msgspec import UNSET

from kms_jwks import errors, jose, wire
from kms_jwks.algorithms import ALGORITHMS, Algorithm
from kms_jwks.backends.base import Backend, GeneratedKey, KeyRef, Message
from kms_jwks.backends.calling import Backends
from kms_jwks.custodian import document_limits, transitions
from kms_jwks.model import ExternalKey, Id, Key, KeySet, KeyVersion, Origin, VersionState, new_id
from kms_jwks.service.control import check_kid, looks_like_number, take_kid
from kms_jwks.store import ReadTx, WriteTx

PUBLIC_KEY_GIVEN: Final = "its public key was given to us, not read from the module"
"""The weakness of a key whose module does not hold the public half."""
_ANOTHER_KEY: Final = "No acceptance helps here: adopt another key, or make a new one and rotate to it."
_FIND_KEY: Final = "Check the label or id of the key in its module, and that this backend uses that module."
_TRIAL: Final = b"\0kms-jwks: a trial signature\0"
"""Starts the input of every trial signature. A JWS signing input holds no zero byte, so the signature fits no token."""
_TRIAL_SECONDS: Final = 5.0
"""Seconds a module may take for a trial signature."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A key pair that may be adopted: it was found, fits its algorithm, and made a trial signature."""

    alg: Algorithm
    backend: str
    ref: KeyRef
    public_jwk: Mapping[str, str]
    kid: str
    rsa_bits: int | None
    weaknesses: tuple[str, ...]
    evidence: Mapping[str, object]
    accept: bool = False
    """Whether the request accepts weaknesses, those included that only the registry shows."""


def examine(
    backends: Backends, backend_name: str, alg: Algorithm, wanted: wire.Adopt, rsa_bits: int | None = None
) -> Candidate:
    """Find the key pair, check it against `alg` and promise 1, and have it make a trial signature.

    Raises AdoptionRefused with the weaknesses that the request would have to accept, InvalidJwk, InvalidField,
    BackendError.
    """
    return backends.ask(
        backend_name, "adopting a key", lambda backend: _examine(backend_name, backend, alg, wanted, rsa_bits)
    )


def _examine(
    backend_name: str, backend: Backend, alg: Algorithm, wanted: wire.Adopt, rsa_bits: int | None
) -> Candidate:
    kid = _wanted_kid(wanted)
    found, is_given = _find_pair(backend, alg, wanted)
    jwk = _check_public_key(alg, found, rsa_bits)
    evidence = backend.attributes(found.ref)
    weaknesses = (*evidence.weaknesses, *((PUBLIC_KEY_GIVEN,) if is_given else ()))
    if weaknesses and not wanted.accept:
        raise errors.AdoptionRefused(
            f"By the module's attributes of the key, {', '.join(weaknesses)}.", fields={"weaknesses": list(weaknesses)}
        )
    _make_trial_signature(backend, alg, found.ref, jwk)
    return Candidate(
        alg=alg,
        backend=backend_name,
        ref=found.ref,
        public_jwk=jwk,
        kid=jose.thumbprint(jwk) if kid is None else kid,
        rsa_bits=_modulus_bits(jwk) if alg.is_rsa else None,
        weaknesses=weaknesses,
        evidence=evidence.as_dict(),
        accept=wanted.accept,
    )


def add_adopted(tx: WriteTx, key: Key, candidate: Candidate, *, who: str | None = None) -> KeyVersion:
    """Write the candidate as the next version of `key`, to be published by `publish`.

    It takes the place of an external key that the set publishes under the same kid; `who` is the client, for that
    key's record. Raises KeyTaken, KidTaken, AdoptionRefused.
    """
    _require_free(tx, key.key_set_id, candidate)
    weaknesses = (*candidate.weaknesses, *_find_sharers(tx, key.key_set_id, candidate))
    if weaknesses and not candidate.accept:
        raise errors.AdoptionRefused(
            f"About this key pair: {'; '.join(weaknesses)}.", fields={"weaknesses": [*weaknesses]}
        )
    _replace_external(tx, key.key_set_id, candidate, who)
    version = KeyVersion(
        id=new_id(),
        key_set_id=key.key_set_id,
        key_id=key.id,
        number=max((v.number for v in tx.versions(key_id=key.id)), default=0) + 1,
        alg=candidate.alg.name,
        rsa_bits=candidate.rsa_bits,
        backend=candidate.backend,
        state=VersionState.CREATING,
        created_at=tx.now(),
        kid=candidate.kid,
        ref=candidate.ref.as_dict(),
        public_jwk=dict(candidate.public_jwk),
        evidence=candidate.evidence,
        origin=Origin.ADOPTED,
        weaknesses=weaknesses,
    )
    tx.add(version)
    return version


def publish(tx: WriteTx, key_set: KeySet, candidates: Iterable[Candidate]) -> None:
    """Publish adopted versions, as any version whose pair is made. Raises LimitReached."""
    for candidate in candidates:
        document_limits.require_room(tx, key_set, candidate.alg.name)
    transitions.publish_ready(tx, key_set)
    document_limits.require_small_document(tx, key_set)


def _require_free(tx: ReadTx, key_set_id: Id, candidate: Candidate) -> None:
    """Raise KeyTaken where the pair may not become a version of this key set, under any kid.

    Versions are compared by public key first: a module may show one pair under several names, and a copy of a pair is
    the same key. A pair is one version of a set for ever. Another set may adopt it too, unless it was made here, was
    revoked, or is going to be destroyed.
    """
    require_not_revoked(tx, candidate.public_jwk)
    ref = candidate.ref.as_dict()
    for version in tx.versions():
        if version.key_set_id != key_set_id and _was_given_up(version):
            continue
        same_key = version.public_jwk is not None and dict(version.public_jwk) == dict(candidate.public_jwk)
        same_place = version.backend == candidate.backend and version.ref == ref
        if not same_key and not same_place:
            continue
        fields = {"kid": version.kid}
        if not same_key or version.key_set_id == key_set_id or version.origin is Origin.GENERATED:
            raise errors.KeyTaken(f"The key pair is or was a key version, with kid {version.kid}.", fields=fields)
        if version.destroy_at is not None or version.state is VersionState.DESTROYED:
            raise errors.KeyTaken(
                f"The key pair is destroyed, or is to be: it is a version of another key set, with kid {version.kid}.",
                next_step="Cancel that destruction first (kms-jwks version cancel-destroy), or make a new key.",
                fields=fields,
            )


def require_not_revoked(tx: ReadTx, public_jwk: Mapping[str, str]) -> None:
    """Raise KeyTaken for a public key that was revoked, in any key set: no verifier may trust it again."""
    versions = tx.versions(public_jwk=public_jwk)
    externals = tx.external_keys(include_removed=True, public_jwk=public_jwk)
    holders: list[KeyVersion | ExternalKey] = [*versions, *externals]
    for holder in holders:
        if holder.revoked_at is not None:
            kind = "a revoked version" if isinstance(holder, KeyVersion) else "a revoked external key"
            raise errors.KeyTaken(
                f"The public key is that of {kind}, with kid {holder.kid}.",
                next_step="Use another key: this one may be in the wrong hands.",
                fields={"kid": holder.kid},
            )


def _find_sharers(tx: ReadTx, key_set_id: Id, candidate: Candidate) -> list[str]:
    """What else has the candidate's public key, in words: weaknesses that have to be accepted.

    Two issuers with one key: each one's signer makes tokens that the other's verifiers accept, if they look at the
    signature alone. Two kids of one key in a set: tokens go on verifying under the other kid.
    """
    found = [
        f"key set {_set_name(tx, version.key_set_id)!r} has the same key, with kid {version.kid}"
        for version in tx.versions(public_jwk=candidate.public_jwk)
        if not _was_given_up(version)
    ]
    for external in tx.external_keys(public_jwk=candidate.public_jwk):
        if external.key_set_id != key_set_id:
            name = _set_name(tx, external.key_set_id)
            found.append(f"key set {name!r} publishes the same key as its external key {external.kid}")
        elif external.kid != candidate.kid:
            found.append(
                f"the key set publishes the same key as its external key {external.kid} (adopted with that kid, the "
                "version takes its place)"
            )
    return found


def _was_given_up(version: KeyVersion) -> bool:
    """Whether an adopted pair was never published, because its key was deleted or retired: the module still has it."""
    return version.origin is Origin.ADOPTED and version.failure is not None


def _replace_external(tx: WriteTx, key_set_id: Id, candidate: Candidate, who: str | None) -> None:
    """Let the version take the place of the external key with its kid, so that verifiers find the kid all the time."""
    external = tx.external_key(key_set_id, candidate.kid)
    if external is None:
        return
    if dict(external.public_jwk) != dict(candidate.public_jwk):
        raise errors.KidTaken("The kid belongs to an external key, which is another key.")
    if external.alg != candidate.alg.name:
        raise errors.KidTaken(
            f"The kid belongs to an external key with the same public key and alg {external.alg}, "
            f"not {candidate.alg.name}: verifiers would refuse its tokens.",
            next_step=f"Adopt it with alg {external.alg}, or under another kid.",
        )
    transitions.withdraw_external(tx, external, "adopted", who=who)


def _set_name(tx: ReadTx, key_set_id: Id) -> str:
    """The name of a key set."""
    found = tx.key_set_by_id(key_set_id)
    assert found is not None
    return found.name


def _find_pair(backend: Backend, alg: Algorithm, wanted: wire.Adopt) -> tuple[GeneratedKey, bool]:
    """The pair, and whether its public half was taken from the request because the module does not hold it.

    The backend's state is checked first, so a later refusal is about the caller's locator.
    """
    given = None if wanted.public_key is UNSET else _read_public_jwk(wanted.public_key, alg)
    backend.ping()
    try:
        try:
            found = backend.adopt(wanted.locator)
        except errors.BackendRefused:
            if given is None:
                raise
            return backend.adopt(wanted.locator, given), True
    except (errors.BackendRefused, errors.BackendKeyNotFound, errors.UnsupportedAlgorithm) as error:
        raise _refused(error) from None
    if given is not None and dict(found.public_jwk) != given:
        raise errors.InvalidField(
            "public_key: it is not the one that the module holds",
            next_step="Leave it out: the module holds the public half. Check the locator where you expected this key.",
            fields={"field": "adopt.public_key"},
        )
    return found, False


def _read_public_jwk(given: str | dict[str, object], alg: Algorithm) -> dict[str, str]:
    return jose.check_public_jwk(dict(jose.jwk_from_pem(given)) if isinstance(given, str) else given, alg)


def _check_public_key(alg: Algorithm, found: GeneratedKey, rsa_bits: int | None) -> dict[str, str]:
    """The public key, if it is a valid one for `alg`. Raises AdoptionRefused, which no `accept` overrides."""
    try:
        jwk = jose.check_public_jwk(found.public_jwk, alg)
    except errors.InvalidJwk as error:
        step = _name_another_algorithm(found.public_jwk)
        raise errors.AdoptionRefused(error.detail, next_step=step, fields={"weaknesses": []}) from None
    allowed = alg.rsa_bits if rsa_bits is None else (rsa_bits,)
    if alg.is_rsa and _modulus_bits(jwk) not in allowed:
        bits = _modulus_bits(jwk)
        fits = bits in alg.rsa_bits
        raise errors.AdoptionRefused(
            f"The modulus has {bits} bits; allowed are {', '.join(map(str, allowed))}.",
            next_step=f"Leave rsa_bits out, or give {bits}." if fits else _ANOTHER_KEY,
            fields={"weaknesses": []},
        )
    return jwk


def _name_another_algorithm(jwk: Mapping[str, str]) -> str:
    """The next step for a key that does not fit the algorithm of the request: those that it fits, if there are any."""
    fitting = []
    for alg in ALGORITHMS.values():
        with contextlib.suppress(errors.InvalidJwk):
            jose.check_public_jwk(jwk, alg)
            if not alg.is_rsa or _modulus_bits(jwk) in alg.rsa_bits:
                fitting.append(alg.name)
    if not fitting:
        return _ANOTHER_KEY
    return f"Name the algorithm that the key is made for ({', '.join(fitting)}), or another key."


def _refused(error: errors.BackendError) -> errors.AdoptionRefused:
    """A backend's refusal as that of the adoption, with its own next step where that is about this key."""
    if isinstance(error, errors.BackendKeyNotFound):
        step = _FIND_KEY
    else:
        # The classes' own next steps are about keys that the service made.
        step = _ANOTHER_KEY if error.next_step == type(error).next_step else error.next_step
    return errors.AdoptionRefused(error.detail, next_step=step, fields={"weaknesses": []})


def _make_trial_signature(backend: Backend, alg: Algorithm, ref: KeyRef, jwk: Mapping[str, str]) -> None:
    """Sign an input that fits no token, and verify it: the private key signs, and the public key belongs to it."""
    data = _TRIAL + os.urandom(32)
    try:
        jose.verify_signature(alg, jwk, data, backend.sign(ref, alg, Message(data), time.monotonic() + _TRIAL_SECONDS))
    except errors.TokenSignatureInvalid:
        raise errors.AdoptionRefused(
            "What the private key signed does not verify with the public key.",
            next_step="Check which public key belongs to it; two pairs may share a label or a CKA_ID.",
            fields={"weaknesses": []},
        ) from None
    except (errors.BackendRefused, errors.UnsupportedAlgorithm, errors.BackendKeyNotFound) as error:
        raise _refused(error) from None


def _modulus_bits(jwk: Mapping[str, str]) -> int:
    return int.from_bytes(jose.b64u_decode(jwk["n"]), "big").bit_length()


def _wanted_kid(wanted: wire.Adopt) -> str | None:
    """The kid that the request gives, itself or in the JWK of the public key; None for the computed one."""
    own = wanted.public_key.get("kid") if isinstance(wanted.public_key, dict) else None
    kid = take_kid(wanted.kid, own, "adopt.kid")
    if kid is None:
        return None
    check_kid(kid, "adopt.kid")
    if looks_like_number(kid):
        # A request names a version by its number or its kid: in an emergency it would revoke the wrong version.
        raise errors.InvalidField(
            "kid: it could be read as the number of a version",
            next_step="Adopt the pair without a kid, and publish its public key under this kid as an external key, for "
            "the tokens that carry it.",
            fields={"field": "adopt.kid"},
        )
    return kid
