"""Verification of a token against a key set: the signature first, then the claims. Pure: keys and time are arguments.

The algorithm is the key's, never the header's (RFC 8725 §3.1), and the header cannot supply a key. Every refusal is a
subclass of `errors.TokenRejected`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kms_jwks import jose, strictjson
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.errors import (
    InvalidJwk,
    MalformedBody,
    TokenAudienceMismatch,
    TokenExpired,
    TokenIssuerMismatch,
    TokenKeyRevoked,
    TokenKeyUnknown,
    TokenMalformed,
    TokenNotYetValid,
    TokenSignatureInvalid,
    TokenTypeMismatch,
)

MAX_TOKEN_LENGTH: Final = 16_384
"""Characters of a token that `verify` reads."""
ANY_AUDIENCE: Final = "any"
ACCEPTED_TYPES: Final = frozenset({"jwt", "at+jwt"})
"""Values of typ, lower-case and without `application/`, that pass when the caller names none."""

_REFUSED_HEADERS: Final = ("crit", "b64", "jwk", "jku", "x5u", "zip", "enc")


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """The key of a kid: its algorithm and public JWK. `jwk` may be None only when the key was revoked."""

    alg: str
    jwk: Mapping[str, str] | None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Authentic:
    """A JWS with a valid signature; its payload is not checked yet."""

    header: Mapping[str, object]
    payload: bytes
    kid: str


@dataclass(frozen=True, slots=True)
class Verified:
    """A valid token: its header, its claims, and the kid that signed it."""

    header: Mapping[str, object]
    claims: Mapping[str, object]
    kid: str


def verify(
    token: str,
    *,
    keys: Mapping[str, VerifyKey],
    issuer: str,
    audience: str,
    typ: str | None,
    now: int,
    clock_skew: int,
) -> Verified:
    """Verify a token in compact form (RFC 7519 §7.2).

    `keys` maps kid to key. `audience` must be among `aud`, unless it is "any". `typ` must be the header's, compared
    without regard to case and to the prefix ``application/`` (RFC 7515 §4.1.9); None accepts JWT, at+jwt, and a
    header without typ, which RFC 7519 §5.1 allows. `now` is a NumericDate, `clock_skew` in seconds; a token without
    exp is refused. Raises a subclass of TokenRejected and nothing else.
    """
    authentic = authenticate(token, keys=keys)
    _check_typ(authentic.header, typ)
    try:
        claims = strictjson.loads_object(authentic.payload)
    except MalformedBody as error:
        raise TokenMalformed(f"The payload: {error.detail}") from None
    if claims.get("iss") != issuer:
        raise TokenIssuerMismatch(
            "The token has no iss." if "iss" not in claims else f"The token's iss is not {_short(issuer)}."
        )
    _check_audience(claims, audience)
    _check_times(claims, now=now, clock_skew=clock_skew)
    return Verified(header=authentic.header, claims=claims, kid=authentic.kid)


def authenticate(token: str, *, keys: Mapping[str, VerifyKey]) -> Authentic:
    """Verify a JWS in compact form, whatever its payload is (RFC 7515 §5.2).

    Raises TokenMalformed, TokenKeyUnknown, TokenKeyRevoked or TokenSignatureInvalid.
    """
    if len(token) > MAX_TOKEN_LENGTH:
        raise TokenMalformed(f"The token has {len(token)} characters; {MAX_TOKEN_LENGTH} are read at most.")
    segments = token.split(".")
    if len(segments) != 3:
        raise TokenMalformed(f"The token has {len(segments)} segments; a JWS in compact form has 3.")
    header_bytes, payload, signature = (
        _decode(name, segment) for name, segment in zip(("header", "payload", "signature"), segments, strict=True)
    )
    header = _header(header_bytes)
    kid, key = _find(header, keys)
    if header["alg"] != key.alg:
        raise TokenSignatureInvalid("The header's alg is not that of the key it names.")
    algorithm = ALGORITHMS.get(key.alg)
    if algorithm is None or key.jwk is None:
        raise TokenKeyUnknown("The key that the token names cannot verify it here.")
    try:
        jose.verify_signature(algorithm, key.jwk, f"{segments[0]}.{segments[1]}".encode("ascii"), signature)
    except InvalidJwk as error:
        raise TokenKeyUnknown("The key that the token names cannot verify it here.") from error
    return Authentic(header=header, payload=payload, kid=kid)


def _decode(name: str, segment: str) -> bytes:
    try:
        return jose.b64u_decode(segment)
    except ValueError as error:
        raise TokenMalformed(f"The {name}: {error}.") from None


def _header(data: bytes) -> dict[str, object]:
    try:
        header = strictjson.loads_object(data)
    except MalformedBody as error:
        raise TokenMalformed(f"The header: {error.detail}") from None
    for name in _REFUSED_HEADERS:
        if name in header:
            raise TokenMalformed(f"The header holds {name!r}, which this service does not process.")
    for name in ("alg", "kid"):
        if not isinstance(header.get(name), str) or not header[name]:
            raise TokenMalformed(f"The header's {name} is missing or not a string.")
    if not isinstance(header.get("typ", ""), str):
        raise TokenMalformed("The header's typ is not a string.")
    return header


def _find(header: Mapping[str, object], keys: Mapping[str, VerifyKey]) -> tuple[str, VerifyKey]:
    kid = str(header["kid"])
    key = keys.get(kid)
    if key is None:
        raise TokenKeyUnknown(f"The key set does not publish the kid {_short(kid)}.")
    if key.revoked:
        raise TokenKeyRevoked(f"The kid {_short(kid)} was revoked.")
    return kid, key


def _check_typ(header: Mapping[str, object], expected: str | None) -> None:
    if expected is None:
        if "typ" in header and _media_type(str(header["typ"])) not in ACCEPTED_TYPES:
            raise TokenTypeMismatch("The token's typ is neither JWT nor at+jwt; name the typ that is expected.")
    elif "typ" not in header:
        raise TokenTypeMismatch(f"The token has no typ; {_short(expected)} is expected.")
    elif _media_type(str(header["typ"])) != _media_type(expected):
        raise TokenTypeMismatch(f"The token's typ is not {_short(expected)}.")


def _media_type(typ: str) -> str:
    return typ.lower().removeprefix("application/")


def _check_audience(claims: Mapping[str, object], audience: str) -> None:
    if "aud" not in claims:
        if audience != ANY_AUDIENCE:
            raise TokenAudienceMismatch("The token has no aud.")
        return
    aud = claims["aud"]
    audiences = aud if isinstance(aud, list) else [aud]
    if not all(isinstance(item, str) for item in audiences):
        raise TokenMalformed("The token's aud is neither a string nor an array of strings.")
    if audience != ANY_AUDIENCE and audience not in audiences:
        raise TokenAudienceMismatch(f"The token's aud does not hold {_short(audience)}.")


def _check_times(claims: Mapping[str, object], *, now: int, clock_skew: int) -> None:
    """RFC 7519 §4.1.4 to §4.1.6; a NumericDate may have a fraction (§2)."""
    exp = _numeric_date(claims, "exp")
    if exp is None:
        raise TokenMalformed("The token has no exp.")
    if now >= exp + clock_skew:
        raise TokenExpired(f"The token expired at {_date(exp)}; it is {now}.", fields={"exp": int(exp), "now": now})
    for name in ("nbf", "iat"):
        date = _numeric_date(claims, name)
        if date is not None and date > now + clock_skew:
            raise TokenNotYetValid(
                f"The token's {name} is {_date(date)}; it is {now}.", fields={name: int(date), "now": now}
            )


def _numeric_date(claims: Mapping[str, object], name: str) -> int | float | None:
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenMalformed(f"The token's {name} is not a NumericDate.")
    if not -(2**53) <= value <= 2**53:
        raise TokenMalformed(f"The token's {name} is beyond 2^53.")
    return value


def _date(value: float) -> str:
    return str(int(value))


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
