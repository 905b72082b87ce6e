"""Adoption of key pairs that other tools made in real tokens: by label, id and URI, strong ones and weak ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import Attribute, Mechanism, ObjectClass

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import GeneratedKey, Message
from kms_jwks.backends.pkcs11 import PinSource, Pkcs11Backend, generation
from kms_jwks.errors import BackendKeyNotFound, BackendRefused, BackendUnavailable, UnsupportedAlgorithm
from tests.children import in_child
from tests.contract.suite import verify
from tests.foreign_keys import BRAINPOOL, EC, P256, P384, RSA, SIGN_ONLY, Pair, make_pairs, theirs
from tests.softhsm import SoftHsm, make_token

pytestmark = pytest.mark.softhsm


PAIRS: list[Pair] = [
    ("good", b"\x0a", EC, P256, {}),
    ("good rsa", b"\x0b", RSA, 2048, {}),
    ("decrypts", b"\x0c", RSA, 2048, {Attribute.DECRYPT: True}),
    ("derives", b"\x0d", EC, P256, {Attribute.DERIVE: True}),
    ("open", b"\x0e", EC, P256, {Attribute.EXTRACTABLE: True}),
    ("hashes", b"\x0f", RSA, 2048, {Attribute.ALLOWED_MECHANISMS: [Mechanism.SHA256_RSA_PKCS_PSS]}),
    ("twins", b"\x10", EC, P256, {}),
    ("twins", b"\x11", EC, P256, {}),
    ("id=12", b"\x12", EC, P384, {}),
    ("pkcs11:é;%", b"\x13", EC, P256, {}),
    ("unknown curve", b"\x14", EC, BRAINPOOL, {}),
    ("half", b"\x15", EC, P256, {}),
    ("first of three", b"\x16", EC, P256, {}),
    ("second of three", b"\x16", EC, P256, {}),
    ("third of three", b"\x16", EC, P384, {}),
    ("clones", b"\x17", EC, P256, {}),
    ("clones", b"\x17", EC, P256, {}),
]


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    hsm = make_token(tmp_path_factory.mktemp("softhsm"))
    in_child(make_pairs, hsm, PAIRS)
    made = hsm.pkcs11_tool("--keypairgen", "--key-type", "EC:prime256v1", "--label", "of a tool", "--usage-sign")
    assert "Key pair generated" in made, made
    return hsm


def proves(backend: Pkcs11Backend, key: GeneratedKey, alg: str) -> None:
    message = Message(os.urandom(100))
    verify(ALGORITHMS[alg], dict(key.public_jwk), message, backend.sign(key.ref, ALGORITHMS[alg], message, soon()))


def soon() -> float:
    return time.monotonic() + 10


# --- by label, id and URI ---------------------------------------------------------------------------------------------


def adopt_good_ones(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    serial = backend.ping().facts["token_serial"]
    module = hsm.module
    by_label = backend.adopt("good")
    for locator in (
        "id=0a",
        "id=0A",
        "pkcs11:object=good",
        "pkcs11:id=%0a",
        "pkcs11:object=good;id=%0A;type=private",
        f"pkcs11:token={hsm.label};serial={serial};model=SoftHSM%20v2;manufacturer=SoftHSM%20project;object=good",
        "pkcs11:library-version=2.6;library-manufacturer=SoftHSM;object=good",
        f"pkcs11:object=good?module-path={module}",
        "pkcs11:object=good?module-name=softhsm2",
        f"pkcs11:object=good?module-path={module.parent}&x-vendor=ignored",
    ):
        assert backend.adopt(locator) == by_label, locator
    proves(backend, by_label, "ES256")
    proves(backend, backend.adopt("good rsa"), "RS256")
    evidence = backend.attributes(by_label.ref)
    assert evidence.weaknesses == ()
    assert evidence.attributes["CKA_NEVER_EXTRACTABLE"] is True
    # A label that begins like an id or a URI is named by a URI.
    assert backend.adopt("pkcs11:object=id%3D12").ref["id"] == "12"
    assert backend.adopt("pkcs11:object=pkcs11%3A%C3%A9%3B%25").ref["id"] == "13"
    assert backend.adopt("id=12").ref["label"] == "id=12"


def test_one_key_has_many_names(hsm: SoftHsm) -> None:
    in_child(adopt_good_ones, hsm)


def refuse_locators(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    for locator, error, words in (
        ("nobody", BackendKeyNotFound, "no private key 'nobody'"),
        ("id=ffff", BackendKeyNotFound, "no private key"),
        ("pkcs11:object=good;id=%0b", BackendKeyNotFound, "no private key"),
        ("twins", BackendRefused, "2 private keys that fit"),
        ("pkcs11:object=twins", BackendRefused, "2 private keys that fit"),
        ("id=nothex", BackendRefused, "no label and no id="),
        ("id=", BackendRefused, "empty CKA_ID"),
        ("unknown curve", UnsupportedAlgorithm, "curve"),
        ("pkcs11:object=good;token=another", BackendRefused, f"token is '{hsm.label}', not 'another'"),
        ("pkcs11:object=good;serial=0", BackendRefused, "serial is '[0-9a-f]+', not '0'"),
        ("pkcs11:object=good;slot-id=99999", BackendRefused, "slot-id is"),
        ("pkcs11:object=good;library-version=99", BackendRefused, "library-version is '2.6', not '99.0'"),
        ("pkcs11:object=good?module-path=/nowhere.so", BackendRefused, "module-path is not"),
        ("pkcs11:object=good?module-name=opensc", BackendRefused, "module-name is not"),
        ("pkcs11:object=good;type=public", BackendRefused, "no private key"),
        ("pkcs11:", BackendRefused, "names no key"),
        ("pkcs11:token=a", BackendRefused, "names no key"),
        ("pkcs11:object=", BackendRefused, "names no key"),
        ("pkcs11:object=good;x-size=1", BackendRefused, "'x-size' is none of RFC 7512's"),
        ("pkcs11:object=good?pin-value=4711", BackendRefused, "pin-value has no place"),
        ("pkcs11:object=good?pin-source=/etc/4711", BackendRefused, "pin-source has no place"),
    ):
        with pytest.raises(error, match=words) as refusal:
            backend.adopt(locator)
        assert "4711" not in refusal.value.detail + refusal.value.next_step


def tell_apart(hsm: SoftHsm) -> None:
    """What the next step names is one key each, and signs; where no locator can, it says so."""
    backend = hsm.backend()
    for locator, count in (("id=16", 3), ("pkcs11:id=%16", 3), ("twins", 2)):
        with pytest.raises(BackendRefused) as refusal:
            backend.adopt(locator)
        named = re.findall(r"pkcs11:[^ ,]*[^ ,.]", refusal.value.next_step)
        assert len(named) == count
        keys = [backend.adopt(name) for name in named]
        assert len({str(key.public_jwk) for key in keys}) == count
        for key in keys:
            proves(backend, key, "ES384" if key.public_jwk["crv"] == "P-384" else "ES256")
    for locator in ("id=17", "clones"):
        with pytest.raises(BackendRefused, match="2 private keys") as refusal:
            backend.adopt(locator)
        assert "No locator tells 2 of them apart" in refusal.value.next_step
        assert "pkcs11:" not in refusal.value.next_step
    for locator in ("id=nothex", "id=", "pkcs11:token=a", "pkcs11:object=good?module-name=opensc"):
        with pytest.raises(BackendRefused) as refusal:
            backend.adopt(locator)
        assert refusal.value.next_step != BackendRefused.next_step


def test_several_keys_that_fit_are_told_apart_by_the_next_step(hsm: SoftHsm) -> None:
    in_child(tell_apart, hsm)


def choose_wrongly(hsm: SoftHsm) -> None:
    """A wrong label, serial or slot: the next step shows all three of the token that is there."""
    facts = hsm.backend().ping().facts
    shown = f"'{hsm.label}' (serial {facts['token_serial']}, slot {facts['slot']})"
    for wrong in ({"token_serial": "0000"}, {"slot": 99999}, {"token_label": "nobody"}):
        with pytest.raises(BackendUnavailable, match="no token with") as refusal:
            hsm.backend(**wrong).ping()
        assert shown in refusal.value.next_step


def test_a_wrong_token_s_next_step_lists_label_serial_and_slot(hsm: SoftHsm) -> None:
    in_child(choose_wrongly, hsm)


def test_a_locator_that_fits_nothing_or_too_much_is_refused(hsm: SoftHsm) -> None:
    in_child(refuse_locators, hsm)


# --- weak keys --------------------------------------------------------------------------------------------------------


def look_at_weak_ones(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    for label, alg, weaknesses, attribute in (
        ("decrypts", "PS256", ("it may do more than sign",), ("CKA_DECRYPT", True)),
        ("derives", "ES256", ("it may do more than sign",), ("CKA_DERIVE", True)),
        ("open", "ES256", ("it is or was extractable",), ("CKA_EXTRACTABLE", True)),
        # pkcs11-tool sets CKA_SIGN alone; SoftHSM allows the uses that are not set.
        ("of a tool", "ES256", ("it may do more than sign",), ("CKA_UNWRAP", True)),
    ):
        key = backend.adopt(label)
        evidence = backend.attributes(key.ref)
        assert (evidence.weaknesses, evidence.holds) == (weaknesses, False), label
        assert evidence.attributes[attribute[0]] is attribute[1]
        proves(backend, key, alg)


def test_what_is_weak_is_found_and_said_so(hsm: SoftHsm) -> None:
    in_child(look_at_weak_ones, hsm)


def import_one(hsm: SoftHsm) -> None:
    """Import a private key as another program would: the service offers no way to do it."""
    session = theirs(hsm)
    point = bytes.fromhex(
        "04"
        "41"
        "04"
        "60fed4ba255a9d31c961eb74c6356d68c049b8923b61fa6ce669622e60f29fb6"
        "7903fe1008b8bc99a41ae9e95628bc64f2f1b20c2d7e9f5177a3c294d4462299"
    )  # RFC 6979 A.2.5
    shared: dict[Attribute, Any] = {
        Attribute.TOKEN: True,
        Attribute.KEY_TYPE: pkcs11.KeyType.EC,
        Attribute.EC_PARAMS: P256,
        Attribute.ID: b"\x77",
        Attribute.LABEL: "imported",
    }
    session.create_object(
        {**shared, Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.EC_POINT: point, Attribute.LABEL: "another label"}
    )
    session.create_object(
        {
            **shared,
            Attribute.CLASS: ObjectClass.PRIVATE_KEY,
            Attribute.VALUE: bytes.fromhex("c9afa9d845ba75166b5c215767b1d6934e50c3db36e89b127b8a622b120f6721"),
            **SIGN_ONLY,
        }
    )


def look_at_the_imported_one(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    key = backend.adopt("imported")
    evidence = backend.attributes(key.ref)
    assert evidence.weaknesses == ("it was not generated in the module", "it is or was extractable")
    assert evidence.attributes["CKA_LOCAL"] is False
    assert evidence.attributes["CKA_EXTRACTABLE"] is False
    proves(backend, key, "ES256")  # the public half has another label and the same CKA_ID


def test_an_imported_key_is_never_taken_for_one_that_was_made_there(hsm: SoftHsm) -> None:
    in_child(import_one, hsm)
    in_child(look_at_the_imported_one, hsm)


def public_half(hsm: SoftHsm) -> dict[str, str]:
    return dict(hsm.backend().adopt("half").public_jwk)


def lose_the_public_half(hsm: SoftHsm) -> None:
    theirs(hsm).get_key(object_class=ObjectClass.PUBLIC_KEY, label="half").destroy()


def adopt_half_a_pair(hsm: SoftHsm, public: dict[str, str]) -> None:
    backend = hsm.backend()
    with pytest.raises(BackendRefused, match="without its public key"):
        backend.adopt("half")
    other = jose.public_jwk(ec.generate_private_key(ec.SECP384R1()).public_key())
    with pytest.raises(BackendRefused, match="cannot be that of the private key"):
        backend.adopt("half", other)
    key = backend.adopt("half", public)
    assert key.public_jwk == public
    proves(backend, key, "ES256")
    assert dict(backend.public_key(key.ref)) == public
    # In another process, which has the reference from the registry.
    again = hsm.backend()
    proves(again, GeneratedKey(type(key.ref).of(**key.ref.as_dict()), public), "ES256")
    with pytest.raises(BackendRefused, match="not the one that the token holds"):
        backend.adopt("good", public)
    rsa = backend.adopt("good rsa")
    assert backend.adopt("good rsa", rsa.public_jwk) == rsa


def test_a_private_key_without_its_public_half(hsm: SoftHsm) -> None:
    public = in_child(public_half, hsm)
    in_child(lose_the_public_half, hsm)
    in_child(adopt_half_a_pair, hsm, public)


def destroy_by_label(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    key = backend.adopt("no id")
    assert (key.ref["id"], key.ref["label"]) == ("", "no id")
    proves(backend, key, "ES256")
    backend.destroy(key.ref)
    backend.destroy(key.ref)
    for gone in (lambda: backend.adopt("no id"), lambda: backend.public_key(key.ref)):
        with pytest.raises(BackendKeyNotFound):
            gone()


def public_keys_left(hsm: SoftHsm) -> list[str]:
    found = theirs(hsm).get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.LABEL: "no id"})
    return [key[Attribute.ID].hex() for key in found]


def leave_a_public_key_of_that_label(hsm: SoftHsm) -> None:
    theirs(hsm).get_key(object_class=ObjectClass.PRIVATE_KEY, id=b"\x21").destroy()


def test_destroying_a_pair_without_an_id_leaves_others_of_its_label_alone(hsm: SoftHsm) -> None:
    in_child(make_pairs, hsm, [("no id", b"", EC, P256, {}), ("no id", b"\x21", EC, P256, {})])
    in_child(leave_a_public_key_of_that_label, hsm)
    assert sorted(in_child(public_keys_left, hsm)) == ["", "21"]
    in_child(destroy_by_label, hsm)
    assert in_child(public_keys_left, hsm) == ["21"]


# --- what new keys may do ---------------------------------------------------------------------------------------------


def restricted(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    for alg, names in (
        ("RS256", "CKM_RSA_PKCS, CKM_SHA256_RSA_PKCS"),
        ("PS256", "CKM_RSA_PKCS_PSS, CKM_SHA256_RSA_PKCS_PSS"),
        ("ES256", "CKM_ECDSA, CKM_ECDSA_SHA256"),
        ("EdDSA", "CKM_EDDSA"),
    ):
        key = backend.generate(f"only {alg}", ALGORITHMS[alg], rsa_bits=2048 if ALGORITHMS[alg].is_rsa else None)
        assert backend.attributes(key.ref).attributes["CKA_ALLOWED_MECHANISMS"] == names
        proves(backend, key, alg)
    # The token itself refuses to use it with another mechanism.
    rs256 = backend.adopt("only RS256")
    with pytest.raises(UnsupportedAlgorithm, match="PS256"):
        backend.sign(rs256.ref, ALGORITHMS["PS256"], Message(b"x"), soon())
    connection = backend._connection().current
    assert connection is not None
    session = connection.token.open()
    private: Any = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="only RS256")
    with pytest.raises(pkcs11.MechanismInvalid):
        private.sign(b"x", mechanism=Mechanism.SHA512_RSA_PKCS)
    assert private.sign(b"x", mechanism=Mechanism.SHA256_RSA_PKCS)
    # A pair that allows only mechanisms that hash in the module is used with one.
    proves(backend, backend.adopt("hashes"), "PS256")
    # A pair that was made without a restriction shows none.
    assert backend.attributes(backend.adopt("good").ref).attributes["CKA_ALLOWED_MECHANISMS"] is None


def test_a_new_key_is_allowed_the_mechanisms_of_its_algorithm_alone(hsm: SoftHsm) -> None:
    in_child(restricted, hsm)


class Refusing:
    """SoftHSM's session, changed to refuse CKA_ALLOWED_MECHANISMS as a module does that does not know it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def generate_keypair(self, *arguments: Any, private_template: dict[Attribute, Any], **more: Any) -> Any:
        if Attribute.ALLOWED_MECHANISMS in private_template:
            raise pkcs11.AttributeTypeInvalid
        return self._session.generate_keypair(*arguments, private_template=private_template, **more)


