"""The JSON bodies of the API as msgspec structs: what http/ reads and writes and client/ writes and reads.

Requests refuse unknown fields. Instants are RFC 3339 in UTC, durations whole seconds, binary values base64url without
padding. An absent optional field of a request keeps its default; `null` is refused unless the field allows it.
"""

from __future__ import annotations

import base64
import re
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kms_jwks import errors
from kms_jwks.algorithms import RsaBits
from kms_jwks.model import (
    DAY,
    DEFAULT_API_TOKEN_LIFETIME,
    DEFAULT_CACHE_LIFETIME,
    DEFAULT_STALE_IF_ERROR,
    DEFAULT_TOKEN_OVERLAP,
    MAX_API_TOKEN_LIFETIME,
    MAX_TOKEN_OVERLAP,
    NAME_PATTERN,
    Typ,
)

MAX_BATCH: Final = 256
"""Items of one batch."""

Name = Annotated[str, Meta(pattern=f"^{NAME_PATTERN}$", description="Immutable name.")]
Seconds = Annotated[int, Meta(ge=0, le=10 * 366 * DAY)]
Kid = Annotated[str, Meta(min_length=1, max_length=255)]
Text = Annotated[str, Meta(max_length=1024)]


class Request(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of every request body."""

    stored: ClassVar[bool] = True
    """Whether the registry may keep its texts. PostgreSQL keeps no U+0000, so `convert` refuses it everywhere."""


class Answer(Struct, kw_only=True, omit_defaults=False):
    """Base of every answer's body. Readers ignore unknown fields."""


# --- key sets and keys ------------------------------------------------------------------------------------------------


class PolicyFields(Request):
    """A rotation policy; absent fields keep their value."""

    rotate_every: Seconds | UnsetType = UNSET
    publish_lead: Seconds | UnsetType = UNSET
    allow_unsafe_publish_lead: bool | UnsetType = UNSET
    max_token_ttl: Seconds | UnsetType = UNSET
    clock_skew: Seconds | UnsetType = UNSET
    handover: Seconds | UnsetType = UNSET
    destroy_after: Seconds | UnsetType = UNSET
    rotate_jitter: Seconds | UnsetType = UNSET
    rotate_window: Annotated[str, Meta(max_length=255)] | UnsetType = UNSET
    hold_until: datetime | UnsetType | None = UNSET
    """Null removes the hold."""


class ProfileFields(Request):
    """The default signing profile; absent fields keep their value."""

    typ: Typ | UnsetType = UNSET
    default_lifetime: Seconds | UnsetType = UNSET


class Adopt(Request):
    """A key pair that a module holds already, to become a key version.

    `locator` names the pair in the backend: a label, `id=` and a CKA_ID, or a PKCS#11 URI; in AWS KMS a key id, ARN or
    alias. `accept` adopts a pair although it is weaker than one that the service makes; the version records how.
    """

    locator: Annotated[str, Meta(min_length=1, max_length=2048)]
    kid: Kid | UnsetType = UNSET
    """Its kid as verifiers know it; its thumbprint by default."""
    accept: bool = False
    public_key: Annotated[str, Meta(max_length=16_384)] | dict[str, Any] | UnsetType = UNSET
    """PEM or JWK, for a module that holds the private key alone."""


class KeyCreate(Request):
    name: Name
    alg: Annotated[str, Meta(max_length=32)]
    backend: Name | UnsetType = UNSET
    rsa_bits: RsaBits | UnsetType = UNSET
    policy: PolicyFields | UnsetType = UNSET
    profile: ProfileFields | UnsetType = UNSET
    adopt: Adopt | UnsetType = UNSET
    """The first version is this key pair; none is made."""


class VersionCreate(Request):
    adopt: Adopt | UnsetType = UNSET


class KeySetCreate(Request):
    name: Name
    issuer: Annotated[str, Meta(max_length=1024)] | UnsetType = UNSET
    access: Literal["public", "restricted"] = "public"
    purpose: Literal["jwt", "raw"] = "jwt"
    cache_lifetime: Seconds = DEFAULT_CACHE_LIFETIME
    stale_if_error: Seconds = DEFAULT_STALE_IF_ERROR
    existing_issuer: bool = False
    keys: list[KeyCreate] = []


class KeySetPatch(Request):
    issuer: Annotated[str, Meta(max_length=1024)] | UnsetType = UNSET
    access: Literal["public", "restricted"] | UnsetType = UNSET
    cache_lifetime: Seconds | UnsetType = UNSET
    stale_if_error: Seconds | UnsetType = UNSET


class KeyPatch(Request):
    policy: PolicyFields | UnsetType = UNSET
    profile: ProfileFields | UnsetType = UNSET


class Policy(Answer):
    rotate_every: int
    publish_lead: int
    allow_unsafe_publish_lead: bool
    max_token_ttl: int
    clock_skew: int
    handover: int
    destroy_after: int
    rotate_jitter: int
    rotate_window: str
    hold_until: datetime | None


class Profile(Answer):
    name: str
    typ: str
    default_lifetime: int


class Breach(Answer):
    """An invariant that was overridden; `who` is the client, null when an emergency revocation did it."""

    invariant: str
    at: datetime
    reason: str
    who: str | None = None


class Version(Answer):
    """A key version; instants of the future are null."""

    kid: str | None
    number: int
    state: str
    alg: str
    public_jwk: dict[str, Any] | None
    created_at: datetime
    backend: str
    trouble: str | None = None
    """Why the custodian's last attempt to make the pair failed; it tries again. Of a `destroyed` version: why its pair
    was never made or published. Null otherwise."""
    published_at: datetime | None = None
    visible_since: datetime | None = None
    usable_at: datetime | None = None
    """When I1 lets it sign; null while it is not visible."""
    activated_at: datetime | None = None
    deactivated_at: datetime | None = None
    retired_at: datetime | None = None
    revoked_at: datetime | None = None
    revoke_reason: str | None = None
    destroy_at: datetime | None = None
    destroyed_at: datetime | None = None
    breaches: list[Breach] = []
    origin: str = "generated"
    """`generated`, or `adopted` for a pair that was in the module before."""
    weaknesses: list[str] = []
    """The guarantees that an adopted pair lacks, in words; an administrator accepted them."""
    emergency: bool = False
    """It took over from a revoked version; a second rotation follows for verifiers that never refresh their cache."""
    absence: dict[str, Any] | None = None
    """The module's answer to the search for the destroyed pair."""


class Key(Answer):
    name: str
    key_set: str
    alg: str
    rsa_bits: int | None
    backend: str
    enabled: bool
    active_kid: str | None
    policy: Policy
    profile: Profile
    warnings: list[str]
    """Remarks that every report has to show, e.g. an unsafe publish lead."""
    created_at: datetime
    updated_at: datetime
    revision: int
    versions: list[Version]
    retired_at: datetime | None = None
    """Since when it signs no longer, for ever."""


class KeySetFields(Answer, kw_only=True):
    """What each view of a key set has."""

    name: str
    issuer: str
    access: str
    purpose: str
    cache_lifetime: int
    stale_if_error: int
    existing_issuer: bool
    jwks_uri: str
    jwks_pq_uri: str | None
    """Where its ML-DSA keys are published; null while it has none."""
    warnings: list[str]
    """Remarks that every report has to show, e.g. that the issuer's metadata is not served."""
    first_published_at: datetime | None
    created_at: datetime
    updated_at: datetime
    revision: int
    retired_at: datetime | None = None
    """Since when its keys are retired and it takes no new one."""


class KeySet(KeySetFields, kw_only=True):
    keys: list[Key]
    external_keys: list[ExternalKey] = []
    """The foreign keys that it publishes: the owner of each can sign for its issuer."""
    external_keys_removed: int = 0
    """How many others it published before; `…/external-keys` lists them."""


class KeySummary(Answer):
    """What a list of key sets shows of a key."""

    name: str
    alg: str
    enabled: bool
    active_kid: str | None


class ExternalKeySummary(Answer):
    """What a list of key sets shows of an external key that is published."""

    kid: str
    alg: str
    remove_at: datetime
    created_by: str | None


class KeySetSummary(KeySetFields, kw_only=True):
    """A key set as lists show it: its keys without their versions, policies and public keys."""

    keys: list[KeySummary]
    external_keys: list[ExternalKeySummary]
    """The owner of each can sign for the set's issuer."""


class ExternalKeyCreate(Request):
    """Exactly one of `jwk` and `pem`. `kid` and `alg` may be left out where the JWK names them."""

    remove_at: datetime
    kid: Kid | UnsetType = UNSET
    alg: Annotated[str, Meta(max_length=32)] | UnsetType = UNSET
    jwk: dict[str, Any] | UnsetType = UNSET
    pem: Annotated[str, Meta(max_length=16_384)] | UnsetType = UNSET


class ExternalKeyPatch(Request):
    """`remove_at` moves the date at which the key leaves the JWKS."""

    remove_at: datetime


class ExternalKeyChange(Answer):
    """What happened to an external key: `added`, `moved`, `removed`, `expired`, `adopted`, `revoked`.

    `remove_at` is its date from then on; `who` is the client, null where the custodian acted.
    """

    what: str
    at: datetime
    remove_at: datetime
    who: str | None = None


class ExternalKey(Answer):
    kid: str
    alg: str
    public_jwk: dict[str, Any]
    created_at: datetime
    remove_at: datetime
    removed_at: datetime | None = None
    created_by: str | None = None
    """The client that added it; null where it was added before this was recorded."""
    warnings: list[str] = []
    """Where else the same public key is in use."""
    changes: list[ExternalKeyChange] = []
    """Everything that happened under this kid, the oldest first; earlier additions and removals are among it."""
    ignored: list[str] = []
    """Members of the given JWK that are not published, such as `x5c`; only the answer to the addition has them."""


# --- life cycle -------------------------------------------------------------------------------------------------------


class BreakGlassRequest(Request):
    """`break_glass` overrides the invariant in the way; it needs a `reason` and the permission `break-glass`."""

    break_glass: bool = False
    reason: Text = ""


class RotateRequest(BreakGlassRequest):
    expected_kid: Kid | UnsetType = UNSET


class ActivateRequest(BreakGlassRequest):
    pass


class RetireRequest(BreakGlassRequest):
    pass


class RevokeRequest(Request):
    reason: Text = ""
    dry_run: bool = False
    """Answer what would happen, and change nothing."""


class RevocationCreate(Request):
    """Exactly one of `backend` and `key_set`: every version that has a key pair there is revoked, all or none."""

    reason: Annotated[str, Meta(min_length=1, max_length=1024)]
    backend: Name | UnsetType = UNSET
    key_set: Name | UnsetType = UNSET
    disable_keys: bool | UnsetType = UNSET
    """Disable the keys that would get new versions from that backend; the default is true with `backend`."""
    external_keys: bool = False
    """With `key_set`: withdraw its external keys too, for ever. Those that are a revoked key are withdrawn anyway."""
    dry_run: bool = False


class DestroyRequest(Request):
    destroy_at: datetime | UnsetType = UNSET


class UnconfirmedWorker(Answer):
    worker: str
    node: str
    heartbeat_at: datetime


class ExposedVerifier(Answer):
    """What a revocation means for one kind of verifier, by how it caches a JWKS."""

    verifier: str
    source: str
    """The source of the figures: product and version."""
    keeps: int | None
    """Seconds for which it uses a fetched JWKS; null where they have no limit."""
    trusts_until: datetime | None
    """It may accept the revoked kid until then; null where there is no limit."""
    trusts_until_behind_cache: datetime | None
    """The same for a verifier that fetches through a CDN or another shared cache."""
    ends: str
    """What ends its trust: `expiry`, `successor`, `second-rotation`, `restart`, `application`, `unknown`."""
    learns: str
    """How it gets the successor's key: `knows`, `fetches`, `waits`, `unknown`, `nothing`."""
    learns_by: datetime | None
    """When it has the key at the latest; null where that is at its first token or not known."""
    words: str
    cured_by_second_rotation: bool | None = None
    """Whether its first token with the second rotation's kid ends its trust; null where that is not known."""


class Exposure(Answer):
    """Which verifiers may go on trusting the revoked key. A thief of the key chooses the lifetime of his tokens."""

    withdrawn_at: datetime
    """By then every worker that has confirmed publishes a JWKS without the key."""
    cache_lifetime: int
    stale_if_error: int
    trusted_until: datetime | None
    """When the last verifier with a limit stops trusting it."""
    unbounded: list[str]
    """The verifiers without a known limit: each one's row says what ends its trust."""
    second_rotation_not_before: datetime | None
    """When such a kid may sign at the earliest; null where the successor's kid is one."""
    verifiers: list[ExposedVerifier]


class AffectedExternalKey(Answer):
    """An external key of a key set that an emergency touches. `withdrawn`: it left the JWKS and never comes back."""

    key_set: str
    kid: str
    alg: str
    remove_at: datetime
    withdrawn: bool
    same_key_as: str | None
    """The kid of the revoked version whose public key it is; null where it is another key."""


class SameKey(Answer):
    """A place where a revoked public key is still in use: another key set, which this revocation did not touch."""

    key_set: str
    key: str | None
    """Null for an external key."""
    kid: str
    state: str
    """The version's state, or `external`."""
    same_key_as: str
    """The kid that was revoked."""


class Revoked(Answer):
    """The effect of a revocation. `successor` signs now; `unconfirmed` workers may still serve the old JWKS."""

    version: Version
    successor: Version | None
    successor_visible_for: int | None
    """Seconds for which verifiers could fetch the successor already; null while not every worker publishes it."""
    without_successor: bool
    """Whether the key, though enabled, signs nothing until the custodian has made its next version."""
    changed: bool
    """False for a version that was revoked before."""
    unconfirmed: list[UnconfirmedWorker]
    exposure: Exposure | None
    """Null for a version that was never published."""
    dry_run: bool = False
    external_keys: list[AffectedExternalKey] = []
    """External keys of the set that are the same public key: they were withdrawn with the version."""
    same_key: list[SameKey] = []
    """Other key sets that use the same public key: revoke it there too."""


class RevokedVersion(Answer):
    """`changed` is false for a version that was revoked before."""

    key_set: str
    key: str
    version: Version
    successor: Version | None
    successor_visible_for: int | None
    changed: bool


class KeyPlace(Answer):
    key_set: str
    key: str


class SetExposure(Answer):
    key_set: str
    exposure: Exposure


class Revocation(Answer):
    """The effect of revoking every version of a backend or key set."""

    reason: str
    versions: list[RevokedVersion]
    disabled: list[KeyPlace]
    """The keys that were disabled with it."""
    without_successor: list[KeyPlace]
    """Enabled keys that sign nothing until the custodian has made their next version."""
    unconfirmed: list[UnconfirmedWorker]
    exposures: list[SetExposure]
    dry_run: bool = False
    external_keys: list[AffectedExternalKey] = []
    """External keys that were withdrawn, and with `key_set` those that stay published."""
    same_key: list[SameKey] = []
    """Other key sets that use a revoked public key: revoke it there too."""


class SafetyCheck(Answer):
    """One invariant with both sides as instants: it holds when `now_or_planned` is not before `required`."""

    invariant: str
    holds: bool
    statement: str
    left: datetime | None
    right: datetime | None


class Safety(Answer):
    kid: str | None
    state: str
    now: datetime
    checks: list[SafetyCheck]
    next: str
    """What happens next to this version, in words."""
    next_at: datetime | None
    external_keys: list[ExternalKey] = []
    """The foreign keys that the key set publishes beside the version: the owner of each can sign for its issuer."""
    external_keys_removed: int = 0
    """How many others it published before; `…/external-keys` lists them."""
    warnings: list[str] = []
    """Where else its public key is in use."""


class TimelineSpan(Answer):
    """A state and when a version is in it. `end` is null when it cannot be foreseen; `planned`: it begins later."""

    state: str
    start: datetime
    end: datetime | None
    planned: bool


class TimelineVersion(Answer):
    """`state` is `planned` for a version that is not made yet."""

    number: int
    kid: str | None
    state: str
    spans: list[TimelineSpan]
    checks: list[SafetyCheck]
    next: str
    next_at: datetime | None


class TimelineStep(Answer):
    """A step that the custodian will take; `due` is null while it waits for a condition without a date."""

    kind: str
    due: datetime | None
    number: int | None
    reason: str
    waits_for: str = ""
    """The condition that delays the step although it is due; empty where there is none."""
    breach: str | None = None
    """The invariant that the step overrides (an emergency)."""


class Timeline(Answer):
    """The life of a key: past, present, and the plan until `until`."""

    key_set: str
    key: str
    enabled: bool
    now: datetime
    until: datetime
    versions: list[TimelineVersion]
    steps: list[TimelineStep]


class Attributes(Answer):
    """The evidence that the private key was made in the module and stays there: `recorded` then, and of this call."""

    kid: str
    backend: str
    generated_in_module: bool
    non_extractable: bool
    sign_only: bool
    attributes: dict[str, Any]
    recorded: dict[str, Any]


# --- signing ----------------------------------------------------------------------------------------------------------


class JwtRequest(Request):
    stored: ClassVar[bool] = False
    claims: dict[str, Any]
    profile: Name | UnsetType = UNSET
    expires_in: Annotated[int, Meta(ge=1)] | UnsetType = UNSET


class SigningInputRequest(Request):
    stored: ClassVar[bool] = False
    signing_input: Annotated[str, Meta(max_length=65_536)]
    kid: Kid


class JwsRequest(Request):
    stored: ClassVar[bool] = False
    payload: str
    detached: bool = False
    typ: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType = UNSET
    cty: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType = UNSET


class RawSignatureRequest(Request):
    """Exactly one of `input` and `digest`."""

    stored: ClassVar[bool] = False
    input: str | UnsetType = UNSET
    digest: Annotated[str, Meta(max_length=128)] | UnsetType = UNSET
    kid: Kid | UnsetType = UNSET


class SignedJwt(Answer):
    token: str
    kid: str
    alg: str
    jti: str
    expires_at: datetime


class SignedJws(Answer):
    jws: str
    kid: str
    alg: str


class Signature(Answer):
    signature: str
    kid: str
    alg: str


class NextVersion(Answer):
    kid: str
    not_before: datetime | None


class Active(Answer):
    """`refresh_after`: when a caller that pins the kid should read this again."""

    kid: str
    alg: str
    public_jwk: dict[str, Any]
    next: NextVersion | None
    refresh_after: datetime


class VerifyRequest(Request):
    stored: ClassVar[bool] = False
    token: Annotated[str, Meta(max_length=65_536)]
    audience: Annotated[str, Meta(min_length=1, max_length=1024)]
    typ: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType = UNSET


class Verified(Answer):
    header: dict[str, Any]
    claims: dict[str, Any]
    kid: str


# --- callers ----------------------------------------------------------------------------------------------------------


class ClientCreate(Request):
    name: Name


class Client(Answer):
    name: str
    id: str
    created_at: datetime


class TokenCreate(Request):
    expires_in: Annotated[int, Meta(ge=60, le=MAX_API_TOKEN_LIFETIME)] = DEFAULT_API_TOKEN_LIFETIME


class TokenCreated(Answer):
    """`token` is not shown again."""

    token: str
    id: str
    expires_at: datetime


class TokenRotate(Request):
    """`overlap`: seconds for which the old token still works, never beyond its own end."""

    overlap: Annotated[int, Meta(ge=0, le=MAX_TOKEN_OVERLAP)] = DEFAULT_TOKEN_OVERLAP
    expires_in: Annotated[int, Meta(ge=60, le=MAX_API_TOKEN_LIFETIME)] = DEFAULT_API_TOKEN_LIFETIME


class TokenRotated(TokenCreated):
    """The new token, which is not shown again, and when the old one ends."""

    replaces: str
    """The id of the old token."""
    replaced_expires_at: datetime


class Token(Answer):
    id: str
    client: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    replaced_by: str | None = None
    """The id of the token that it was rotated to."""
    warnings: list[str] = []
    """Remarks that every report has to show, e.g. that it ends within 30 days."""


class GrantScope(Request):
    key_set: Name | UnsetType = UNSET
    key: Name | UnsetType = UNSET


class GrantCreate(Request):
    client: Name
    role: Literal["signer", "raw-signer", "verifier", "operator", "auditor", "admin", "break-glass"]
    scope: GrantScope
    accept_combined_duties: bool = False
    """Give it although the client then administrates what it signs or overrides."""


class Grant(Answer):
    id: str
    client: str
    role: str
    scope: dict[str, str]
    created_at: datetime
    created_by: str | None = None
    """The client that gave it; null where `init` did, or where it was given before this was recorded."""
    combined_with: list[str] = []
    """The ids of the client's grants whose duties it combines: one administrates what the other signs or overrides."""
    accepted_combined_duties: bool = False
    """An administrator accepted that when giving it."""


# --- operation --------------------------------------------------------------------------------------------------------


class Node(Answer):
    """One worker as the registry knows it; `lag` counts epochs it has not confirmed.

    `lease_left` is how many seconds it may go on signing at the most, as far as the registry knows; 0 when it may not.
    """

    worker: str
    node: str
    pid: int
    started_at: datetime
    heartbeat_at: datetime
    epoch: int | None
    lag: int | None
    lease: int
    lease_left: int
    live: bool
    backends: dict[str, str]
    """The last state of each backend that it used: `ok`, or the code of the error."""


class Custodian(Answer):
    """Which custodian makes, rotates and destroys keys: one of the installation acts, the others stand by."""

    acting: bool
    """Whether a custodian holds the leader lease now, and is not halted."""
    holder: str | None
    node: str | None
    term: int
    """Grows with each take-over; 0 when no custodian ever acted."""
    since: datetime | None
    renewed_at: datetime | None
    expires_at: datetime | None
    halted: str | None
    """Why it does not act, e.g. a step of the clock."""


class Backend(Answer):
    name: str
    type: str
    default: bool
    sign_in_place: bool
    state: str
    """`ok`, or the code of its error."""
    detail: str
    algorithms: list[str]
    counters: dict[str, int]
    """Counters of the answering worker since it started: signatures `checked` and found `bad`, `timeouts`, calls
    `refused` because others hang; and calls that are `stuck` now."""
    recycled: int
    """Workers of this node that were replaced within the last hour because calls did not return."""


class Dependency(Answer):
    """What readiness depends on. `detail` and `next_step` are empty for callers without the permission to see them."""

    name: str
    state: str
    """`ok`, or the problem code that a call which needs it is answered with."""
    cause: str = ""
    """Why the registry's database cannot be used, e.g. `disk_full`."""
    detail: str = ""
    next_step: str = ""


class Readiness(Answer):
    status: Literal["ok", "failing"]
    dependencies: list[Dependency]


class Page(Answer):
    """A list: `next` is the cursor of the following page, absent on the last."""

    items: list[Any]
    next: str | UnsetType = UNSET


class Problem(Answer):
    """A problem document (RFC 9457) with the next step. It may have further members, e.g. an invariant's numbers."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    next_step: str


# --- a kid in a URL ---------------------------------------------------------------------------------------------------

_PLAIN_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def kid_segment(kid: str) -> str:
    """A kid as one segment of a path: itself, or `~` and the base64url of its UTF-8 where it holds other characters.

    A proxy that decodes, normalises or merges slashes does not change the second form. Raises InvalidField for a kid
    that is empty or holds a lone surrogate.
    """
    if _PLAIN_SEGMENT.fullmatch(kid):
        return kid
    try:
        octets = kid.encode("utf-8")
    except UnicodeEncodeError:
        octets = b""
    if not octets:
        raise errors.InvalidField("kid: it is empty or no Unicode text", fields={"field": "kid"})
    return "~" + base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")


def kid_of_segment(text: str) -> str:
    """The kid that a decoded segment names: what stands after `~` is base64url. Raises NotFound."""
    if not text.startswith("~"):
        return text
    try:
        octets = base64.b64decode(text[1:] + "=" * (-len(text[1:]) % 4), altchars=b"-_", validate=True)
        kid = octets.decode("utf-8")
    except ValueError:
        kid = ""
    if not kid or "\0" in kid:
        raise errors.NotFound(
            "No kid is named: what stands after ~ in the path is not the base64url of one.",
            next_step="Write the kid itself percent-encoded, or ~ and the unpadded base64url of its UTF-8.",
        )
    return kid


# --- decoding ---------------------------------------------------------------------------------------------------------

T = TypeVar("T")
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


def convert(value: object, into: type[T]) -> T:
    """Decoded JSON as a request struct. Raises InvalidField that names the field and never repeats its value."""
    if getattr(into, "stored", False):
        _refuse_unstorable(value, "")
    try:
        return msgspec.convert(value, into)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        field = found["path"] if found else ""
        reason = text[: found.start()] if found else text
        if reason.startswith("Object contains unknown field") and not field:
            reason += f"; the fields here are {', '.join(getattr(into, '__struct_fields__', ()))}"
        raise errors.InvalidField(
            f"{field}: {reason}" if field else reason, fields={"field": field} if field else {}
        ) from None


def _refuse_unstorable(value: object, field: str) -> None:
    """Raise InvalidField for U+0000 in any text within a body whose texts the registry may keep."""
    if isinstance(value, str):
        if "\0" in value:
            raise errors.InvalidField(f"{field}: holds the character U+0000", fields={"field": field})
    elif isinstance(value, dict):
        for name, inner in value.items():
            _refuse_unstorable(name, field or "the body")
            _refuse_unstorable(inner, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _refuse_unstorable(inner, f"{field}[{place}]")
