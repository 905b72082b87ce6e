"""PKCS#11 URIs: the examples of RFC 7512, refusals, round trips, and comparison with tokens and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_jwks.backends import make_backend
from kms_jwks.backends.pkcs11.uri import Uri, module_mismatch, parse
from kms_jwks.config import Pkcs11Options
from kms_jwks.errors import ConfigurationError

# RFC 7512 §3, as they stand there.
EXAMPLES: dict[str, Uri] = {
    "pkcs11:": Uri(),
    "pkcs11:object=my-pubkey;type=public": Uri({"object": "my-pubkey", "type": "public"}),
    "pkcs11:object=my-sign-key;type=private?module-name=mypkcs11": Uri(
        {"object": "my-sign-key", "type": "private"}, module_name="mypkcs11"
    ),
    "pkcs11:object=my-sign-key;type=private?module-path=/mnt/libmypkcs11.so.1": Uri(
        {"object": "my-sign-key", "type": "private"}, module_path="/mnt/libmypkcs11.so.1"
    ),
    "pkcs11:slot-description=Sun%20Metaslot": Uri({"slot-description": "Sun Metaslot"}),
    "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library;library-version=1.23": (
        Uri(
            {
                "library-manufacturer": "Snake Oil, Inc.",
                "library-description": "Soft Token Library",
                "library-version": "1.23",
            }
        )
    ),
    "pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3;id=%01%02%03%Ba%dd%Ca%fe%04%05%06": Uri(
        {"token": "My token% created by Joe", "library-version": "3.0"}, b"\1\2\3\xba\xdd\xca\xfe\4\5\6"
    ),
    "pkcs11:token=A%20name%20with%20a%20substring%20%25%3B;object=my-certificate;type=cert": Uri(
        {"token": "A name with a substring %;", "object": "my-certificate", "type": "cert"}
    ),
    "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;object=my-certificate;type=cert": Uri(
        {"token": "Name with a small A with acute: á", "object": "my-certificate", "type": "cert"}
    ),
}
WITH_A_PIN = [
    "pkcs11:object=my-key;type=private?pin-source=file:/etc/token",
    (
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;"
        "object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=?pin-source=file:/etc/token_pin"
    ),
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc.?pin-value=the-pin",
]
OF_A_VENDOR = (
    "pkcs11:token=my-token;object=my-certificate;type=cert;vendor-aaa=value-a"
    "?pin-source=file:/etc/token_pin&vendor-bbb=value-b"
)


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_examples_of_the_rfc(text: str) -> None:
    assert parse(text) == EXAMPLES[text]
    assert parse(str(parse(text))) == EXAMPLES[text]


@pytest.mark.parametrize("text", WITH_A_PIN)
def test_its_examples_with_a_pin_are_refused_and_it_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"pin-(source|value) has no place here") as refusal:
        parse(text)
    assert "the-pin" not in str(refusal.value)
    assert "/etc" not in str(refusal.value)
    assert parse(text.partition("?")[0]) != Uri()  # what is before the PIN is in order


def test_the_example_without_its_pin_is_read_whole() -> None:
    found = parse(WITH_A_PIN[1].partition("?")[0])
    assert found.id == b"i\x95>\\\xf4\xbd\xec\x91"
    assert found.text == {
        "token": "The Software PKCS#11 Softtoken",
        "manufacturer": "Snake Oil, Inc.",
        "model": "1.0",
        "object": "my-certificate",
        "type": "cert",
        "serial": "",
    }


def test_what_is_unknown_fits_nothing_in_the_path_and_is_passed_over_in_the_query() -> None:
    with pytest.raises(ValueError, match="'vendor-aaa' is none of RFC 7512's"):
        parse(OF_A_VENDOR)
    assert parse("pkcs11:token=a?vendor-bbb=b&vendor-bbb=c") == Uri({"token": "a"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://token=a", "begins with pkcs11:"),
        ("token=a", "begins with pkcs11:"),
        ("", "begins with pkcs11:"),
        ("pkcs11:token", "name=value"),
        ("pkcs11:;", "name=value"),
        ("pkcs11:token=a;", "name=value"),
        ("pkcs11:=a", "name=value"),
        ("pkcs11:to ken=a", "name=value"),
        ("pkcs11:%74oken=a", "name=value"),
        ("pkcs11:Token=a", "none of RFC 7512's"),
        ("pkcs11:token=a b", "percent-encoded"),
        ("pkcs11:token=a/b", "percent-encoded"),
        ("pkcs11:token=á", "percent-encoded"),
        ("pkcs11:token=%", "percent-encoded"),
        ("pkcs11:token=%2", "percent-encoded"),
        ("pkcs11:token=%zz", "percent-encoded"),
        ("pkcs11:token=a#b", "percent-encoded"),
        ("pkcs11:token=%ff", "no UTF-8"),
        ("pkcs11:token=%ed%a0%80", "no UTF-8"),
        ("pkcs11:token=a;token=a", "twice"),
        ("pkcs11:id=%01;id=%01", "twice"),
        ("pkcs11:?module-name=a&module-name=a", "twice"),
        ("pkcs11:type=key", "type is one of"),
        ("pkcs11:type=", "type is one of"),
        ("pkcs11:slot-id=-1", "decimal"),
        ("pkcs11:slot-id=0x1", "decimal"),
        ("pkcs11:slot-id=", "decimal"),
        ("pkcs11:slot-id=%d9%a1", "decimal"),
        ("pkcs11:library-version=1.2.3", "major"),
        ("pkcs11:library-version=", "major"),
        ("pkcs11:token=a?pin-value=", "no place here"),
        ("pkcs11:token=a?module-name=a b", "percent-encoded"),
        ("pkcs11:token=a??module-name=a", "name=value"),
    ],
)
def test_what_the_grammar_does_not_allow_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("PKCS11:token=a", "pkcs11:token=a"),
        ("pkcs11:token=%61%3a", "pkcs11:token=a:"),
        ("pkcs11:token=a;serial=b", "pkcs11:serial=b;token=a"),
        ("pkcs11:id=%6A", "pkcs11:id=j"),
        ("pkcs11:slot-id=007", "pkcs11:slot-id=7"),
        ("pkcs11:library-version=3", "pkcs11:library-version=3.0"),
    ],
)
def test_spellings_of_one_uri_are_equal(one: str, other: str) -> None:
    assert parse(one) == parse(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pkcs11:token=a", "pkcs11:token=A"),
        ("pkcs11:token=a", "pkcs11:token=a%20"),
        ("pkcs11:token=", "pkcs11:"),
        ("pkcs11:token=%C3%A1", "pkcs11:token=a%CC%81"),
    ],
)
def test_different_uris_are_different(one: str, other: str) -> None:
    assert parse(one) != parse(other)


TEXT = st.text(max_size=40)
TEXTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            (
                "token",
                "manufacturer",
                "serial",
                "model",
                "object",
                "slot-description",
                "slot-manufacturer",
                "library-manufacturer",
                "library-description",
            ),
            TEXT,
        ),
        "type": st.sampled_from(["public", "private", "cert", "secret-key", "data"]),
        "slot-id": st.integers(0, 2**64 - 1).map(str),
        "library-version": st.tuples(st.integers(0, 255), st.integers(0, 255)).map(lambda v: f"{v[0]}.{v[1]}"),
    },
)


@given(text=TEXTS, id_=st.none() | st.binary(max_size=20), path=st.none() | TEXT, name=st.none() | TEXT)
def test_what_is_written_is_read_again(
    text: dict[str, str], id_: bytes | None, path: str | None, name: str | None
) -> None:
    uri = Uri(text, id_, path, name)
    written = str(uri)
    assert written.isascii()
    assert parse(written) == uri


@given(st.text(alphabet="pkcs1:;?&=%aFtoeni d-", max_size=40))
def test_whatever_is_sent_is_read_or_refused(tail: str) -> None:
    try:
        found = parse(f"pkcs11:{tail}")
    except ValueError:
        return
    assert parse(str(found)) == found


# --- comparison -------------------------------------------------------------------------------------------------------

SHOWN = {"token": "prod", "serial": "00ff", "model": "SoftHSM v2", "slot-id": "7", "library-version": "2.6"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pkcs11:", []),
        ("pkcs11:token=prod;serial=00ff;model=SoftHSM%20v2;slot-id=7;library-version=2.6", []),
        ("pkcs11:object=key;id=%01;type=private", []),
        ("pkcs11:token=test", ["token is 'prod', not 'test'"]),
        ("pkcs11:serial=00FF", ["serial is '00ff', not '00FF'"]),
        ("pkcs11:serial=", ["serial is '00ff', not ''"]),
        ("pkcs11:manufacturer=", []),
        ("pkcs11:manufacturer=me", ["manufacturer is '', not 'me'"]),
        ("pkcs11:token=prod;slot-id=8", ["slot-id is '7', not '8'"]),
    ],
)
def test_what_a_token_contradicts(text: str, wrong: list[str]) -> None:
    assert parse(text).contradictions(SHOWN) == wrong


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        ("", True),
        ("?module-name=softhsm2", True),
        ("?module-name=libsofthsm2", True),
        ("?module-name=softhsm", False),
        ("?module-path=/usr/lib/softhsm/libsofthsm2.so", True),
        ("?module-path=/usr/lib/softhsm/../softhsm/libsofthsm2.so", True),
        ("?module-path=/usr/lib/softhsm", True),
        ("?module-path=/usr/lib", False),
        ("?module-path=/tmp/libsofthsm2.so", False),
        ("?module-path=%00", False),
        ("?module-path=/usr/lib/softhsm/libsofthsm2.so&module-name=other", False),
    ],
)
def test_whose_module_it_is(query: str, fits: bool) -> None:
    problem: Any = module_mismatch(parse(f"pkcs11:token=a{query}"), Path("/usr/lib/softhsm/libsofthsm2.so"))
    assert (problem is None) is fits


# --- in the configuration ---------------------------------------------------------------------------------------------


def make(tmp_path: Path, **settings: Any) -> Any:
    """The backend that a section of the settings makes; nothing is opened."""
    section = Pkcs11Options.model_validate(
        {"type": "pkcs11", "module": "/usr/lib/softhsm/libsofthsm2.so", "pin_env": "PIN", **settings}
    )
    return make_backend("hsm", section, tmp_path)


def test_a_uri_chooses_the_token(tmp_path: Path) -> None:
    opener = make(tmp_path, uri="pkcs11:token=prod;serial=00ff?module-name=softhsm2")._opener
    assert opener.uri == Uri({"token": "prod", "serial": "00ff"}, module_name="softhsm2")
    assert "pkcs11:serial=00ff;token=prod" in opener.selection
    make(tmp_path, uri="pkcs11:token=prod;slot-id=7", token_label="prod", token_serial="00ff", slot=7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uri": "pkcs11:token=prod", "token_label": "test"}, "uri and token_label name different tokens"),
        ({"uri": "pkcs11:serial=1", "token_serial": "2"}, "uri and token_serial name different tokens"),
        ({"uri": "pkcs11:serial=1", "expected_serial": "2"}, "uri and expected_serial name different tokens"),
        ({"uri": "pkcs11:slot-id=1", "slot": 2}, "uri and slot name different tokens"),
        ({"uri": "pkcs11:object=key"}, "has no object, id or type"),
        ({"uri": "pkcs11:token=a;id=%01"}, "has no object, id or type"),
        ({"uri": "pkcs11:"}, "says nothing of the token"),
        ({"uri": "pkcs11:token=a?module-name=other"}, "module-name is not that"),
        ({"uri": "pkcs11:token=a?module-path=/other.so"}, "module-path is not"),
        ({"uri": "pkcs11:token=a?pin-value=1234"}, "pin-value has no place"),
        ({"uri": "pkcs11:token=a?pin-source=file:/pin"}, "pin-source has no place"),
        ({"uri": "pkcs11:token"}, "name=value"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as refusal:
        make(tmp_path, **settings)
    assert refusal.value.detail.startswith("backends.hsm: ")
    assert "1234" not in refusal.value.detail
