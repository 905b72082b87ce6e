"""Key pairs in a SoftHSM token as other programs make them: python-pkcs11 as it comes, in a process of its own."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import pkcs11
from pkcs11 import Attribute, Mechanism, MechanismFlag
from pkcs11.util.ec import encode_named_curve_parameters

from kms_jwks.backends.pkcs11.connection import TolerantMapper
from tests.softhsm import SoftHsm

EC, RSA = pkcs11.KeyType.EC, pkcs11.KeyType.RSA
P256, P384, BRAINPOOL = (
    encode_named_curve_parameters(name) for name in ("secp256r1", "secp384r1", "1.3.36.3.3.2.8.1.1.7")
)
SIGN_ONLY = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
    Attribute.SIGN_RECOVER: False,
}
Pair: TypeAlias = tuple[str, bytes, Any, Any, dict[Attribute, Any]]
"""Label, CKA_ID, type, modulus bits or curve, and what is different from `SIGN_ONLY`."""


def theirs(hsm: SoftHsm) -> Any:
    """A session as any other program of the PIN's holder has it."""
    os.environ.update(hsm.environment)
    token: Any = pkcs11.lib(str(hsm.module)).get_token(token_label=hsm.label)
    return token.open(rw=True, user_pin=hsm.pin, attribute_mapper=TolerantMapper())


def make_pairs(hsm: SoftHsm, pairs: list[Pair]) -> None:
    """Make them."""
    session = theirs(hsm)
    for label, id_, kind, parameter, changes in pairs:
        session.generate_keypair(
            kind,
            parameter if kind is RSA else None,
            id=id_,
            label=label,
            store=True,
            capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
            mechanism=Mechanism.RSA_PKCS_KEY_PAIR_GEN if kind is RSA else Mechanism.EC_KEY_PAIR_GEN,
            public_template={Attribute.PRIVATE: False} | ({} if kind is RSA else {Attribute.EC_PARAMS: parameter}),
            private_template={**SIGN_ONLY, **changes},
        )
