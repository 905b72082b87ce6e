"""Adopting a key pair that a module holds already: looking at it before anything is written, then writing a version.

`examine` asks the module and writes nothing, so it runs outside every transaction; what it found is checked against
the registry again inside. Nobody hands over a private key: it is in the module, or it is not adopted.
"""

from __future__ import annotations

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
from kms_jwks.model import Key, KeySet, KeyVersion, Origin, VersionState, new_id
from kms_jwks.store import ReadTx, WriteTx

GIVEN: Final = "its public key was given to us, not read from the module"
"""The weakness of a key whose module does not hold the public half."""
_LOOK: Final = "See how the key is called in its module, and whether it is in this backend's."
_TRIAL: Final = b"\0kms-jwks: a trial signature\0"
"""Begins every input of a trial signature: no JWS signing input holds a zero byte, so no token can come of it."""
_TRIAL_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A key pair that may be adopted: it was found, fits, and has signed."""

    alg: Algorithm
    backend: str
    ref: KeyRef
    public_jwk: Mapping[str, str]
    kid: str
    rsa_bits: int | None
    weaknesses: tuple[str, ...]
    evidence: Mapping[str, object]


def examine(
    backends: Backends, backend_name: str, alg_name: str, wanted: wire.Adopt, rsa_bits: int | None = None
) -> Candidate:
    """Find the key pair, hold it against `alg` and promise 1, and have it sign something that is nobody's.

    Raises AdoptionRefused with what would have to be accepted, InvalidJwk, InvalidField, BackendError.
    """
    alg = ALGORITHMS.get(alg_name)
    if alg is None:
        raise errors.UnsupportedAlgorithmRequested(
            f"The algorithm is none of {', '.join(sorted(ALGORITHMS))}.", fields={"algorithms": sorted(ALGORITHMS)}
        )

    def look(backend: Backend) -> Candidate:
        return _examined(backend_name, backend, alg, wanted, rsa_bits)

    return backends.ask(backend_name, "adopting a key", look)


def _examined(
    backend_name: str, backend: Backend, alg: Algorithm, wanted: wire.Adopt, rsa_bits: int | None
) -> Candidate:
    found, is_given = _found(backend, alg, wanted)
    jwk = _fitting(alg, found, rsa_bits)
    evidence = backend.attributes(found.ref)
    weaknesses = (*evidence.weaknesses, *((GIVEN,) if is_given else ()))
    if weaknesses and not wanted.accept:
        raise errors.AdoptionRefused(
            f"By what the module says of the key, {', '.join(weaknesses)}.", fields={"weaknesses": list(weaknesses)}
        )
    _try(backend, alg, found.ref, jwk)
    return Candidate(
        alg=alg,
        backend=backend_name,
        ref=found.ref,
        public_jwk=jwk,
        kid=jose.thumbprint(jwk) if wanted.kid is UNSET else _printable(wanted.kid),
        rsa_bits=_modulus_bits(jwk) if alg.is_rsa else None,
        weaknesses=weaknesses,
        evidence=evidence.as_dict(),
    )


def add_adopted(tx: WriteTx, key: Key, candidate: Candidate) -> KeyVersion:
    """Write the candidate as the next version of `key`, to be published by `publish`. Raises KeyTaken, KidTaken."""
    _require_new(tx, candidate)
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
        weaknesses=candidate.weaknesses,
    )
    tx.add(version)
    return version


def publish(tx: WriteTx, key_set: KeySet, candidates: Iterable[Candidate]) -> None:
    """Publish what was adopted, as any version whose pair is there. Raises LimitReached."""
    for candidate in candidates:
        document_limits.require_room(tx, key_set, candidate.alg.name)
    transitions.publish_ready(tx, key_set)
    document_limits.require_small_document(tx, key_set)


def _require_new(tx: ReadTx, candidate: Candidate) -> None:
    """Raise KeyTaken where a version, of whatever key, state and kid, is or was this key pair.

    By the public key first: a module may show one pair under several names, and a copy is the same key. An external
    key may be the same: its kid stays its own, so the version needs another.
    """
    ref = candidate.ref.as_dict()
    for version in tx.versions():
        same_key = version.public_jwk is not None and dict(version.public_jwk) == dict(candidate.public_jwk)
        if same_key or (version.backend == candidate.backend and version.ref == ref):
            raise errors.KeyTaken(
                f"The key pair is a key version already, with kid {version.kid}.", fields={"kid": version.kid}
            )
    for external in tx.external_keys():
        if external.kid == candidate.kid:
            raise errors.KidTaken(
                "The kid is that of an external key, and a kid stays with what it was first given to.",
                next_step="Adopt the key under another kid; its tokens verify with the external key until that is "
                "removed.",
            )


def _found(backend: Backend, alg: Algorithm, wanted: wire.Adopt) -> tuple[GeneratedKey, bool]:
    """The pair, and whether its public half is the one that was given.

    What the backend refuses here is the caller's locator, not the backend's state: that was asked for before.
    """
    given = None if wanted.public_key is UNSET else _public_jwk(wanted.public_key, alg)
    backend.ping()
    try:
        try:
            found = backend.adopt(wanted.locator)
        except errors.BackendRefused:
            if given is None:
                raise
            return backend.adopt(wanted.locator, given), True
    except (errors.BackendRefused, errors.BackendKeyNotFound, errors.UnsupportedAlgorithm) as error:
        step = _LOOK if isinstance(error, errors.BackendKeyNotFound) else error.next_step
        raise errors.AdoptionRefused(error.detail, next_step=step, fields={"weaknesses": []}) from None
    if given is not None and dict(found.public_jwk) != given:
        raise errors.InvalidField(
            "public_key: it is not the one that the module holds", fields={"field": "adopt.public_key"}
        )
    return found, False


def _public_jwk(given: str | dict[str, object], alg: Algorithm) -> dict[str, str]:
    return jose.check_public_jwk(dict(jose.jwk_from_pem(given)) if isinstance(given, str) else given, alg)


def _fitting(alg: Algorithm, found: GeneratedKey, rsa_bits: int | None) -> dict[str, str]:
    """The public key, when it is a sound one for `alg`. Raises AdoptionRefused: no `accept` helps."""
    step = "Name the algorithm that the key is made for, or another key."
    try:
        jwk = jose.check_public_jwk(found.public_jwk, alg)
    except errors.InvalidJwk as error:
        raise errors.AdoptionRefused(error.detail, next_step=step, fields={"weaknesses": []}) from None
    if alg.is_rsa and _modulus_bits(jwk) not in (alg.rsa_bits if rsa_bits is None else (rsa_bits,)):
        raise errors.AdoptionRefused(
            f"The key has {_modulus_bits(jwk)} bits, which does not fit {alg.name} here.",
            next_step=step,
            fields={"weaknesses": []},
        )
    return jwk


def _try(backend: Backend, alg: Algorithm, ref: KeyRef, jwk: Mapping[str, str]) -> None:
    """A signature over something that can be no token, verified: the two halves are one pair, and it signs."""
    data = _TRIAL + os.urandom(32)
    try:
        jose.verify_signature(alg, jwk, data, backend.sign(ref, alg, Message(data), time.monotonic() + _TRIAL_SECONDS))
    except errors.TokenSignatureInvalid:
        raise errors.AdoptionRefused(
            "What the private key signed does not verify with the public key.",
            next_step="See which public key belongs to it; two pairs may share a label or a CKA_ID.",
            fields={"weaknesses": []},
        ) from None


def _modulus_bits(jwk: Mapping[str, str]) -> int:
    return int.from_bytes(jose.b64u_decode(jwk["n"]), "big").bit_length()


def _printable(kid: str) -> str:
    if not kid.isprintable():
        raise errors.InvalidField("kid: it holds characters that cannot be printed", fields={"field": "adopt.kid"})
    if kid.isascii() and kid.isdigit() and len(kid) < 10:
        # A version is named by its number or its kid: in an emergency the wrong one would be revoked.
        raise errors.InvalidField("kid: it would pass for the number of a version", fields={"field": "adopt.kid"})
    return kid
