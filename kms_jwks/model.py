"""The objects of the registry as frozen values: key sets, keys, key versions and their states, callers, processes.

Instants are integer microseconds since 1970-01-01T00:00:00Z, durations whole seconds. Nothing here reads a clock,
a database or a module.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, NewType, TypeAlias

Instant = NewType("Instant", int)
"""Microseconds since the epoch, UTC."""
Id = NewType("Id", str)
"""A UUIDv7 in its text form (RFC 9562 §5.7)."""

SECOND = 1_000_000
"""Microseconds."""
DAY = 86_400
"""Seconds."""

MAX_NAME: Final = 63
"""Characters of the longest name."""
NAME_PATTERN: Final = f"[a-z0-9][a-z0-9-]{{0,{MAX_NAME - 1}}}"
"""The grammar of names, as a regular expression that has to match the whole name."""
NAME_RULE: Final = f"1 to {MAX_NAME} of a-z, 0-9 and '-', beginning with a letter or digit"
"""`NAME_PATTERN` in words."""
_NAME: Final = re.compile(NAME_PATTERN)

MAX_KID: Final = 255
"""Characters of the longest kid."""
KID_RULE: Final = (
    f"1 to {MAX_KID} printable characters, no space at the beginning or end, "
    "and no part between slashes that is '.' or '..'"
)
"""The grammar of every kid, in words: `kid_error` checks it."""

DEFAULT_CACHE_LIFETIME: Final = 300
"""Seconds for which verifiers may keep the JWKS of a key set that was created without another value."""
DEFAULT_STALE_IF_ERROR: Final = 3600
"""Seconds for which caches may go on serving such a JWKS while the service does not answer (RFC 5861 §4)."""
DEFAULT_API_TOKEN_LIFETIME: Final = 90 * DAY
MAX_API_TOKEN_LIFETIME: Final = 366 * DAY
"""Seconds an API token is valid when it was created without another value, and at most."""
DEFAULT_TOKEN_OVERLAP: Final = DAY
MAX_TOKEN_OVERLAP: Final = 30 * DAY
"""Seconds for which a rotated API token still works beside its successor, without another value, and at most."""
EXPIRY_NOTICE: Final = 30 * DAY
"""Seconds before its end from which an API token, a certificate or an external key is reported."""

RESERVED_NAMES = frozenset(
    {
        *("v1", "healthz", "readyz", "metrics", "docs", "openapi", "well-known", "console", "static"),
        *(
            "key-sets",
            "keys",
            "versions",
            "external-keys",
            "clients",
            "tokens",
            "grants",
            "nodes",
            "workers",
            "backends",
        ),
        *("approvals", "events", "checkpoints", "active", "jwt", "jws", "signature", "verify", "public-key"),
        *("rotate", "disable", "enable", "activate", "retire", "revoke", "destroy", "cancel-destroy", "safety"),
        *("attributes", "timeline", "revocations", "custodian"),
    }
)


def new_id() -> Id:
    """A fresh UUIDv7: 48 bits of Unix milliseconds, then 74 random bits (RFC 9562 §5.7)."""
    raw = (time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10)
    value = int.from_bytes(raw, "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    return Id(str(uuid.UUID(int=value)))


def ends_soon(made: Instant, end: Instant, now: Instant) -> bool:
    """Whether what was made at `made` and is valid until `end` ends within `EXPIRY_NOTICE`; False once it has ended.

    What was made for a day or less is meant to end soon and is not reported.
    """
    return now < end <= now + EXPIRY_NOTICE * SECOND and end - made > DAY * SECOND


def is_name(text: str) -> bool:
    """Whether the whole of `text` fits the grammar of names."""
    return _NAME.fullmatch(text) is not None


def name_error(name: str) -> str | None:
    """Why `name` is not a valid name; None when it fits `NAME_PATTERN` and is not a word that routes use."""
    if not is_name(name):
        return f"a name is {NAME_RULE}"
    if name in RESERVED_NAMES:
        return f"{name!r} is a word that routes use"
    return None


def kid_error(kid: str) -> str | None:
    """Why `kid` is not a valid kid; None when it is one.

    The grammar is the same for computed, adopted and external keys: every kid that it allows can be shown in one line
    and named in a URL, which control characters, outer spaces and dot segments (RFC 3986 §5.2.4) cannot.
    """
    if not 1 <= len(kid) <= MAX_KID:
        return f"a kid has 1 to {MAX_KID} characters, this one {len(kid)}"
    if not kid.isprintable():
        return "it holds characters that cannot be printed"
    if kid != kid.strip(" "):
        return "it begins or ends with a space"
    if not {".", ".."}.isdisjoint(kid.split("/")):
        return "'.' and '..' are no kids, and no parts of one between slashes: a URL drops them"
    return None


class Access(StrEnum):
    """Whether a key set's JWKS is open to every caller."""

    PUBLIC = "public"
    RESTRICTED = "restricted"


