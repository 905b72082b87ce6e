"""Adoption of a key pair that a module holds already: the pair is examined, then written as a version.

`examine` asks the module and writes nothing, so it runs outside every transaction; its result is checked against the
registry inside one. The private key never leaves the module: a key that is not in the module cannot be adopted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from msgspec import UNSET

from kms_jwks import errors, jose, wire
from kms_jwks.algorithms import Algorithm
from kms_jwks.backends.base import Backend, GeneratedKey, KeyRef, Message
from kms_jwks.backends.calling import Backends
from kms_jwks.custodian import document_limits, transitions
from kms_jwks.model import Key, KeySet, KeyVersion, Origin, VersionState, new_id
from kms_jwks.service.control import looks_like_number
from kms_jwks.store import ReadTx, WriteTx

PUBLIC_KEY_GIVEN: Final = "its public key was given to us, not read from the module"
"""The weakness of a key whose module does not hold the public half."""
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
        kid=jose.thumbprint(jwk) if wanted.kid is UNSET else _check_kid(wanted.kid),
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
    """Publish adopted versions, as any version whose pair is made. Raises LimitReached."""
    for candidate in candidates:
        document_limits.require_room(tx, key_set, candidate.alg.name)
    transitions.publish_ready(tx, key_set)
    document_limits.require_small_document(tx, key_set)


def _require_new(tx: ReadTx, candidate: Candidate) -> None:
    """Raise KeyTaken where a version of any key, in any state and under any kid, is or was this key pair.

    Versions are compared by public key first: a module may show one pair under several names, and a copy of a pair is
    the same key. An external key may be the same key, but its kid stays its own: raise KidTaken for the same kid.
    """
    ref = candidate.ref.as_dict()
    for version in tx.versions():
        same_key = version.public_jwk is not None and dict(version.public_jwk) == dict(candidate.public_jwk)
        if same_key or (version.backend == candidate.backend and version.ref == ref):
            raise errors.KeyTaken(
                f"The key pair is or was a key version, with kid {version.kid}.", fields={"kid": version.kid}
            )
    for external in tx.external_keys():
        if external.kid == candidate.kid:
            raise errors.KidTaken(
                "The kid belongs to an external key; a version needs a kid of its own.",
                next_step="Adopt the key under another kid. Tokens with the old kid verify with the external key until "
                "that is removed.",
            )


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
        step = _FIND_KEY if isinstance(error, errors.BackendKeyNotFound) else error.next_step
        raise errors.AdoptionRefused(error.detail, next_step=step, fields={"weaknesses": []}) from None
    if given is not None and dict(found.public_jwk) != given:
        raise errors.InvalidField(
            "public_key: it is not the one that the module holds", fields={"field": "adopt.public_key"}
        )
    return found, False


def _read_public_jwk(given: str | dict[str, object], alg: Algorithm) -> dict[str, str]:
    return jose.check_public_jwk(dict(jose.jwk_from_pem(given)) if isinstance(given, str) else given, alg)


def _check_public_key(alg: Algorithm, found: GeneratedKey, rsa_bits: int | None) -> dict[str, str]:
    """The public key, if it is a valid one for `alg`. Raises AdoptionRefused, which no `accept` overrides."""
    step = "Name the algorithm that the key is made for, or another key."
    try:
        jwk = jose.check_public_jwk(found.public_jwk, alg)
    except errors.InvalidJwk as error:
        raise errors.AdoptionRefused(error.detail, next_step=step, fields={"weaknesses": []}) from None
    allowed = alg.rsa_bits if rsa_bits is None else (rsa_bits,)
    if alg.is_rsa and _modulus_bits(jwk) not in allowed:
        raise errors.AdoptionRefused(
            f"The modulus has {_modulus_bits(jwk)} bits; allowed are {', '.join(map(str, allowed))}.",
            next_step=step,
            fields={"weaknesses": []},
        )
    return jwk


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


def _modulus_bits(jwk: Mapping[str, str]) -> int:
    return int.from_bytes(jose.b64u_decode(jwk["n"]), "big").bit_length()


def _check_kid(kid: str) -> str:
    if not kid.isprintable():
        raise errors.InvalidField("kid: it holds characters that cannot be printed", fields={"field": "adopt.kid"})
    if looks_like_number(kid):
        # A request names a version by its number or its kid: in an emergency it would revoke the wrong version.
        raise errors.InvalidField("kid: it could be read as the number of a version", fields={"field": "adopt.kid"})
    return kid
