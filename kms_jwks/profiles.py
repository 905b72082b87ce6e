"""Signing profiles: which claims a key signs, and which the service adds. Pure.

`issue` builds the payload from a caller's claims. `check_signing_input` checks a caller's own header and payload
against the same rules and changes no byte of them. Neither knows the caller or a key.
"""

from __future__ import annotations

import math
import re
import secrets
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kms_jwks import strictjson
from kms_jwks.errors import ClaimsRefused, MalformedBody, SigningInputRefused
from kms_jwks.jose import b64u_decode, b64u_encode

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_INTEGER: Final = 2**53
"""Receivers that read numbers as doubles get another number beyond ± this (RFC 7493 §2.2)."""
MAX_JTI_LENGTH: Final = 255
MAX_DEPTH: Final = strictjson.MAX_DEPTH
_MAX_HEADER_LENGTH: Final = 4096

_JTI_BYTES: Final = 16

OPTIONAL_TYP: Final = "JWT"
"""The typ that a signing input may leave out: a token without one is a JWT to its verifiers (RFC 7519 §5.1)."""

REGISTERED: Final = frozenset({"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id"})
"""The claims that a profile checks (RFC 7519 §4.1, RFC 9068 §2.2). No other name may fold to one of them."""

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
    lifetime. A lifetime counts from `now`, or from the caller's iat where that is later. Raises ClaimsRefused, naming
    the claim.
    """
    lifetime = min(rules.default_lifetime, rules.max_token_ttl)
    if expires_in is not None:
        if "exp" in claims:
            raise ClaimsRefused("exp and expires_in are both given; send one of them.", fields={"claim": "exp"})
        if type(expires_in) is not int or expires_in < 1:
            raise ClaimsRefused("expires_in is not an integer of at least 1 second.", fields={"claim": "expires_in"})
        if expires_in > rules.max_token_ttl:
            raise _too_long("expires_in", expires_in, rules)
        lifetime = expires_in
    iat = claims.get("iat")
    start = max(now, iat) if type(iat) is int else now
    jti = claims["jti"] if "jti" in claims else b64u_encode(secrets.token_bytes(_JTI_BYTES))

    complete: dict[str, object] = {"iss": rules.issuer, "iat": now, "exp": start + lifetime, "jti": jti}
    complete.update(claims)
    _check_names_and_values(complete)
    _check_registered(rules, complete)
    exp = _check_times(rules, complete, now)
    try:
        payload = strictjson.dumps(complete)
    except (ValueError, TypeError):
        raise ClaimsRefused("The claims cannot be written as JSON.") from None
    assert isinstance(jti, str)
    return IssuedClaims(payload=payload, jti=jti, expires_at=exp)


def check_signing_input(rules: IssueRules, signing_input: str, *, alg: str, kid: str, now: int) -> CheckedInput:
    """Check a caller's signing input, ``base64url(header).base64url(payload)``, against the rules of `issue`.

    The header has alg, kid and typ with exactly the pinned version's values and no other member; typ may be missing
    where it is JWT. iss and exp are mandatory, since nothing is added. Raises SigningInputRefused.
    """
    head, dot, body = signing_input.partition(".")
    if not dot or "." in body:
        raise SigningInputRefused("A signing input is two base64url segments with one dot between them.")
    _check_header(head, alg, kid, rules.typ)
    claims = _object("payload", body)
    try:
        for name in ("iss", "exp"):
            if name not in claims:
                raise ClaimsRefused(f"{name} is missing; nothing is added to a signing input.", fields={"claim": name})
        _check_names_and_values(claims)
        _check_registered(rules, claims)
        exp = _check_times(rules, claims, now)
    except ClaimsRefused as error:
        raise SigningInputRefused(error.detail, fields=error.fields) from None
    jti = claims.get("jti")
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
            if name == "typ" and typ == OPTIONAL_TYP:
                continue
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


# --- names and values of every claim ----------------------------------------------------------------------------------

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _check_names_and_values(claims: Mapping[str, object]) -> None:
    """Names that each decoder reads alike; integers within ±2^53 at any depth, finite numbers, and JSON's types."""
    for name, value in claims.items():
        if name not in REGISTERED:
            plain = name.isascii() and name.isprintable()
            if not plain or name.lower().replace(" ", "") in REGISTERED:
                _check_unusual_name(name)
        if type(value) is str or (type(value) is int and -MAX_INTEGER <= value <= MAX_INTEGER):
            continue
        if isinstance(value, dict | list):
            _check_nested(name, value)
        else:
            _check_scalar(name, value)


def _check_unusual_name(name: str) -> None:
    """Refuse control characters, and a name that some decoder takes for a registered claim that the profile checks.

    Go's encoding/json, for one, matches names without regard to case, ſ for s and K (Kelvin) for k included, and the
    last match wins.
    """
    if _CONTROL.search(name):
        raise _control_character(name, name)
    folded = _fold(name)
    if folded in REGISTERED:
        raise ClaimsRefused(
            f"Some decoders read the claim {_short(name)} as {folded} (Go's encoding/json ignores case). "
            f"Send {folded} itself, or rename the claim.",
            fields={"claim": name[:64], "read_as": folded},
        )