class Purpose(StrEnum):
    """What a key set's keys may sign; fixed at creation."""

    JWT = "jwt"
    RAW = "raw"


class VersionState(StrEnum):
    """The life of a key version; after NIST SP 800-57 part 1, section 7."""

    CREATING = "creating"
    PUBLISHED = "published"
    ACTIVE = "active"
    RETIRING = "retiring"
    RETIRED = "retired"
    REVOKED = "revoked"
    DESTROYED = "destroyed"

    @property
    def in_jwks(self) -> bool:
        """Whether verifiers find such a version in the JWKS."""
        return self in IN_JWKS

    def may_become(self, other: VersionState) -> bool:
        """Whether the table of transitions allows it."""
        return other in TRANSITIONS[self]


_S = VersionState
TRANSITIONS: Mapping[VersionState, frozenset[VersionState]] = MappingProxyType(
    {
        # A pair that is not published yet can be compromised too.
        _S.CREATING: frozenset({_S.PUBLISHED, _S.REVOKED, _S.DESTROYED}),
        _S.PUBLISHED: frozenset({_S.ACTIVE, _S.RETIRED, _S.REVOKED}),
        _S.ACTIVE: frozenset({_S.RETIRING, _S.REVOKED}),
        _S.RETIRING: frozenset({_S.RETIRED, _S.REVOKED}),
        _S.RETIRED: frozenset({_S.REVOKED, _S.DESTROYED}),
        _S.REVOKED: frozenset({_S.DESTROYED}),
        _S.DESTROYED: frozenset(),
    }
)
IN_JWKS = frozenset({_S.PUBLISHED, _S.ACTIVE, _S.RETIRING})


@dataclass(frozen=True, slots=True)
class Policy:
    """The rotation policy of a key; every duration in seconds. Rules: `timeline.policy_problems`."""

    rotate_every: int = 90 * DAY
    publish_lead: int = DAY
    allow_unsafe_publish_lead: bool = False
    max_token_ttl: int = 3600
    clock_skew: int = 300
    handover: int = 60
    destroy_after: int = 30 * DAY
    rotate_jitter: int = 3600
    """A scheduled rotation comes up to this much early, by an amount that is fixed per version; never more than a tenth
    of `rotate_every`."""
    rotate_window: str = ""
    """When planned steps may happen, e.g. ``mon-thu 09:00-16:00`` (UTC); empty: at any time."""
    hold_until: Instant | None = None
    """No planned activation before this instant."""


Typ: TypeAlias = Literal["JWT", "at+jwt"]
"""The header's `typ` of the tokens that a profile signs; `at+jwt` is that of RFC 9068."""


@dataclass(frozen=True, slots=True)
class SigningProfile:
    """The claims that a client may have signed with a key. One profile, `default`, per key."""

    name: str = "default"
    typ: Typ = "JWT"
    default_lifetime: int = 300
    """Seconds a token lives when the caller names no lifetime; never more than the policy's max_token_ttl."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """A named JWKS, one per issuer."""

    id: Id
    name: str
    issuer: str
    access: Access
    purpose: Purpose
    cache_lifetime: int
    stale_if_error: int
    existing_issuer: bool
    created_at: Instant
    updated_at: Instant
    first_published_at: Instant | None = None
    """When its document first held a key; before, the JWKS is 404 with no-store."""
    first_activated_at: Instant | None = None
    """When one of its versions could first sign; the issuer is immutable from then on."""
    revision: int = 1
    retired_at: Instant | None = None
    """Since when its keys are retired and it takes no new one."""
    deleted_at: Instant | None = None
    """When it was deleted, before it had published anything. The row is a tombstone; its name and issuer are free."""


@dataclass(frozen=True, slots=True)
class Key:
    """A logical signing key in a key set."""

    id: Id
    key_set_id: Id
    name: str
    alg: str
    rsa_bits: int | None
    backend: str
    policy: Policy
    profile: SigningProfile
    created_at: Instant
    updated_at: Instant
    disabled_at: Instant | None = None
    revision: int = 1
    retired_at: Instant | None = None
    """Since when it signs no longer, for ever. A retired key is disabled too."""
    deleted_at: Instant | None = None
    """When it was deleted, before it had published anything. The row is a tombstone; its name is free."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest values in force while a version could sign, in seconds: what I2 counts with."""

    max_token_ttl: int = 0
    clock_skew: int = 0
    handover: int = 0
    lease: int = 0
    cache_lifetime: int = 0

    def widened(self, other: Bounds) -> Bounds:
        """The larger of each."""
        return Bounds(
            max(self.max_token_ttl, other.max_token_ttl),
            max(self.clock_skew, other.clock_skew),
            max(self.handover, other.handover),
            max(self.lease, other.lease),
            max(self.cache_lifetime, other.cache_lifetime),
        )


