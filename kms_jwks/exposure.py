"""Which verifiers keep trusting a revoked key, and for how long: one row per kind of verifier. Pure.

A revocation reaches a verifier when it fetches the JWKS again. Each row says how long a product uses what it has
fetched and what it does with a `kid` it does not know; `report` turns the rows into instants. The holder of a stolen
key can sign tokens of any lifetime, so `max_token_ttl` limits nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks.model import SECOND, Instant


class Keeps(StrEnum):
    """What decides how long a verifier uses a key that it has fetched."""

    SECONDS = "seconds"
    """A fixed time, independent of the JWKS' Cache-Control."""
    MAX_AGE = "max-age"
    """The JWKS' Cache-Control, but at least `seconds`."""
    FOR_EVER = "for-ever"
    """Until an unknown kid makes it fetch again, or it is restarted."""
    WHILE_USED = "while-used"
    """For `seconds` after each token of its kid, whatever the JWKS holds by then."""
    APPLICATION = "application"
    """The library fetches nothing: the application decides."""
    UNKNOWN = "unknown"
    """Not documented."""


class UnknownKid(StrEnum):
    """What a verifier does with a token whose kid it does not know."""

    FETCHES = "fetches"
    """It fetches the JWKS."""
    WAITS = "waits"
    """It rejects the token until its copy has expired."""
    APPLICATION = "application"
    """It fetches if the application requests it, otherwise it waits."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verifier:
    """One kind of verifier. `seconds` belongs to `keeps`; `pause` is the shortest time between two forced fetches."""

    name: str
    source: str
    """The product and version that the figures come from."""
    keeps: Keeps
    seconds: int
    unknown_kid: UnknownKid
    pause: int = 0
    note: str = ""
    per_kid: bool = False
    """It keeps each key by itself: what it fetches for an unknown kid replaces no other key."""


_S, _M, _F, _U = Keeps.SECONDS, Keeps.MAX_AGE, Keeps.FOR_EVER, Keeps.UNKNOWN
_FETCHES, _WAITS, _APPLICATION = UnknownKid.FETCHES, UnknownKid.WAITS, UnknownKid.APPLICATION

SHARED_CACHE = Verifier("a CDN or shared cache in between", "RFC 9111, RFC 5861", _M, 0, _WAITS)

VERIFIERS: tuple[Verifier, ...] = (
    SHARED_CACHE,
    Verifier("jose (Node.js, browsers)", "panva/jose 6", _S, 600, _FETCHES, 30),
    Verifier("PyJWT, PyJWKClient", "PyJWT 2.15", _S, 300, _FETCHES, 30),
    Verifier("Authlib", "Authlib 1.9", _F, 0, _FETCHES),
    # JwksClient.js, wrappers/cache.js: lru-memoizer, 5 keys for 600,000 ms, by kid.
    Verifier("node-jwks-rsa", "node-jwks-rsa 4", _S, 600, _FETCHES, per_kid=True),
    Verifier("jsonwebtoken with jwks-rsa", "jsonwebtoken 9, node-jwks-rsa 4", _S, 600, _FETCHES, per_kid=True),
    # JwkProviderBuilder.java: 5 keys for 10 h, by kid; 10 fetches a minute.
    Verifier("jwks-rsa-java", "jwks-rsa-java", _S, 36_000, _FETCHES, 6, per_kid=True),
    Verifier("auth0 java-jwt with jwks-rsa-java", "java-jwt 4, jwks-rsa-java", _S, 36_000, _FETCHES, 6, per_kid=True),
    # get-jwks.js: 60 s by kid; a key that is no longer found is served from a second cache, which that use refreshes.
    Verifier("fast-jwt with get-jwks", "fast-jwt 6, get-jwks 11", Keeps.WHILE_USED, 60, _FETCHES, per_kid=True),
    # jwk.ts, SimpleJwksCache: no expiry; an unknown kid replaces the set, after 10 s if the kid before was not found.
    Verifier("aws-jwt-verify", "aws-jwt-verify 5", _F, 0, _FETCHES),
    # HttpsJwks.java, HttpsJwksVerificationKeyResolver.java: max-age, an unknown kid replaces the set every 300 ms.
    Verifier("jose4j, HttpsJwks", "jose4j 0.9", _M, 0, _FETCHES, 1),
    # jose/jwt.py: decode() takes the keys as an argument.
    Verifier("python-jose", "python-jose 3", Keeps.APPLICATION, 0, _APPLICATION),
    Verifier("Nimbus, JWKSourceBuilder", "Nimbus JOSE + JWT", _S, 300, _FETCHES, 30),
    # NimbusJwtDecoder.java: JWKSourceBuilder with its 5 min, neither refreshed ahead nor rate limited.
    Verifier("Spring Security, NimbusJwtDecoder", "Spring Security", _S, 300, _FETCHES),
    # ReactiveRemoteJWKSource.java: one set without expiry; an unknown kid replaces it.
    Verifier("Spring WebFlux, NimbusReactiveJwtDecoder", "Spring Security, reactive", _F, 0, _FETCHES),
    Verifier("go-oidc", "go-oidc 3", _F, 0, _FETCHES),
    Verifier("kube-apiserver, OIDC", "kube-apiserver", _M, 0, _WAITS),
    Verifier("jwx", "lestrrat-go/jwx 2", _M, 900, _WAITS),
    # jwk.Cache over httprc 3 (resource.go, client.go): max-age, at least 15 min; an unknown kid fetches nothing.
    Verifier("jwx, jwk.Cache", "lestrrat-go/jwx 3", _M, 900, _WAITS),
    Verifier("keyfunc, jwkset", "MicahParks/jwkset", _S, 3600, _FETCHES, 300),
    Verifier("Envoy, remote_jwks", "Envoy", _S, 600, _WAITS),
    Verifier("Istio", "Istio", _S, 3600, _WAITS, note="20 to 60 minutes"),
    Verifier(".NET, ConfigurationManager", ".NET IdentityModel", _S, 43_200, UnknownKid.APPLICATION),
    Verifier("AWS API Gateway, HTTP APIs", "AWS API Gateway developer guide", _S, 7200, UnknownKid.UNKNOWN),
    Verifier("AWS Application Load Balancer", "AWS Elastic Load Balancing", _U, 0, UnknownKid.UNKNOWN),
)
"""The table of verifiers, with the products' default settings."""


