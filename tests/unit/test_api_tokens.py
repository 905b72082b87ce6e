"""API tokens: their form, their checksum, and how a request carries one."""

import hashlib
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_jwks import authn
from kms_jwks.authn import TokenCredential, credential_from_header, new_token, parse
from kms_jwks.authn.tokens import TOKEN_LENGTH
from kms_jwks.errors import CredentialsMalformed, CredentialsMissing, Unauthenticated
from kms_jwks.model import ApiToken, Id, Instant
from kms_jwks.service.clients import token_state

# Fixed pairs, of 0 and 2^256 - 1: the form may never change under tokens that are in use.
KNOWN = [
    (
        "kj_00000000000000000000000000000000000000000002lduTg",
        "eedc0e71ad967916eb1a37602d9e95353fff0b9779f3ca959c5897cb941a5ab0",
    ),
    (
        "kj_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp116qeTo",
        "ddf21693958586f088544f09160c703fd2559646b03b27d8f21291d4c83f9e7f",
    ),
]
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase


def test_a_new_token_parses_to_the_digest_it_came_with() -> None:
    made = new_token()
    assert re.fullmatch(r"kj_[0-9A-Za-z]{49}", made.token)
    assert len(made.token) == TOKEN_LENGTH == 52
    assert parse(made.token) == made.sha256 == hashlib.sha256(made.token.encode()).hexdigest()


def test_tokens_are_distinct_and_use_the_whole_range() -> None:
    tokens = [new_token().token for _ in range(2000)]
    assert len(set(tokens)) == 2000
    assert set("".join(token[4:46] for token in tokens)) == set(ALPHABET)


def test_no_text_form_shows_the_token() -> None:
    made = new_token()
    for text in (repr(made), str(made), f"{made}"):
        assert made.token not in text
        assert made.token[3:20] not in text


@pytest.mark.parametrize(("token", "sha256"), KNOWN)
def test_the_form_is_stable(token: str, sha256: str) -> None:
    assert parse(token) == sha256


def broken(token: str) -> dict[str, str]:
    other = {"a": "b"}
    return {
        "empty": "",
        "another prefix": "gh" + token[2:],
        "upper-case prefix": "KJ_" + token[3:],
        "no prefix": token[3:],
        "one short": token[:-1],
        "one long": token + "0",
        "a changed random character": token[:20] + other.get(token[20], "a") + token[21:],
        "a changed checksum character": token[:-1] + other.get(token[-1], "a"),
        "swapped case": token[:3] + token[3:].swapcase(),
        "outside the alphabet": token[:20] + "-" + token[21:],
        "not ASCII": token[:20] + "é" + token[21:],
        "a digit that is no ASCII digit": token[:20] + "\u0661" + token[21:],
        "trailing newline": token + "\n",
        "newline within": token[:-1] + "\n",
        "leading space": " " + token,
        "a JWT": "eyJhbGciOiJFUzI1NiJ9.e30.AAAA",
        "very long": "kj_" + "a" * 100_000,
    }


@pytest.mark.parametrize("case", list(broken(new_token().token)))
def test_what_is_no_token_is_malformed_and_not_repeated(case: str) -> None:
    token = new_token().token
    text = broken(token)[case]
    with pytest.raises(CredentialsMalformed) as caught:
        parse(text)
    assert token[5:15] not in caught.value.detail
    assert len(caught.value.detail) < 120


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("space", [" ", "   "])
def test_a_bearer_header_gives_the_credential(scheme: str, space: str) -> None:
    made = new_token()
    assert credential_from_header(f"{scheme}{space}{made.token}") == TokenCredential(sha256=made.sha256)


@pytest.mark.parametrize("header", [None, "", " ", " \t "])
def test_no_header_means_no_credentials(header: str | None) -> None:
    with pytest.raises(CredentialsMissing):
        credential_from_header(header)


@pytest.mark.parametrize(
    "header",
    [
        "{token}",
        "Bearer",
        "Bearer ",
        "Bearer{token}",
        "Bearer\t{token}",
        "Bearer: {token}",
        "Bearer {token} {token}",
        "Bearer {token},",
        "Bearer {token}, Bearer {token}",
        "Bearer {token},Basic dTpw",
        'Bearer "{token}"',
        "Bearer kj_",
        "Bearer {token}\n",
        "Bearer \n{token}",
        "Basic dTpw",
        "Basic {token}",
        "Token {token}",
        "DPoP {token}",
        " Bearer {token}",
        "Bearer é{token}",
    ],
)
def test_a_header_that_is_not_exactly_one_bearer_token(header: str) -> None:
    token = new_token().token
    with pytest.raises(CredentialsMalformed) as caught:
        credential_from_header(header.format(token=token))
    assert token not in caught.value.detail


def test_the_package_offers_the_interface() -> None:
    assert authn.Credential is TokenCredential


@settings(deadline=None)
@given(st.text(max_size=80) | st.text(ALPHABET, min_size=49, max_size=49).map("kj_".__add__))
def test_nothing_but_unauthenticated_ever_leaves(text: str) -> None:
    for call in (
        lambda: parse(text),
        lambda: credential_from_header(text),
        lambda: credential_from_header("Bearer " + text),
    ):
        try:
            call()
        except Unauthenticated:
            continue
        raise AssertionError("a random text passed the checksum")  # odds: 1 in 2^32


@settings(deadline=None)
@given(st.integers(0, 48), st.sampled_from(ALPHABET))
def test_every_single_change_is_noticed(position: int, character: str) -> None:
    token = new_token().token
    index = 3 + position
    changed = token[:index] + character + token[index + 1 :]
    if changed == token:
        return
    with pytest.raises(CredentialsMalformed):
        parse(changed)


@pytest.mark.parametrize(
    ("expires_at", "revoked_at", "state"),
    [(11, None, "valid"), (10, None, "expired"), (9, None, "expired"), (11, 5, "revoked"), (9, 5, "revoked")],
)
def test_the_state_by_which_lists_filter(expires_at: int, revoked_at: int | None, state: str) -> None:
    revoked = None if revoked_at is None else Instant(revoked_at)
    token = ApiToken(Id("t"), Id("c"), "00" * 32, Instant(0), Instant(expires_at), revoked)
    assert token_state(token, Instant(10)) == state
