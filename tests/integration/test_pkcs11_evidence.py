"""The attributes of new keys, as OpenSC's pkcs11-tool reads them."""

from __future__ import annotations

import os
import re

import pkcs11
import pytest
from pkcs11 import Attribute, ObjectClass

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import KeyRef
from tests.children import in_child
from tests.softhsm import SoftHsm, make_token

pytestmark = pytest.mark.softhsm

KINDS = {"RS256": 2048, "PS384": 3072, "ES256": None, "ES384": None, "ES512": None, "ES256K": None, "EdDSA": None}
RSA_SECRETS = [Attribute.PRIVATE_EXPONENT, Attribute.PRIME_1, Attribute.PRIME_2]


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    return make_token(tmp_path_factory.mktemp("softhsm"))


@pytest.fixture(scope="module")
def refs(hsm: SoftHsm) -> dict[str, KeyRef]:
    return in_child(make_keys, hsm)


def make_keys(hsm: SoftHsm) -> dict[str, KeyRef]:
    backend = hsm.backend()
    return {
        name: backend.generate(f"evidence-{name}", ALGORITHMS[name], rsa_bits=bits).ref for name, bits in KINDS.items()
    }


def listed(hsm: SoftHsm, kind: str) -> dict[str, dict[str, str]]:
    """What `pkcs11-tool --list-objects` says of each object of a kind, by CKA_ID."""
    shown = hsm.pkcs11_tool("--list-objects", "--type", kind)
    objects = []
    for line in shown.splitlines():
        if not line.startswith(" "):
            objects.append({"kind": line})
        elif fact := re.fullmatch(r"  (\w+):\s+(.*?)\s*", line):
            objects[-1][fact[1]] = fact[2]
    return {facts["ID"]: facts for facts in objects if "ID" in facts}


@pytest.mark.parametrize("name", KINDS)
def test_pkcs11_tool_shows_a_key_that_signs_and_never_left(hsm: SoftHsm, refs: dict[str, KeyRef], name: str) -> None:
    facts = listed(hsm, "privkey")[refs[name]["id"]]
    assert facts["label"] == f"evidence-{name}"
    assert facts["Usage"] == "sign"
    assert facts["Access"] == "sensitive, always sensitive, never extractable, local"


@pytest.mark.parametrize("name", KINDS)
def test_pkcs11_tool_shows_a_public_key_that_verifies_only(hsm: SoftHsm, refs: dict[str, KeyRef], name: str) -> None:
    facts = listed(hsm, "pubkey")[refs[name]["id"]]
    assert facts["label"] == f"evidence-{name}"
    assert facts["Usage"] == "verify"


def read_private_values(hsm: SoftHsm, refs: dict[str, KeyRef]) -> None:
    """With plain python-pkcs11 and the PIN, as an intruder on the node would."""
    os.environ.update(hsm.environment)
    session = pkcs11.lib(str(hsm.module)).get_token(token_label=hsm.label).open(rw=True, user_pin=hsm.pin)
    for name, ref in refs.items():
        key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, id=bytes.fromhex(ref["id"]))
        secrets = RSA_SECRETS if KINDS[name] else [Attribute.VALUE]
        for secret in secrets:
            with pytest.raises(pkcs11.AttributeSensitive):
                key[secret]
        for attribute, value in {
            Attribute.SENSITIVE: False,
            Attribute.EXTRACTABLE: True,
            Attribute.DECRYPT: True,
            Attribute.DERIVE: True,
            Attribute.UNWRAP: True,
        }.items():
            with pytest.raises(pkcs11.PKCS11Error):
                key[attribute] = value
        with pytest.raises(pkcs11.PKCS11Error):
            key.copy({Attribute.LABEL: "copy", Attribute.DERIVE: True})
    wrapping = session.generate_key(pkcs11.KeyType.AES, 256, mechanism=pkcs11.Mechanism.AES_KEY_GEN)
    for ref in refs.values():
        key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, id=bytes.fromhex(ref["id"]))
        with pytest.raises(pkcs11.PKCS11Error):
            wrapping.wrap_key(key, mechanism=pkcs11.Mechanism.AES_KEY_WRAP_PAD)  # type: ignore[attr-defined]


def test_with_the_pin_nobody_reads_changes_copies_or_wraps_a_key(hsm: SoftHsm, refs: dict[str, KeyRef]) -> None:
    in_child(read_private_values, hsm, refs)