class Ends(StrEnum):
    """What ends a verifier's trust in the revoked key."""

    EXPIRY = "expiry"
    """Its copy of the JWKS expires, at `trusts_until` at the latest."""
    SUCCESSOR = "successor"
    """It cannot know the successor's kid yet, so the first token with that kid makes it fetch."""
    SECOND_ROTATION = "second-rotation"
    """It may hold the successor's kid already, so only the next kid, or a restart, makes it fetch."""
    RESTART = "restart"
    """Only a restart for certain: a thief who uses the key keeps it trusted, or no other kid will ever come."""
    APPLICATION = "application"
    """The application's next fetch."""
    UNKNOWN = "unknown"


class Learns(StrEnum):
    """How a verifier obtains the public key of the successor: the version that took over from the revoked one."""

    KNOWS = "knows"
    """Every copy that has not expired holds it."""
    FETCHES = "fetches"
    """At the first token with that kid, unless it holds it; caches and pauses can delay that to `learns_by`."""
    WAITS = "waits"
    """It gets it when its copy expires, by `learns_by`; until then it rejects the successor's tokens."""
    UNKNOWN = "unknown"
    NOTHING = "nothing"
    """There is no successor yet."""


@dataclass(frozen=True, slots=True)
class Case:
    """One revocation. Durations in seconds."""

    withdrawn_at: Instant
    """By then every worker that has confirmed the revocation publishes a JWKS without the key."""
    cache_lifetime: int
    stale_if_error: int
    has_successor: bool
    successor_visible_since: Instant | None
    second_rotation_at: Instant | None = None
    """The earliest instant at which a kid can sign that no copy from before the revocation holds."""
    is_retired: bool = False
    """The key is retired: no successor will ever come, and no second rotation."""


@dataclass(frozen=True, slots=True)
class Exposed:
    """What the revocation means for one kind of verifier."""

    verifier: Verifier
    keeps: int | None
    """Seconds for which it uses a copy; None if there is no limit."""
    trusts_until: Instant | None
    """It may accept the revoked kid until then; None if there is no limit."""
    trusts_until_behind_cache: Instant | None
    """The same for a verifier that fetches through a shared cache."""
    ends: Ends
    learns: Learns
    learns_by: Instant | None
    words: str
    cured: bool | None
    """Whether the second rotation ends its trust, at its first token with the new kid; None if that is not known."""


def report(case: Case) -> list[Exposed]:
    """Every row of the table for one revocation."""
    return [_exposed(verifier, case) for verifier in VERIFIERS]


def trusted_until(rows: Sequence[Exposed]) -> Instant | None:
    """The last instant at which a verifier with a time limit may accept the key, including shared caches."""
    return max((row.trusts_until_behind_cache for row in rows if row.trusts_until_behind_cache), default=None)


def unbounded(rows: Sequence[Exposed]) -> list[str]:
    """The verifiers whose trust has no time limit."""
    return [row.verifier.name for row in rows if row.trusts_until is None]


def _exposed(verifier: Verifier, case: Case) -> Exposed:
    keeps = _kept(verifier, case)
    behind = case.stale_if_error if verifier is SHARED_CACHE else case.cache_lifetime
    until = None if keeps is None else _after(case.withdrawn_at, keeps)
    ends = _ends(verifier, case)
    learns, learns_by = _learns(verifier, keeps, case)
    words = f"{_trust(verifier, keeps, ends, case)} {_learning(verifier, learns)}".strip()
    return Exposed(
        verifier,
        keeps,
        until,
        None if until is None else _after(until, behind),
        ends,
        learns,
        learns_by,
        words,
        False if case.is_retired else is_cured(verifier),
    )


