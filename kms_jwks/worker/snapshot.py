"""A snapshot: the registry at one epoch, compiled for the two hot routes. Immutable; built without a clock.

Everything that a signature or a JWKS needs is made here once per epoch: documents with their ETags, encoded headers,
compiled profiles, callers by token. What depends on the time of a request is decided when the request arrives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kms_jwks import jose, timeline
from kms_jwks.access import Caller
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import KeyRef, ModuleKey
from kms_jwks.model import (
    Access,
    ApiToken,
    Epoch,
    ExternalKey,
    Grant,
    Id,
    Instant,
    Key,
    KeySet,
    KeyVersion,
    Purpose,
    VersionState,
)
from kms_jwks.profiles import IssueRules
from kms_jwks.store import RegistryContents
from kms_jwks.verification import VerifyKey


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON document as it is served. `etag` is a strong validator, with its quotes (RFC 9110 §8.8.3)."""

    body: bytes
    etag: str
    cache_control: str
    public: bool


@dataclass(frozen=True, slots=True)
class Signer(ModuleKey):
    """A version that may sign. `until` limits pinned calls to a retiring version; None for the active version."""

    jwt_header: str
    """The encoded JOSE header of this key's JWTs."""
    until: Instant | None = None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One key: the version that signs now, the versions that may still be pinned, and the standby."""

    id: Id
    name: str
    enabled: bool
    rules: IssueRules
    profile: str
    handover: int
    active: Signer | None
    pinned: Mapping[str, Signer]
    """Retiring versions by kid."""
    standby: tuple[str, Instant | None] | None
    """The kid of the standby, and the earliest instant at which it may sign (None: not known yet)."""
    retired: bool = False
    """It signs no longer, for ever; then it is not enabled either."""


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """One key set. Each document is None before its first publication."""

    id: Id
    name: str
    issuer: str
    purpose: Purpose
    public: bool
    clock_skew: int
    keys: Mapping[str, SigningKey]
    verify_keys: Mapping[str, VerifyKey]
    jwks: Document | None
    algorithms: tuple[str, ...]
    """The algorithms of the ordinary document."""
    jwks_pq: Document | None = None
    """The post-quantum keys (AKP) in a document of their own: older verifiers do not know them and would reject the
    whole ordinary document over one of them."""


@dataclass(frozen=True, slots=True)
class KnownToken:
    """An API token with the client behind it."""

    id: Id
    sha256: str
    caller: Caller
    expires_at: Instant
    revoked: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The registry at `epoch`."""

    epoch: Epoch
    key_sets: Mapping[str, PublishedSet]
    tokens: Mapping[str, KnownToken]
    """By the SHA-256 of the token, lower-case hex."""
    signers: Mapping[tuple[Id, str], tuple[SigningKey, Signer]] = field(default_factory=dict)
    """Every version that may sign, by its key's id and its kid; checked again before an answer leaves."""
    complete: bool = True
    """False for documents from disk: they can be served, but no caller can be authenticated."""


def compile_snapshot(contents: RegistryContents) -> Snapshot:
    """Build the snapshot of a consistent read of the registry."""
    sets = [_published_set(key_set, contents) for key_set in contents.key_sets]
    signers = {
        (key.id, signer.kid): (key, signer)
        for key_set in sets
        for key in key_set.keys.values()
        for signer in (*key.pinned.values(), *((key.active,) if key.active else ()))
    }
    return Snapshot(contents.epoch, {s.name: s for s in sets}, _tokens(contents), signers)


def _published_set(key_set: KeySet, contents: RegistryContents) -> PublishedSet:
    keys = [k for k in contents.keys if k.key_set_id == key_set.id]
    versions = [v for v in contents.versions if v.key_set_id == key_set.id]
    externals = [e for e in contents.external_keys if e.key_set_id == key_set.id]
    listed = document_entries(keys, versions, externals)
    ordinary, post_quantum = in_document(listed, False), in_document(listed, True)
    known = {is_post_quantum(alg) for owner, alg in contents.ever_published if owner == key_set.id}
    verify_keys = {kid: VerifyKey(alg=alg, jwk=jwk) for kid, alg, jwk, _ in listed}
    # Within a set a kid has one public key for ever, so a kid that was revoked is none that is published.
    revoked = [v.kid for v in versions if v.kid and v.revoked_at] + [e.kid for e in externals if e.revoked_at]
    verify_keys |= {kid: VerifyKey(alg="", jwk=None, revoked=True) for kid in revoked}
    return PublishedSet(
        id=key_set.id,
        name=key_set.name,
        issuer=key_set.issuer,
        purpose=key_set.purpose,
        public=key_set.access is Access.PUBLIC,
        clock_skew=max([timeline.MIN_CLOCK_SKEW, *(k.policy.clock_skew for k in keys)]),
        keys={k.name: _signing_key(k, key_set, [v for v in versions if v.key_id == k.id]) for k in keys},
        verify_keys=verify_keys,
        jwks=_jwks(key_set, keys, ordinary, False) if False in known else None,
        algorithms=tuple(sorted({alg for _, alg, _, _ in ordinary})),
        jwks_pq=_jwks(key_set, keys, post_quantum, True) if True in known else None,
    )


