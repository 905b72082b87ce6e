"""Making key pairs, reading back that they are non-extractable and sign-only (promise 1), and destroying them.

Every function that takes a session is called while the module's lock is held; those that make or destroy, while the
token's mutation lock is held too: one thread of one process at a time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, Object, ObjectClass, PKCS11Error, Session

from kms_jwks import jose
from kms_jwks.backends.base import Evidence, GeneratedKey, KeyRef, Message
from kms_jwks.backends.pkcs11.error_map import ConnectionLost, InvalidAnswer, describe_error, meaning_of, unavailable
from kms_jwks.backends.pkcs11.mechanisms import CURVES, PARAMETER_SETS, ROWS, Row, matches, modulus_bits
from kms_jwks.backends.pkcs11.objects import (
    find,
    find_private_key,
    find_surely,
    read_jwk,
    read_optional,
    sign,
    template_of,
)
from kms_jwks.errors import (
    BackendError,
    BackendKeyNotFound,
    BackendRefused,
    KeyExists,
    TokenSignatureInvalid,
    UnsupportedAlgorithm,
)

if TYPE_CHECKING:
    from kms_jwks.algorithms import Algorithm
    from kms_jwks.backends.pkcs11.connection import PooledSession
    from kms_jwks.backends.pkcs11.mechanisms import Template

_ID_BYTES: Final = 16
_HALVES: Final = (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)

_PRIVATE: Final[Mapping[Attribute, Any]] = MappingProxyType(
    {
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.SIGN: True,
        Attribute.DECRYPT: False,
        Attribute.SIGN_RECOVER: False,
        Attribute.UNWRAP: False,
        Attribute.DERIVE: False,
    }
)
"""Template of a new private key: it can sign and nothing else."""
_PUBLIC: Final[Mapping[Attribute, Any]] = MappingProxyType(
    {
        Attribute.TOKEN: True,
        Attribute.PRIVATE: False,
        Attribute.VERIFY: True,
        Attribute.ENCRYPT: False,
        Attribute.WRAP: False,
    }
)
_FROZEN: Final[Mapping[Attribute, Any]] = MappingProxyType({Attribute.MODIFIABLE: False, Attribute.COPYABLE: False})
"""Added where the module takes it: otherwise any holder of the PIN could give a key, or a copy of it, further uses."""

# A module that does not know a use cannot put the key to it, so an absent attribute counts as False.
_OTHER_USES: Final = (
    Attribute.DECRYPT,
    Attribute.UNWRAP,
    Attribute.DERIVE,
    Attribute.SIGN_RECOVER,
    Attribute.ENCRYPT,
    Attribute.WRAP,
)
_EVIDENCE: Final = (
    Attribute.SENSITIVE,
    Attribute.ALWAYS_SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.NEVER_EXTRACTABLE,
    Attribute.LOCAL,
    Attribute.KEY_GEN_MECHANISM,
    Attribute.TOKEN,
    Attribute.PRIVATE,
    Attribute.MODIFIABLE,
    Attribute.COPYABLE,
    Attribute.DESTROYABLE,
    Attribute.ALLOWED_MECHANISMS,
    Attribute.ALWAYS_AUTHENTICATE,
    Attribute.WRAP_WITH_TRUSTED,
    Attribute.SIGN,
    *_OTHER_USES,
)


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """A key pair to make."""

    label: str
    alg: Algorithm
    rsa_bits: int | None


# --- making -----------------------------------------------------------------------------------------------------------


def generate(pooled: PooledSession, request: KeyRequest, unfinished: list[bytes]) -> GeneratedKey:
    """Make a pair, read it back and sign with it once; where that fails, destroy what was made.

    `unfinished` holds the CKA_IDs of earlier attempts that are still to be destroyed. Raises PKCS11Error and
    ConnectionLost, after which it may be called again; KeyExists, UnsupportedAlgorithm, BackendRefused.
    """
    destroy_unfinished(pooled, unfinished)
    _check_label_free(pooled, request.label)
    try:
        made = _generate(pooled, request, unfinished)
        unfinished.clear()
        return made
    except BaseException as error:
        try:
            # In a new session: an operation in the one that failed may be in the way.
            pooled.replace()
            destroy_unfinished(pooled, unfinished)
        except (PKCS11Error, ConnectionLost, InvalidAnswer) as failure:
            if isinstance(error, BackendError):
                raise BackendRefused(
                    f"{error.detail} Destroying what was made of it failed too: {describe_error(failure)}.",
                    next_step=f"Remove the key pair labelled {request.label!r}; `kms-jwks doctor` lists it.",
                ) from error
            # The next attempt, if there is one, begins with destroying what is left.
        raise


def _check_label_free(pooled: PooledSession, label: str) -> None:
    """Raise KeyExists where one half of any pair has the label."""
    for half in _HALVES:
        if find(pooled, {Attribute.CLASS: half, Attribute.LABEL: label}):
            raise KeyExists(f"The token with serial {pooled.connection.serial} holds a key labelled {label!r}.")


def _generate(pooled: PooledSession, request: KeyRequest, unfinished: list[bytes]) -> GeneratedKey:
    """Make a pair and judge it. The CKA_ID is added to `unfinished` before an object with it exists."""
    connection, session, alg = pooled.connection, pooled.session, request.alg
    connection.check()
    row = ROWS.get(alg.name)
    if row is None or row.generate not in connection.mechanisms:
        raise UnsupportedAlgorithm(f"The module makes no keys for {alg.name}.")
    id_ = os.urandom(_ID_BYTES)
    unfinished.append(id_)
    _generate_pair(session, request, id_, row)
    ref = KeyRef.of(label=request.label, id=id_.hex(), serial=connection.serial)
    try:
        private = find_private_key(pooled, ref)
    except BackendKeyNotFound as error:
        raise unavailable("The module does not show the key that it said it made.") from error
    jwk = read_jwk(pooled, ref, private)
    if not matches(alg, jwk) or (request.rsa_bits and modulus_bits(jwk) != request.rsa_bits):
        raise BackendRefused(f"The module made another key than one for {alg.name}.")
    weaknesses = read_evidence(private).weaknesses
    if weaknesses:
        raise BackendRefused(
            f"The module's own attributes of the new key say that {', '.join(weaknesses)}.",
            next_step="Look at the token's policy: keys must be made in it, non-extractable, for signing alone.",
        )
    # SoftHSM does not sync its store. A pair that was read back and signs is at least found by every later search.
    trial = os.urandom(32)
    try:
        jose.verify_signature(alg, jwk, trial, sign(pooled, ref, alg, Message(trial)))
    except TokenSignatureInvalid as error:
        raise BackendRefused("The new key's public half does not verify what it signs.") from error
    finally:
        pooled.handles.clear()  # other sessions sign with the key, this one does not
    return GeneratedKey(ref, jwk)


def _generate_pair(session: Session, request: KeyRequest, id_: bytes, row: Row) -> None:
    """C_GenerateKeyPair with the strictest template that the module takes."""
    alg = request.alg
    if alg.is_rsa:
        key_type = KeyType.RSA
        domains: list[Template] = [{}]
    elif alg.is_post_quantum:
        key_type = KeyType.ML_DSA
        domains = [{Attribute.PARAMETER_SET: number} for number, name in PARAMETER_SETS.items() if name == alg.name]
    else:
        curve = CURVES[alg.crv or ""]
        key_type = curve.key_type
        domains = [{Attribute.EC_PARAMS: parameters} for parameters in curve.parameters]
    refusal: PKCS11Error | None = None
    for domain in domains:
        for private, public in _restrictions(row.signing):
            try:
                session.generate_keypair(
                    key_type,
                    request.rsa_bits,
                    id=id_,
                    label=request.label,
                    store=True,
                    capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
                    mechanism=row.generate,
                    public_template={**_PUBLIC, **public, **domain},
                    private_template={**_PRIVATE, **private},
                )
                return
            except PKCS11Error as error:
                if not meaning_of(error).is_final:
                    raise
                refusal = error
    assert refusal is not None
    raise refusal


def _restrictions(mechanisms: Collection[Mechanism]) -> Iterator[tuple[Template, Template]]:
    """What to add to the templates of a private and a public key, strictest first; the last pair is empty.

    `mechanisms` are all that the key is to sign with (CKA_ALLOWED_MECHANISMS).
    """
    allowed: Template = {Attribute.ALLOWED_MECHANISMS: mechanisms}
    frozen = dict(_FROZEN)
    yield {**frozen, **allowed}, frozen
    yield frozen, frozen
    yield allowed, {}
    yield {}, {}


# --- evidence ---------------------------------------------------------------------------------------------------------


def read_evidence(private: Object) -> Evidence:
    """Read a private key's attributes back and judge them. Raises PKCS11Error."""
    read = {attribute: read_optional(private, attribute) for attribute in _EVIDENCE}
    return Evidence(
        attributes={f"CKA_{attribute.name}": _printable(value) for attribute, value in read.items()},
        generated_in_module=read[Attribute.LOCAL] is True,
        non_extractable=(
            read[Attribute.SENSITIVE] is True
            and read[Attribute.ALWAYS_SENSITIVE] is True
            and read[Attribute.EXTRACTABLE] is False
            and read[Attribute.NEVER_EXTRACTABLE] is True
        ),
        sign_only=read[Attribute.SIGN] is True and not any(read[use] for use in _OTHER_USES),
    )