def is_cured(verifier: Verifier) -> bool | None:
    """Whether a kid that it does not hold makes a verifier drop the revoked key; None if that is not known.

    That takes a fetch which replaces the whole set, and the second rotation's kid brings it about. Other verifiers drop
    the key when their copy expires, by a restart or a purge.
    """
    if verifier.unknown_kid in (UnknownKid.APPLICATION, UnknownKid.UNKNOWN):
        return None
    return verifier.unknown_kid is UnknownKid.FETCHES and not verifier.per_kid


def _kept(verifier: Verifier, case: Case) -> int | None:
    match verifier.keeps:
        case Keeps.SECONDS:
            return verifier.seconds
        case Keeps.MAX_AGE:
            return max(verifier.seconds, case.cache_lifetime)
        case _:
            return None


def _ends(verifier: Verifier, case: Case) -> Ends:
    if verifier.keeps in _ENDS_OF:
        return _ENDS_OF[verifier.keeps]
    if verifier.keeps is not Keeps.FOR_EVER:
        return Ends.EXPIRY
    if case.is_retired:
        return Ends.RESTART
    # A verifier cannot hold a successor that was not published before: its kid makes every verifier fetch again.
    return Ends.SECOND_ROTATION if case.successor_visible_since is not None else Ends.SUCCESSOR


_ENDS_OF = {
    Keeps.UNKNOWN: Ends.UNKNOWN,
    Keeps.APPLICATION: Ends.APPLICATION,
    Keeps.WHILE_USED: Ends.RESTART,
}


def _learns(verifier: Verifier, keeps: int | None, case: Case) -> tuple[Learns, Instant | None]:
    if not case.has_successor:
        return Learns.NOTHING, None
    seen = case.successor_visible_since
    # A shared cache may serve, for its lifetime, a document fetched just before the successor was published.
    stale = _after(case.withdrawn_at if seen is None else seen, case.cache_lifetime)
    if keeps is not None and seen is not None and _after(stale, keeps) <= case.withdrawn_at:
        return Learns.KNOWS, None
    if verifier.unknown_kid is UnknownKid.FETCHES:
        by = _after(stale, verifier.pause)
        return Learns.FETCHES, by if by > case.withdrawn_at else None
    return (Learns.UNKNOWN, None) if keeps is None else (Learns.WAITS, _after(stale, keeps))


def _trust(verifier: Verifier, keeps: int | None, ends: Ends, case: Case) -> str:
    if verifier is SHARED_CACHE:
        stale = f", {case.stale_if_error} s longer while it cannot reach this service" if case.stale_if_error else ""
        return f"Hands out the older JWKS for {keeps} s{stale}; purge it to end that."
    match ends:
        case Ends.EXPIRY:
            sooner = ", less when an unknown kid makes it fetch" if is_cured(verifier) else ""
            if verifier.per_kid:
                sooner = "; it keeps each kid by itself, so no other kid shortens that"
            note = f" ({verifier.note})" if verifier.note else ""
            return f"Trusts it for up to {keeps} s{note}{sooner}."
        case Ends.SUCCESSOR:
            return "Trusts it until the first token with the successor's kid makes it fetch, or a restart."
        case Ends.SECOND_ROTATION:
            return (
                "Trusts it until a kid from after the revocation makes it fetch (the second rotation's), or a restart."
            )
        case Ends.RESTART if verifier.keeps is Keeps.FOR_EVER:
            return "Trusts it until a restart, or until another key of the set brings a kid that it does not hold."
        case Ends.RESTART:
            return (
                f"Trusts it while a token of its kid comes at least every {verifier.seconds} s, until a restart; "
                "it keeps each kid by itself, so no other kid ends that."
            )
        case Ends.APPLICATION:
            return "It fetches nothing itself: the application decides how long it keeps a JWKS."
        case _:
            return "How long it keeps a JWKS is not documented."


def _learning(verifier: Verifier, learns: Learns) -> str:
    if verifier is SHARED_CACHE:
        return ""
    match learns:
        case Learns.KNOWS:
            return "It holds the successor's key."
        case Learns.FETCHES:
            pause = f", {verifier.pause} s after its last fetch at the earliest" if verifier.pause else ""
            return f"It fetches the successor's key when it meets its kid{pause}, unless it holds it."
        case Learns.WAITS:
            unless = ", unless the application has it fetch" if verifier.unknown_kid is UnknownKid.APPLICATION else ""
            return f"It may reject the successor's tokens until its copy expires{unless}."
        case Learns.NOTHING:
            return ""
        case _ if verifier.keeps is Keeps.APPLICATION:
            return ""
        case _:
            return "When it learns the successor's key is not documented."


def _after(instant: Instant, seconds: int) -> Instant:
    return Instant(instant + seconds * SECOND)