Entry = tuple[str, str, Mapping[str, str], Sequence[str]]
"""kid, alg, public JWK parameters, x5c."""


def document_entries(
    keys: Sequence[Key], versions: Sequence[KeyVersion], externals: Sequence[ExternalKey]
) -> list[Entry]:
    """The entries of a set's documents, in order: active versions, other versions, then external keys, by age."""
    order = {key.id: place for place, key in enumerate(keys)}
    shown = sorted(
        (v for v in versions if v.state.in_jwks),
        key=lambda v: (v.state is not VersionState.ACTIVE, order[v.key_id], v.number),
    )
    entries: list[Entry] = []
    for version in shown:
        assert version.kid is not None and version.public_jwk is not None
        entries.append((version.kid, version.alg, version.public_jwk, version.x5c))
    entries += [(e.kid, e.alg, e.public_jwk, ()) for e in externals if e.removed_at is None]
    return entries


def is_post_quantum(alg: str) -> bool:
    """Whether keys of algorithm `alg` are in the post-quantum document."""
    return ALGORITHMS[alg].is_post_quantum


def in_document(entries: Sequence[Entry], post_quantum: bool) -> list[Entry]:
    """The entries of one of the two documents."""
    return [entry for entry in entries if is_post_quantum(entry[1]) is post_quantum]


def render_jwks(entries: Sequence[Entry]) -> bytes:
    """The JWKS of these entries (RFC 7517 §5)."""
    return jose.jwks_document([jose.published_jwk(jwk, alg=alg, kid=kid, x5c=x5c) for kid, alg, jwk, x5c in entries])


def _jwks(key_set: KeySet, keys: Sequence[Key], entries: Sequence[Entry], post_quantum: bool) -> Document:
    body = render_jwks(entries)
    stale = timeline.stale_if_error(
        key_set.stale_if_error,
        cache_lifetime=key_set.cache_lifetime,
        publish_leads=[k.policy.publish_lead for k in keys if is_post_quantum(k.alg) is post_quantum],
    )
    public = key_set.access is Access.PUBLIC
    parts = ["public" if public else "private", f"max-age={key_set.cache_lifetime}"]
    if stale:
        parts.append(f"stale-if-error={stale}")
    return Document(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"', ", ".join(parts), public)


def _signing_key(key: Key, key_set: KeySet, versions: Sequence[KeyVersion]) -> SigningKey:
    policy, profile = key.policy, key.profile
    active = next((v for v in versions if v.state is VersionState.ACTIVE), None)
    standby = timeline.choose_standby(versions, policy)
    retiring = [v for v in versions if v.state is VersionState.RETIRING]
    return SigningKey(
        id=key.id,
        name=key.name,
        enabled=key.disabled_at is None,
        rules=IssueRules(
            issuer=key_set.issuer,
            typ=profile.typ,
            default_lifetime=profile.default_lifetime,
            max_token_ttl=policy.max_token_ttl,
            clock_skew=policy.clock_skew,
        ),
        profile=profile.name,
        handover=policy.handover,
        active=_signer(active, key, None) if active else None,
        pinned={s.kid: s for s in (_signer(v, key, timeline.pinned_until(v, policy)) for v in retiring)},
        standby=(standby.kid or "", timeline.usable_at(standby, policy)) if standby else None,
        retired=key.retired_at is not None,
    )


def _signer(version: KeyVersion, key: Key, until: Instant | None) -> Signer:
    assert version.kid is not None and version.ref is not None and version.public_jwk is not None
    return Signer(
        kid=version.kid,
        alg=ALGORITHMS[version.alg],
        backend=version.backend,
        ref=KeyRef.of(**version.ref),
        public_jwk=version.public_jwk,
        jwt_header=jose.header_segment(alg=version.alg, kid=version.kid, typ=key.profile.typ),
        until=until,
    )


def _tokens(contents: RegistryContents) -> dict[str, KnownToken]:
    by_client: dict[Id, list[Grant]] = {}
    for grant in contents.grants:
        by_client.setdefault(grant.client_id, []).append(grant)
    names = {client.id: client.name for client in contents.clients}
    return {
        token.sha256: known_token(token, names[token.client_id], by_client.get(token.client_id, ()))
        for token in contents.tokens
        if token.client_id in names
    }


def known_token(token: ApiToken, client: str, grants: Sequence[Grant]) -> KnownToken:
    """A token with its client and grants, from the registry's rows."""
    return KnownToken(
        id=token.id,
        sha256=token.sha256,
        caller=Caller(token.client_id, client, token.id, tuple(grants)),
        expires_at=token.expires_at,
        revoked=token.revoked_at is not None,
    )