def without_restriction(hsm: SoftHsm) -> None:
    make = generation._generate_pair
    generation._generate_pair = lambda session, *rest: make(Refusing(session), *rest)  # type: ignore[arg-type]
    backend = hsm.backend()
    key = backend.generate("unrestricted", ALGORITHMS["ES256"])
    evidence = backend.attributes(key.ref)
    assert evidence.holds
    assert evidence.attributes["CKA_ALLOWED_MECHANISMS"] is None
    assert (evidence.attributes["CKA_COPYABLE"], evidence.attributes["CKA_MODIFIABLE"]) == (False, False)
    proves(backend, key, "ES256")


def test_a_module_that_refuses_the_restriction_still_makes_keys(hsm: SoftHsm) -> None:
    in_child(without_restriction, hsm)


# --- several tokens, several modules ----------------------------------------------------------------------------------


def second_token(hsm: SoftHsm, label: str = "second") -> SoftHsm:
    """Another token in the same folder, with a PIN of its own."""
    os.environ.update(hsm.environment)
    pin = hsm.directory / f"pin-{label}"
    pin.write_text("second-pin-0815")
    return SoftHsm(hsm.directory, hsm.module, label)


def two_tokens(hsm: SoftHsm) -> None:
    other = second_token(hsm)
    pin = PinSource.from_file(hsm.directory / "pin-second")
    first = hsm.backend()
    second = other.backend(pin=pin)
    by_uri = hsm.backend(token_label=None, uri="pkcs11:token=second?module-name=softhsm2", pin=pin)
    serials = {name: b.ping().facts["token_serial"] for name, b in (("1", first), ("2", second), ("uri", by_uri))}
    assert serials["2"] == serials["uri"] != serials["1"]

    ones, twos = (b.generate("same label", ALGORITHMS["ES256"]) for b in (first, second))
    assert by_uri.adopt("same label") == twos
    for backend, key in ((first, ones), (second, twos), (by_uri, twos)):
        proves(backend, key, "ES256")
    for backend, key in ((first, twos), (second, ones)):
        with pytest.raises(BackendRefused, match="not on this one"):
            backend.sign(key.ref, ALGORITHMS["ES256"], Message(b"x"), soon())
    with pytest.raises(BackendRefused, match="token is 'second'"):
        second.adopt(f"pkcs11:token={hsm.label};object=same%20label")
    with pytest.raises(BackendUnavailable, match="URI 'pkcs11:token=third'"):
        hsm.backend(token_label=None, uri="pkcs11:token=third").ping()
    # Closing one of two backends on a token leaves the other one working.
    second.close()
    proves(by_uri, twos, "ES256")
    proves(first, ones, "ES256")
    by_uri.destroy(twos.ref)
    proves(first, ones, "ES256")
    assert first.list_keys("same label") != []