def _fold(name: str) -> str:
    """A name as the most tolerant decoder reads it, without what comes after more characters than any claim here has.

    Tolerant is: without regard to case, to compatibility forms (NFKD: ſ, K, full-width letters), to accents (Java's
    equalsIgnoreCase takes U+0130 and U+0131 for i), to spaces, and to characters that are not shown.
    """
    folded = ""
    for char in name:
        for plain in unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold()):
            if unicodedata.category(plain)[0] not in "MCZ" and plain not in _FILLERS:
                folded += "i" if plain == "\u0131" else plain
        if len(folded) > _LONGEST:
            break
    return folded


_LONGEST: Final = max(map(len, REGISTERED))
_FILLERS: Final = "\u115f\u1160"
"""Letters to Unicode that are not shown (Default_Ignorable_Code_Point); NFKD makes the other two fillers of these."""


def _control_character(claim: str, name: str) -> ClaimsRefused:
    return ClaimsRefused(
        f"The name {_short(name)} holds a control character. Rename the claim.", fields={"claim": claim[:64]}
    )


def _check_nested(name: str, value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[object] = []
        for node in level:
            if isinstance(node, dict):
                for member in node:
                    if _CONTROL.search(member):
                        raise _control_character(name, member)
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


def _check_registered(rules: IssueRules, claims: Mapping[str, object]) -> None:
    """Check the registered claims of a payload that has iss, besides its times."""
    if claims["iss"] != rules.issuer:
        raise ClaimsRefused(f"iss is not the key set's issuer {rules.issuer!r}; leave it out.", fields={"claim": "iss"})
    for name in _REQUIRED_BY_TYP.get(rules.typ, ()):
        if name not in claims:
            raise ClaimsRefused(f"{name} is missing; typ {rules.typ} requires it (RFC 9068).", fields={"claim": name})
    for name in ("sub", "client_id") if rules.typ in _REQUIRED_BY_TYP else ("sub",):
        if not isinstance(claims.get(name, ""), str):
            raise ClaimsRefused(f"{name} is not a string.", fields={"claim": name})
    if "aud" in claims:
        aud = claims["aud"]
        audiences = aud if isinstance(aud, list) else [aud]
        if not audiences or not all(isinstance(audience, str) and audience for audience in audiences):
            raise ClaimsRefused(
                "aud is neither a non-empty string nor a non-empty array of them.", fields={"claim": "aud"}
            )
    if "jti" in claims:
        jti = claims["jti"]
        if not isinstance(jti, str) or not 1 <= len(jti) <= MAX_JTI_LENGTH:
            raise ClaimsRefused(
                f"jti is not a string of 1 to {MAX_JTI_LENGTH} characters.",
                fields={"claim": "jti", "limit": MAX_JTI_LENGTH},
            )


def _check_times(rules: IssueRules, claims: Mapping[str, object], now: int) -> int:
    """Check iat, exp and nbf of a payload that has exp, which is returned.

    I3: the lifetime counts from `now`, or from iat where the issuer's clock is ahead, by clock_skew at most. So exp is
    never after now + clock_skew + max_token_ttl, and I2 counts on that (timeline/invariants.py).
    """
    dates = {"iat": now, "nbf": now}
    for name in ("iat", "exp", "nbf"):
        if name in claims:
            date = claims[name]
            if type(date) is not int:
                raise ClaimsRefused(
                    f"{name} is not an integer NumericDate, seconds since 1970.", fields={"claim": name}
                )
            dates[name] = date
    iat, exp, nbf = dates["iat"], dates["exp"], dates["nbf"]
    if abs(iat - now) > rules.clock_skew:
        raise ClaimsRefused(
            f"iat {iat} is {abs(iat - now)} s from now, {now}; {rules.clock_skew} s are allowed.",
            fields={"claim": "iat", "given": iat, "now": now, "limit": rules.clock_skew},
        )
    if exp <= now:
        raise ClaimsRefused(
            f"exp {exp} is not in the future; it is {now}.", fields={"claim": "exp", "given": exp, "now": now}
        )
    if exp <= iat:
        raise ClaimsRefused(f"exp {exp} is not after iat {iat}.", fields={"claim": "exp", "given": exp, "iat": iat})
    if exp - max(now, iat) > rules.max_token_ttl:
        raise _too_long("exp", exp - max(now, iat), rules)
    if nbf > exp:
        raise ClaimsRefused(f"nbf {nbf} is after exp {exp}.", fields={"claim": "nbf", "given": nbf, "limit": exp})
    return exp


def _too_long(name: str, given: int, rules: IssueRules) -> ClaimsRefused:
    shown = str(given) if given <= MAX_INTEGER else "more than 2^53"
    return ClaimsRefused(
        f"{name} asks for a lifetime of {shown} s; this key signs at most {rules.max_token_ttl} s (I3).",
        fields={"claim": name, "given": min(given, MAX_INTEGER), "limit": rules.max_token_ttl},
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
