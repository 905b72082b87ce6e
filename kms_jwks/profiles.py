"""Signing profiles: which claims a key signs, and which the service adds. Pure.

`issue` builds the payload from a caller's claims. `check_signing_input` checks a caller's own header and payload
against the same rules and changes no byte of them. Neither knows the caller or a key.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kms_jwks import strictjson
from kms_jwks.errors import ClaimsRefused, MalformedBody, SigningInputRefused
from kms_jwks.jose import b64u_decode, b64u_encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_INTEGER: Final = 2**53
"""Receivers that read numbers as doubles get another number beyond ± this (RFC 7493 §2.2)."""
MAX_JTI_LENGTH: Final = 255
MAX_DEPTH: Final = strictjson.MAX_DEPTH
_MAX_HEADER_LENGTH: Final = 4096

_JTI_BYTES: Final = 16

_REQUIRED_BY_TYP: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"at+jwt": ("iss", "exp", "aud", "sub", "client_id", "iat", "jti")}  # RFC 9068 §2.2
)


@dataclass(frozen=True, slots=True)
class IssueRules:
    """The rules of a profile, compiled once per key per snapshot. Durations in seconds."""

    issuer: str
    typ: str
    default_lifetime: int
    max_token_ttl: int
    clock_skew: int


@dataclass(frozen=True, slots=True)
class IssuedClaims:
    """A payload ready to be signed: compact JSON in UTF-8. `expires_at` is a NumericDate."""

    payload: bytes
    jti: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class CheckedInput:
    """A signing input that complies with the rules: the caller's bytes, unchanged. `expires_at` is a NumericDate."""

    data: bytes
    jti: str | None
    expires_at: int


def issue(rules: IssueRules, claims: Mapping[str, object], *, now: int, expires_in: int | None) -> IssuedClaims:
    """Complete a caller's claims under the rules: iss, iat, exp and jti come first, then the caller's in their order.

    `now` is a NumericDate; `expires_in` a lifetime in whole seconds, or None for the claims' exp or else the default
    lifetime. Raises ClaimsRefused, naming the claim.
    """
    _check_values(claims)
    _check_registered(rules, claims, now=now)
    exp = claims.get("exp")
    if expires_in is not None:
        if "exp" in claims:
            raise ClaimsRefused("exp and expires_in are both given; send one of them.", fields={"claim": "exp"})
        exp = now + _lifetime(rules, expires_in)
    elif exp is None:
        exp = now + min(rules.default_lifetime, rules.max_token_ttl)
    assert isinstance(exp, int)
    _check_not_before(claims, exp)

    jti = claims.get("jti")
    if not isinstance(jti, str):
        jti = b64u_encode(secrets.token_bytes(_JTI_BYTES))
    complete: dict[str, object] = {"iss": rules.issuer, "iat": now, "exp": exp, "jti": jti}
    complete.update(claims)
    _check_required(rules, complete)
    try:
        payload = strictjson.dumps(complete)
    except (ValueError, TypeError):
        raise ClaimsRefused("The claims cannot be written as JSON.") from None
    return IssuedClaims(payload=payload, jti=jti, expires_at=exp)


def check_signing_input(rules: IssueRules, signing_input: str, *, alg: str, kid: str, now: int) -> CheckedInput:
    """Check a caller's signing input, ``base64url(header).base64url(payload)``, against the rules of `issue`.

    The header has exactly alg, kid and typ with exactly the pinned version's values; iss and exp are mandatory, since
    nothing is added. Raises SigningInputRefused.
    """
    head, dot, body = signing_input.partition(".")
    if not dot or "." in body:
        raise SigningInputRefused("A signing input is two base64url segments with one dot between them.")
    _check_header(head, alg, kid, rules.typ)
    claims = _object("payload", body)
    try:
        _check_values(claims)
        _check_registered(rules, claims, now=now)
        for name in ("iss", "exp"):
            if name not in claims:
                raise ClaimsRefused(f"{name} is missing; nothing is added to a signing input.", fields={"claim": name})
        exp, jti = claims["exp"], claims.get("jti")
        assert isinstance(exp, int)
        _check_not_before(claims, exp)
        _check_required(rules, claims)
    except ClaimsRefused as error:
        raise SigningInputRefused(error.detail, fields=error.fields) from None
    return CheckedInput(data=signing_input.encode("ascii"), jti=jti if isinstance(jti, str) else None, expires_at=exp)


# --- the header -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _check_header(segment: str, alg: str, kid: str, typ: str) -> None:
    """Cached, because a client sends the same header with every token; a refusal is not cached."""
    if len(segment) > _MAX_HEADER_LENGTH:
        raise SigningInputRefused(f"The header has {len(segment)} characters; {_MAX_HEADER_LENGTH} are read at most.")
    header = _object("header", segment)
    for name, value in (("alg", alg), ("kid", kid), ("typ", typ)):
        if name not in header:
            raise SigningInputRefused(f"The header has no {name}; it must be {value!r}.", fields={"header": name})
        if header[name] != value:
            raise SigningInputRefused(f"The header's {name} is not {value!r}.", fields={"header": name})
    for name in header:
        if name not in ("alg", "kid", "typ"):
            raise SigningInputRefused(
                f"The header holds {_short(name)}; only alg, kid and typ are signed.", fields={"header": name[:64]}
            )


def _object(name: str, segment: str) -> dict[str, object]:
    try:
        return strictjson.loads_object(b64u_decode(segment))
    except MalformedBody as error:
        raise SigningInputRefused(f"The {name}: {error.detail}") from None
    except ValueError as error:
        raise SigningInputRefused(f"The {name}: {error}.") from None


# --- values of every claim --------------------------------------------------------------------------------------------


