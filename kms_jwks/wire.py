"""The JSON bodies of the API as msgspec structs: what http/ reads and writes and client/ writes and reads.

Requests refuse unknown fields. Instants are RFC 3339 in UTC, durations whole seconds, binary values base64url without
padding. An absent optional field of a request keeps the default; `null` is not accepted in its place.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kms_jwks import errors

Name = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,62}$", description="Immutable name.")]
Seconds = Annotated[int, Meta(ge=0, le=10 * 366 * 86_400)]
Kid = Annotated[str, Meta(min_length=1, max_length=255)]
Text = Annotated[str, Meta(max_length=1024)]


class Request(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of every request body."""


class Answer(Struct, kw_only=True, omit_defaults=False):
    """Base of every answer's body. Readers ignore fields they do not know."""


# --- key sets and keys ------------------------------------------------------------------------------------------------


class PolicyFields(Request):
    """A rotation policy; what is absent keeps its value."""

    rotate_every: Seconds | UnsetType = UNSET
    publish_lead: Seconds | UnsetType = UNSET
    allow_unsafe_publish_lead: bool | UnsetType = UNSET
    max_token_ttl: Seconds | UnsetType = UNSET
    clock_skew: Seconds | UnsetType = UNSET
    handover: Seconds | UnsetType = UNSET
    destroy_after: Seconds | UnsetType = UNSET


class ProfileFields(Request):
    """The default signing profile; what is absent keeps its value."""

    typ: Literal["JWT", "at+jwt"] | UnsetType = UNSET
    default_lifetime: Seconds | UnsetType = UNSET


class Adopt(Request):
    """A key pair that a module holds already, to become a key version.

    `locator` is the backend's: a label, `id=` and a CKA_ID, or a PKCS#11 URI; a key id, ARN or alias. `accept` takes
    the key although it is weaker than one that was made here, which then stands on the version.
    """

    locator: Annotated[str, Meta(min_length=1, max_length=2048)]
    kid: Kid | UnsetType = UNSET
    """Its kid as verifiers know it; its thumbprint where nothing is said."""
    accept: bool = False
    public_key: Annotated[str, Meta(max_length=16_384)] | dict[str, Any] | UnsetType = UNSET
    """PEM or JWK, for a module that holds the private key alone."""


class KeyCreate(Request):
    name: Name
    alg: Annotated[str, Meta(max_length=32)]
    backend: Name | UnsetType = UNSET
    rsa_bits: Literal[2048, 3072, 4096] | UnsetType = UNSET
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
    cache_lifetime: Seconds = 300
    stale_if_error: Seconds = 3600
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


class Profile(Answer):
    name: str
    typ: str
    default_lifetime: int


class Breach(Answer):
    invariant: str
    at: datetime
    reason: str


class Version(Answer):
    """A key version; instants that have not come are null."""

    kid: str | None
    number: int
    state: str
    alg: str
    public_jwk: dict[str, Any] | None
    created_at: datetime
    backend: str
    trouble: str | None = None
    """Why the custodian's last attempt to make the pair failed; it tries again. Null when none failed."""
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
    """Who made the pair: `generated` here, or `adopted`."""
    weaknesses: list[str] = []
    """What does not hold of an adopted key and was accepted, in words."""


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
    """What every report must show, e.g. an unsafe publish lead."""
    created_at: datetime
    updated_at: datetime
    revision: int
    versions: list[Version]


class KeySet(Answer):
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
    first_published_at: datetime | None
    created_at: datetime
    updated_at: datetime
    revision: int
    keys: list[Key]


class ExternalKeyCreate(Request):
    """Exactly one of `jwk` and `pem`."""

    kid: Kid
    alg: Annotated[str, Meta(max_length=32)]
    remove_at: datetime
    jwk: dict[str, Any] | UnsetType = UNSET
    pem: Annotated[str, Meta(max_length=16_384)] | UnsetType = UNSET


class ExternalKey(Answer):
    kid: str
    alg: str
    public_jwk: dict[str, Any]
    created_at: datetime
    remove_at: datetime
    removed_at: datetime | None = None


