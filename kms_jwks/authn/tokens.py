"""API tokens: ``kj_``, 256 random bits in 43 base62 characters, and a CRC-32 of both in 6 base62 characters.

The prefix and the checksum let scanners recognise a leaked token, and let a mistyped token fail before it is looked up.
The registry holds only a token's SHA-256: 256 random bits need no slow hash. No error repeats a token.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass, field
from typing import Final

from kms_jwks.errors import CredentialsMalformed, CredentialsMissing

PREFIX: Final = "kj_"
_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUES: Final = {digit: value for value, digit in enumerate(_ALPHABET)}
_RANDOM_LENGTH: Final = 43  # 62^43 is the first power beyond 2^256
_CHECKSUM_LENGTH: Final = 6  # 62^6 is the first beyond 2^32
TOKEN_LENGTH: Final = len(PREFIX) + _RANDOM_LENGTH + _CHECKSUM_LENGTH
"""Characters of every API token."""

_TOKEN: Final = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{_RANDOM_LENGTH + _CHECKSUM_LENGTH}}}")
_BEARER: Final = re.compile(r"bearer +([^ ]+) *", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A new token: the text to show once, and the SHA-256 (lower-case hex) to store."""

    token: str = field(repr=False)
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenCredential:
    """A well-formed API token that is not looked up yet. `sha256` is lower-case hex."""

    sha256: str


def new_token() -> NewToken:
    """Make a token from 256 bits of the system's random source."""
    body = PREFIX + _base62(secrets.randbits(256), _RANDOM_LENGTH)
    token = body + _base62(zlib.crc32(body.encode("ascii")), _CHECKSUM_LENGTH)
    return NewToken(token=token, sha256=hashlib.sha256(token.encode("ascii")).hexdigest())


def parse(text: str) -> str:
    """The SHA-256 (lower-case hex) of a well-formed token. Raises CredentialsMalformed with the cause."""
    if not _TOKEN.fullmatch(text):
        raise CredentialsMalformed(_form_problem(text))
    token = text.encode("ascii")
    checksum = 0
    for digit in text[-_CHECKSUM_LENGTH:]:
        checksum = checksum * 62 + _VALUES[digit]
    if checksum != zlib.crc32(token[:-_CHECKSUM_LENGTH]):
        raise CredentialsMalformed("The API token's checksum does not match: a character was lost or changed.")
    return hashlib.sha256(token).hexdigest()


def credential_from_header(authorization: str | None) -> TokenCredential:
    """The credential of an Authorization header (RFC 6750 §2.1), the scheme in any case.

    Raises CredentialsMissing if there is none, and CredentialsMalformed for another scheme, no or several tokens,
    several headers (which arrive joined by a comma), and a token that `parse` refuses.
    """
    if authorization is None or not authorization.strip(" \t"):
        raise CredentialsMissing
    if "," in authorization:
        raise CredentialsMalformed("The request carries more than one Authorization header or credential.")
    bearer = _BEARER.fullmatch(authorization)
    if bearer is None:
        raise CredentialsMalformed("The Authorization header is not 'Bearer' followed by one token.")
    return TokenCredential(sha256=parse(bearer[1]))


def _form_problem(text: str) -> str:
    if not text.startswith(PREFIX):
        return f"An API token begins with {PREFIX!r}."
    if len(text) != TOKEN_LENGTH:
        return f"An API token has {TOKEN_LENGTH} characters, this one {len(text)}."
    return "An API token holds only letters and digits after its prefix."


def _base62(value: int, length: int) -> str:
    digits = []
    for _ in range(length):
        value, digit = divmod(value, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
