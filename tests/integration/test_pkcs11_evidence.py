"""What somebody else's tool, OpenSC's pkcs11-tool, says about the keys we make."""

from __future__ import annotations

import re

import pytest

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import KeyRef
from kms_jwks.errors import BackendRefused
from tests.softhsm import SoftHsm, in_child, make_token

pytestmark = pytest.mark.softhsm

KINDS = {"RS256": 2048, "PS384": 3072, "ES256": None, "ES384": None, "ES512": None, "ES256K": None, "EdDSA": None}


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


@pytest.mark.parametrize("name", KINDS)
def test_pkcs11_tool_shows_a_key_that_signs_and_never_left(hsm: SoftHsm, refs: dict[str, KeyRef], name: str) -> None:
    shown = hsm.pkcs11_tool("--list-objects", "--type", "privkey", "--id", refs[name]["id"])
    facts = {key.strip(): value.strip() for key, value in re.findall(r"^  (\w+):\s+(.*)$", shown, re.MULTILINE)}
    assert facts["label"] == f"evidence-{name}", shown
    assert facts["ID"] == refs[name]["id"]
    assert re.split(r",\s*", facts["Usage"]) == ["sign"], shown
    assert facts["Access"] == "sensitive, always sensitive, never extractable, local", shown


@pytest.mark.parametrize("name", KINDS)
def test_pkcs11_tool_shows_a_public_key_that_verifies_only(hsm: SoftHsm, refs: dict[str, KeyRef], name: str) -> None:
    shown = hsm.pkcs11_tool("--list-objects", "--type", "pubkey", "--id", refs[name]["id"])
    assert re.search(r"^  Usage:\s+verify\s*$", shown, re.MULTILINE), shown


@pytest.mark.parametrize("name", KINDS)
def test_the_private_value_cannot_be_read(hsm: SoftHsm, refs: dict[str, KeyRef], name: str) -> None:
    out = hsm.directory / "stolen"
    shown = hsm.pkcs11_tool("--read-object", "--type", "privkey", "--id", refs[name]["id"], "--output-file", str(out))
    assert "CKR_ATTRIBUTE_SENSITIVE" in shown or "CKA_SENSITIVE" in shown or "error" in shown.lower(), shown
    assert not out.exists() or out.stat().st_size == 0


def read_private_values(hsm: SoftHsm, refs: dict[str, KeyRef]) -> None:
    import pkcs11
    from pkcs11 import Attribute, ObjectClass

    from kms_jwks.backends.pkcs11 import objects

    backend = hsm.backend()
    backend.ping()
    connection = backend._access()._connection
    assert connection is not None
    session = connection.open_session(rw=True)
    for name, ref in refs.items():
        (key,) = session.get_objects(objects.locator(ref, ObjectClass.PRIVATE_KEY))
        secret = Attribute.PRIVATE_EXPONENT if KINDS[name] else Attribute.VALUE
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
        assert backend.attributes(ref).holds


def test_with_the_pin_nobody_reads_changes_or_copies_a_key(hsm: SoftHsm, refs: dict[str, KeyRef]) -> None:
    in_child(read_private_values, hsm, refs)


def adopt_weak_key(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    with pytest.raises(BackendRefused, match="may do more than sign"):
        backend.adopt("weak")
    with pytest.raises(BackendRefused, match="extractable"):
        backend.adopt("id=0badcafe")
    with pytest.raises(BackendRefused, match="no label and no id="):
        backend.adopt("id=nothex")


def test_a_key_whose_evidence_is_weak_is_not_adopted(hsm: SoftHsm) -> None:
    made = hsm.pkcs11_tool(
        "--keypairgen", "--key-type", "rsa:2048", "--label", "weak", "--id", "0bad", "--usage-sign", "--usage-decrypt"
    )
    assert "Key pair generated" in made, made
    made = hsm.pkcs11_tool(
        "--keypairgen",
        "--key-type",
        "EC:prime256v1",
        "--label",
        "open",
        "--id",
        "0badcafe",
        "--usage-sign",
        "--extractable",
    )
    assert "Key pair generated" in made, made
    in_child(adopt_weak_key, hsm)