@dataclass(frozen=True, slots=True)
class Breach:
    """An invariant that was overridden on purpose. The record stays on the version."""

    invariant: str
    at: Instant
    reason: str
    who: str | None = None
    """The client that overrode it; None when an emergency revocation did."""


class Origin(StrEnum):
    """How a version came to its key pair."""

    GENERATED = "generated"
    ADOPTED = "adopted"


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One key pair in a module. `kid`, `ref` and `public_jwk` are None only until the pair is made."""

    id: Id
    key_set_id: Id
    key_id: Id
    number: int
    alg: str
    rsa_bits: int | None
    backend: str
    state: VersionState
    created_at: Instant
    kid: str | None = None
    ref: Mapping[str, str] | None = None
    public_jwk: Mapping[str, str] | None = None
    x5c: tuple[str, ...] = ()
    """Certificate chain, base64 DER, leaf first (RFC 7517 §4.7)."""
    evidence: Mapping[str, object] | None = None
    bounds: Bounds = field(default_factory=Bounds)
    first_fill: bool = False
    """It was in the first document its key set ever published, so it may skip publish_lead (I1)."""
    published_at: Instant | None = None
    published_epoch: int | None = None
    """The epoch counter whose snapshot first held it."""
    visible_since: Instant | None = None
    activated_at: Instant | None = None
    deactivated_at: Instant | None = None
    retired_at: Instant | None = None
    revoked_at: Instant | None = None
    revoke_reason: str | None = None
    destroy_at: Instant | None = None
    destroyed_at: Instant | None = None
    breaches: tuple[Breach, ...] = ()
    origin: Origin = Origin.GENERATED
    weaknesses: tuple[str, ...] = ()
    """The guarantees that an adopted key lacks, in words; an administrator accepted them, and every list shows them."""
    emergency: bool = False
    """It took over from a revoked version. A verifier that never refreshes its cache may not know it, so a second
    rotation follows as soon as its own standby is old enough."""
    destroy_told: Instant | None = None
    """The destruction date that the module was given, or declined because it has no waiting period of its own."""
    absence: Mapping[str, object] | None = None
    """The module's answer to the search for the destroyed key: the evidence that the key is gone."""
    failure: Mapping[str, str] | None = None
    """Why it was destroyed without ever being published: ``code`` (a problem code) and ``detail``."""


@dataclass(frozen=True, slots=True)
class ExternalKeyChange:
    """One change of an external key: what happened, when, by which client, and its date from then on."""

    what: str
    """`added`, `moved` (its date), `removed`, `expired` (its date came), `adopted` (a version took its place) or
    `revoked`."""
    at: Instant
    remove_at: Instant
    who: str | None = None
    """The client; None where the custodian acted."""