# --- life cycle -------------------------------------------------------------------------------------------------------


class RotateRequest(Request):
    expected_kid: Kid | UnsetType = UNSET


class RevokeRequest(Request):
    reason: Text = ""


class DestroyRequest(Request):
    destroy_at: datetime | UnsetType = UNSET


class UnconfirmedWorker(Answer):
    worker: str
    node: str
    heartbeat_at: datetime


class Revoked(Answer):
    """What a revocation did. `successor` signs now; `unconfirmed` lists workers that may still serve the old JWKS."""

    version: Version
    successor: Version | None
    unconfirmed: list[UnconfirmedWorker]


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


class Attributes(Answer):
    """The evidence of promise 1, as the module reported it when the key was made and again for this call."""

    kid: str
    backend: str
    generated_in_module: bool
    non_extractable: bool
    sign_only: bool
    attributes: dict[str, Any]
    recorded: dict[str, Any]


# --- signing ----------------------------------------------------------------------------------------------------------


class JwtRequest(Request):
    claims: dict[str, Any]
    profile: Name | UnsetType = UNSET
    expires_in: Annotated[int, Meta(ge=1)] | UnsetType = UNSET


class SigningInputRequest(Request):
    signing_input: Annotated[str, Meta(max_length=65_536)]
    kid: Kid


class JwsRequest(Request):
    payload: str
    detached: bool = False
    typ: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType = UNSET
    cty: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType = UNSET


class RawSignatureRequest(Request):
    """Exactly one of `input` and `digest`."""

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
    """`refresh_after`: when a caller that pins the kid does well to read this again."""

    kid: str
    alg: str
    public_jwk: dict[str, Any]
    next: NextVersion | None
    refresh_after: datetime


class VerifyRequest(Request):
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
    expires_in: Annotated[int, Meta(ge=60, le=366 * 86_400)] = 90 * 86_400


class TokenCreated(Answer):
    """`token` is shown this once."""

    token: str
    id: str
    expires_at: datetime


class Token(Answer):
    id: str
    client: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class GrantScope(Request):
    key_set: Name | UnsetType = UNSET
    key: Name | UnsetType = UNSET


class GrantCreate(Request):
    client: Name
    role: Literal["signer", "raw-signer", "verifier", "operator", "auditor", "admin"]
    scope: GrantScope


class Grant(Answer):
    id: str
    client: str
    role: str
    scope: dict[str, str]
    created_at: datetime


# --- operation --------------------------------------------------------------------------------------------------------


class Node(Answer):
    """One worker as the registry knows it; `lag` counts epochs it has not confirmed."""

    worker: str
    node: str
    pid: int
    started_at: datetime
    heartbeat_at: datetime
    epoch: int | None
    lag: int | None
    lease: int
    live: bool


class Backend(Answer):
    name: str
    type: str
    default: bool
    sign_in_place: bool
    state: str
    """`ok`, or the code of the error it answers with."""
    detail: str
    algorithms: list[str]


class Dependency(Answer):
    name: str
    state: str
    detail: str = ""


class Readiness(Answer):
    status: Literal["ok", "failing"]
    dependencies: list[Dependency]


class Page(Answer):
    """A list: `next` is the cursor of the following page, absent on the last."""

    items: list[Any]
    next: str | UnsetType = UNSET


class Problem(Answer):
    """RFC 9457, with what to do next. Further members may follow, such as the numbers of a refused invariant."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    next_step: str


# --- decoding ---------------------------------------------------------------------------------------------------------

T = TypeVar("T")
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


def convert(value: object, into: type[T]) -> T:
    """Decoded JSON as a request struct. Raises InvalidField that names the field and never repeats its value."""
    try:
        return msgspec.convert(value, into)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        field = found["path"] if found else ""
        reason = text[: found.start()] if found else text
        raise errors.InvalidField(
            f"{field}: {reason}" if field else reason, fields={"field": field} if field else {}
        ) from None