def _check_values(claims: Mapping[str, object]) -> None:
    """Integers within ±2^53 at any depth, finite numbers, JSON's types, and no deeper than JSON is read."""
    for name, value in claims.items():
        kind = type(value)
        if kind is str or value is None or kind is bool:
            continue
        if kind is dict or kind is list:
            _check_nested(name, value)
        else:
            _check_scalar(name, value)


def _check_nested(name: str, value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[object] = []
        for node in level:
            for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
                if isinstance(child, dict | list):
                    deeper.append(child)
                else:
                    _check_scalar(name, child)
        if not deeper:
            return
        level = deeper
    raise ClaimsRefused(f"{_short(name)} is nested more than {MAX_DEPTH} deep.", fields={"claim": name[:64]})


def _check_scalar(name: str, value: object) -> None:
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int):
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise ClaimsRefused(
                f"{_short(name)} holds an integer beyond ±2^53, which receivers would read as another number.",
                fields={"claim": name[:64]},
            )
    elif not isinstance(value, float) or not math.isfinite(value):
        raise ClaimsRefused(f"{_short(name)} holds a value that JSON cannot hold.", fields={"claim": name[:64]})


# --- registered claims (RFC 7519 §4.1) --------------------------------------------------------------------------------


def _check_registered(rules: IssueRules, claims: Mapping[str, object], *, now: int) -> None:
    for name, check in _CHECKS.items():
        if name in claims:
            check(rules, claims[name], now)


def _check_iss(rules: IssueRules, value: object, now: int) -> None:
    if value != rules.issuer:
        raise ClaimsRefused(f"iss is not the key set's issuer {rules.issuer!r}; leave it out.", fields={"claim": "iss"})


def _check_sub(rules: IssueRules, value: object, now: int) -> None:
    if not isinstance(value, str):
        raise ClaimsRefused("sub is not a string.", fields={"claim": "sub"})


def _check_client_id(rules: IssueRules, value: object, now: int) -> None:
    if rules.typ == "at+jwt" and not isinstance(value, str):
        raise ClaimsRefused("client_id is not a string.", fields={"claim": "client_id"})


def _check_aud(rules: IssueRules, value: object, now: int) -> None:
    audiences = value if isinstance(value, list) else [value]
    if not audiences or not all(isinstance(audience, str) and audience for audience in audiences):
        raise ClaimsRefused("aud is neither a non-empty string nor a non-empty array of them.", fields={"claim": "aud"})


def _check_exp(rules: IssueRules, value: object, now: int) -> None:
    exp = _numeric_date("exp", value)
    if exp <= now:
        raise ClaimsRefused(
            f"exp {exp} is not in the future; it is {now}.", fields={"claim": "exp", "given": exp, "now": now}
        )
    if exp - now > rules.max_token_ttl:
        raise _too_long("exp", rules, exp - now)


def _check_iat(rules: IssueRules, value: object, now: int) -> None:
    iat = _numeric_date("iat", value)
    if abs(iat - now) > rules.clock_skew:
        raise ClaimsRefused(
            f"iat {iat} is {abs(iat - now)} s from now, {now}; {rules.clock_skew} s are allowed.",
            fields={"claim": "iat", "given": iat, "now": now, "limit": rules.clock_skew},
        )


def _check_nbf(rules: IssueRules, value: object, now: int) -> None:
    _numeric_date("nbf", value)


def _check_jti(rules: IssueRules, value: object, now: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_JTI_LENGTH:
        raise ClaimsRefused(
            f"jti is not a string of 1 to {MAX_JTI_LENGTH} characters.",
            fields={"claim": "jti", "limit": MAX_JTI_LENGTH},
        )


_CHECKS: Final[Mapping[str, Callable[[IssueRules, object, int], None]]] = MappingProxyType(
    {
        "iss": _check_iss,
        "sub": _check_sub,
        "aud": _check_aud,
        "exp": _check_exp,
        "nbf": _check_nbf,
        "iat": _check_iat,
        "jti": _check_jti,
        "client_id": _check_client_id,
    }
)


def _check_not_before(claims: Mapping[str, object], exp: int) -> None:
    nbf = claims.get("nbf")
    if isinstance(nbf, int) and nbf > exp:
        raise ClaimsRefused(f"nbf {nbf} is after exp {exp}.", fields={"claim": "nbf", "given": nbf, "limit": exp})


def _check_required(rules: IssueRules, claims: Mapping[str, object]) -> None:
    for name in _REQUIRED_BY_TYP.get(rules.typ, ()):
        if name not in claims:
            raise ClaimsRefused(f"{name} is missing; typ {rules.typ} requires it (RFC 9068).", fields={"claim": name})


def _lifetime(rules: IssueRules, expires_in: object) -> int:
    if type(expires_in) is not int or expires_in < 1:
        raise ClaimsRefused("expires_in is not an integer of at least 1 second.", fields={"claim": "expires_in"})
    if expires_in > rules.max_token_ttl:
        raise _too_long("expires_in", rules, expires_in)
    return expires_in


def _too_long(name: str, rules: IssueRules, given: int) -> ClaimsRefused:
    shown = str(given) if given <= MAX_INTEGER else "more than 2^53"
    return ClaimsRefused(
        f"{name} asks for a lifetime of {shown} s; this key signs at most {rules.max_token_ttl} s (I3).",
        fields={"claim": name, "given": min(given, MAX_INTEGER), "limit": rules.max_token_ttl},
    )


def _numeric_date(name: str, value: object) -> int:
    if type(value) is not int:
        raise ClaimsRefused(f"{name} is not an integer NumericDate, seconds since 1970.", fields={"claim": name})
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