def _printable(value: Any) -> Any:
    """An attribute as evidence keeps it: mechanisms by their names, an empty list of them as no restriction."""
    if not isinstance(value, tuple):
        return value
    return ", ".join(_mechanism_name(number) for number in sorted(value)) or None


def _mechanism_name(number: int) -> str:
    try:
        return f"CKM_{Mechanism(number).name}"
    except ValueError:
        return f"{number:#x}"


# --- destroying -------------------------------------------------------------------------------------------------------


def destroy(pooled: PooledSession, ref: KeyRef) -> None:
    """Destroy a pair, or find that it is gone. Raises BackendRefused where the reference matches several pairs."""
    with suppress(BackendKeyNotFound):
        find_private_key(pooled, ref)
    pooled.handles.pop(ref, None)
    # A pair without a CKA_ID is found by its label, which the public key of another pair may have too.
    _destroy_all(pooled, {Attribute.ID: b"", **template_of(ref, ObjectClass.PRIVATE_KEY)})


def destroy_unfinished(pooled: PooledSession, unfinished: list[bytes]) -> None:
    """Destroy the objects with these CKA_IDs, and remove each ID from the list when they are gone.

    Raises PKCS11Error, ConnectionLost, InvalidAnswer.
    """
    while unfinished:
        _destroy_all(pooled, {Attribute.ID: unfinished[-1]})
        unfinished.pop()


def _destroy_all(pooled: PooledSession, template: Template) -> None:
    """Destroy both halves of all pairs that match, and search again for them.

    Raises PKCS11Error, ConnectionLost, InvalidAnswer.
    """
    for half in _HALVES:
        # An absent object counts as destroyed, so its absence has to be certain.
        for key in find_surely(pooled, {**template, Attribute.CLASS: half}):
            with suppress(pkcs11.ObjectHandleInvalid):
                key.destroy()
    for half in _HALVES:
        left = find(pooled, {**template, Attribute.CLASS: half})
        if left:
            raise InvalidAnswer(f"that it destroyed {len(left)} object(s) which it still shows")
    if not pooled.connection.is_healthy():
        raise ConnectionLost