@dataclass(frozen=True, slots=True)
class ExternalKey:
    """A foreign public key that a key set publishes until `remove_at`; verify-only.

    A key that was removed and is added again is a further record under the same kid.
    """

    id: Id
    key_set_id: Id
    kid: str
    alg: str
    public_jwk: Mapping[str, str]
    created_at: Instant
    remove_at: Instant
    removed_at: Instant | None = None
    created_by: str | None = None
    """The client that added it; None where it was added before this was recorded."""
    revoked_at: Instant | None = None
    """When a revocation withdrew it: the public key is never published again."""
    revoke_reason: str | None = None
    changes: tuple[ExternalKeyChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Client:
    """An authenticated caller."""

    id: Id
    name: str
    created_at: Instant
    deleted_at: Instant | None = None


@dataclass(frozen=True, slots=True)
class ApiToken:
    """A client's bearer token; the registry knows its SHA-256 (lower-case hex) alone."""

    id: Id
    client_id: Id
    sha256: str
    created_at: Instant
    expires_at: Instant
    revoked_at: Instant | None = None
    last_used_at: Instant | None = None
    replaced_by: Id | None = None
    """The token that it was rotated to."""

    def ends_soon(self, now: Instant) -> bool:
        """Whether its end is to be reported: not that of a token that was revoked or rotated already."""
        settled = self.revoked_at is not None or self.replaced_by is not None
        return not settled and ends_soon(self.created_at, self.expires_at, now)


@dataclass(frozen=True, slots=True)
class Grant:
    """client × role × scope. Both ids None: everything; `key_id` None: the whole key set."""

    id: Id
    client_id: Id
    role: str
    created_at: Instant
    key_set_id: Id | None = None
    key_id: Id | None = None
    deleted_at: Instant | None = None
    created_by: str | None = None
    """The client that gave it; None where `init` did, or where it was given before this was recorded."""
    accepted_combined_duties: bool = False
    """It was given although the client then administrates what it signs or overrides (`access.combined_duties`)."""


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """(incarnation, counter). Two epochs compare only within one incarnation."""

    incarnation: str
    counter: int
    link: str = field(default="", compare=False)
    """SHA-256 over the chain of all changes up to this epoch, lower-case hex; empty in a worker's confirmation.

    Two registries that were copies of each other have the same link as long as both hold the same changes.
    """

    def is_same(self, other: Epoch | None) -> bool:
        """Whether both are the same epoch of the same history; the numbers alone can be equal after a rollback."""
        return other is not None and self == other and self.link == other.link

    def reaches(self, other: Epoch) -> bool:
        """Whether a worker that confirmed this epoch works under `other` or a later one."""
        return self.incarnation == other.incarnation and self.counter >= other.counter


@dataclass(frozen=True, slots=True)
class Worker:
    """One registered process that serves requests. It counts until it stopped, was found dead, or was forgotten."""

    id: Id
    node: str
    pid: int
    lease: int
    """Its signing lease in seconds."""
    started_at: Instant
    heartbeat_at: Instant
    confirmed: Epoch | None = None
    stopped_at: Instant | None = None
    stop_reason: str | None = None
    """`stopped`, `died` or `forgotten`."""
    backends: Mapping[str, str] | None = None
    """The last state of each configured backend in this worker: `ok`, or the code of the error."""


class IntentKind(StrEnum):
    """The kind of change that the custodian makes in a module."""

    GENERATE = "generate"
    DESTROY = "destroy"
    TELL = "tell"
    """Give the module a version's destruction date, or cancel it there."""


class IntentState(StrEnum):
    """A crash leaves an intent in `started`; the next acting custodian abandons it."""

    PENDING = "pending"
    STARTED = "started"
    DONE = "done"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Intent:
    """One attempt to change a module, written before the attempt. `label` is the label that the pair gets there."""

    id: Id
    kind: IntentKind
    version_id: Id
    backend: str
    label: str
    state: IntentState
    created_at: Instant
    not_before: Instant
    attempt: int = 1
    term: int | None = None
    """The custodian term that started it."""
    finished_at: Instant | None = None
    error: str | None = None


IDEMPOTENCY_LIFETIME: Final = DAY
"""Seconds for which a creation's Idempotency-Key is kept."""


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """A creation that named an Idempotency-Key: the same call of the same client finds here what the first one made."""

    id: Id
    client_id: Id
    key: str
    """As the client sent it."""
    call: str
    """SHA-256 of the route, its names and the body, lower-case hex."""
    created_id: Id
    """The object that the call made."""
    created_at: Instant
    expires_at: Instant


@dataclass(frozen=True, slots=True)
class CustodianLease:
    """Which custodian acts. `term` grows with each take-over; a step commits only under the term it began with."""

    term: int
    holder: str
    node: str
    renewed_at: Instant
    expires_at: Instant
    since: Instant | None = None
    """When this term began."""
    halted: str | None = None
    """Why the custodian has stopped acting, e.g. a step of the clock; None while it works."""


@dataclass(frozen=True, slots=True)
class Installation:
    """The registry as a whole. `id` stands in module labels: 8 base32 characters, lower case."""

    id: str
    created_at: Instant