def init_second(hsm: SoftHsm) -> None:
    os.environ.update(hsm.environment)
    pin = hsm.directory / "pin-second"
    pin.write_text("second-pin-0815")
    made = subprocess.run(
        [
            "softhsm2-util",
            "--init-token",
            "--free",
            "--label",
            "second",
            "--pin",
            pin.read_text(),
            "--so-pin",
            "12345678",
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr


@pytest.fixture
def own(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def test_two_tokens_of_one_module_in_one_process(own: SoftHsm) -> None:
    in_child(init_second, own)
    in_child(two_tokens, own)


def two_modules(hsm: SoftHsm, copy: str) -> None:
    copied = SoftHsm(hsm.directory, Path(copy), hsm.label)
    first, second = hsm.backend(), copied.backend()
    assert first._connection().module is not second._connection().module
    made = first.generate("through one", ALGORITHMS["ES256"])
    # The copy is a module of its own, with its own login and sessions, on the same token.
    assert second.adopt("through one") == made
    for backend in (first, second, first, second):
        proves(backend, made, "ES256")
    with pytest.raises(BackendRefused, match="module-path is not"):
        second.adopt(f"pkcs11:object=through%20one?module-path={hsm.module}")
    first.close()
    proves(second, made, "ES256")
    second.destroy(made.ref)


def test_two_modules_in_one_process(own: SoftHsm, tmp_path: Path) -> None:
    copy = tmp_path / "libother.so"
    shutil.copyfile(own.module.resolve(), copy)
    in_child(two_modules, own, str(copy))
