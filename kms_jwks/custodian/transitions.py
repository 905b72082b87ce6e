"""Steps in the life of key versions, each in the caller's transaction and under the invariants of `timeline`.

The API's use cases and the custodian share them. A step that an invariant forbids raises with both sides as instants
and changes nothing. Nothing here touches a module: what a module has to do becomes an intent.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from kms_jwks import errors, timeline
from kms_jwks.model import (
    Bounds,
    Breach,
    ExternalKey,
    Instant,
    Intent,
    IntentKind,
    IntentState,
    Key,
    KeySet,
    KeyVersion,
    Origin,
    VersionState,
    new_id,
)
from kms_jwks.store import ReadTx, WriteTx
from kms_jwks.times import optional, to_datetime
from kms_jwks.worker.snapshot import document_entries, in_document, is_post_quantum, render_jwks

_S = VersionState
T = TypeVar("T", Key, KeyVersion, ExternalKey)


def add_version(tx: WriteTx, key: Key) -> KeyVersion:
    """A new version of `key`, `creating`, and the intent that has the custodian make its pair."""
    now = tx.now()
    numbers = [v.number for v in tx.versions(key_id=key.id)]
    version = KeyVersion(
        id=new_id(),
        key_set_id=key.key_set_id,
        key_id=key.id,
        number=max(numbers, default=0) + 1,
        alg=key.alg,
        rsa_bits=key.rsa_bits,
        backend=key.backend,
        state=_S.CREATING,
        created_at=now,
    )
    tx.add(version)
    add_intent(tx, IntentKind.GENERATE, version, now)
    return version


def add_intent(tx: WriteTx, kind: IntentKind, version: KeyVersion, not_before: Instant, attempt: int = 1) -> Intent:
    """Ask the custodian for a module mutation. Each attempt at a pair has a label of its own."""
    intent = Intent(
        id=new_id(),
        kind=kind,
        version_id=version.id,
        backend=version.backend,
        label=new_label(tx),
        state=IntentState.PENDING,
        created_at=tx.now(),
        not_before=not_before,
        attempt=attempt,
    )
    tx.add(intent)
    return intent


def new_label(tx: ReadTx) -> str:
    """A label for one attempt: ``kj-<installation>-<24 hex digits>``, 36 ASCII bytes."""
    return f"{label_prefix(tx)}{secrets.token_hex(12)}"


def label_prefix(tx: ReadTx) -> str:
    """What every label of this installation starts with."""
    return f"kj-{tx.installation().id}-"


def publish_ready(tx: WriteTx, key_set: KeySet) -> list[KeyVersion]:
    """Publish the versions of `key_set` whose pairs are made, in the document that they belong to.

    The first publication of a document waits until every pair that was asked for is there, so that all its first keys
    fill it at once and may sign as soon as every worker serves it (I1). A disabled key's pair is not waited for.
    """
    known = {is_post_quantum(alg) for _, alg in tx.ever_published(key_set.id)}
    enabled = {key.id for key in tx.keys(key_set.id) if key.disabled_at is None}
    creating = tx.versions(key_set_id=key_set.id, states={_S.CREATING})
    creating = [v for v in creating if v.kid is not None or v.key_id in enabled]
    published: list[KeyVersion] = []
    for post_quantum in (False, True):
        asked = [v for v in creating if is_post_quantum(v.alg) is post_quantum]
        ready = [v for v in asked if v.kid is not None]
        first = post_quantum not in known
        if ready and not (first and len(ready) < len(asked)):
            published += _published(tx, key_set, ready, first=first)
    if published and key_set.first_published_at is None:
        now = tx.now()
        tx.save(replace(key_set, first_published_at=now, revision=key_set.revision + 1, updated_at=now))
    return published


def _published(tx: WriteTx, key_set: KeySet, ready: list[KeyVersion], *, first: bool) -> list[KeyVersion]:
    now = tx.now()
    epoch = tx.next_epoch()
    published = [
        replace(
            v,
            state=_S.PUBLISHED,
            published_at=now,
            published_epoch=epoch.counter,
            first_fill=first and not key_set.existing_issuer,
        )
        for v in ready
    ]
    for version in published:
        tx.save(version)
    return published


def activate(
    tx: WriteTx,
    key_set: KeySet,
    key: Key,
    version: KeyVersion,
    *,
    lease: int,
    breach: str | None = None,
    who: str | None = None,
) -> KeyVersion:
    """Let `version` sign: the active one becomes `retiring`, a standby is asked for (I4).

    Raises NotYetUsable (I1), TransitionRefused, RotationInProgress (I5). `breach` overrides I1 with that reason, which
    stays on the version, and with it `who` did so by hand.
    """
    now = tx.now()
    if version.state is not _S.PUBLISHED:
        raise _refused(version, _S.ACTIVE)
    require_usable(version, key, now, overridden=breach is not None)
    versions = tx.versions(key_set_id=key_set.id)
    own = [v for v in versions if v.key_id == key.id]
    active = next((v for v in own if v.state is _S.ACTIVE), None)
    in_force = timeline.bounds(key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
    if active is not None:
        require_rotation_room(tx, key_set, key, versions)
        ended = replace(active, state=_S.RETIRING, deactivated_at=now, bounds=active.bounds.widened(in_force))
        tx.save(replace(ended, emergency=False))
    took_over = active is None and timeline.lost_by_revocation(own)
    # The second rotation is one to a kid that nobody can hold yet: until then the emergency goes on.
    goes_on = active is not None and active.emergency and (version.published_at or now) <= (active.activated_at or now)
    started = replace(
        version,
        state=_S.ACTIVE,
        activated_at=now,
        bounds=in_force,
        breaches=(*version.breaches, Breach("I1", now, breach, who)) if breach is not None else version.breaches,
        emergency=took_over or goes_on,
    )
    tx.save(started)
    if key_set.first_activated_at is None:
        tx.save(replace(key_set, first_activated_at=now))
    ensure_standby(tx, key)
    return started


def require_usable(version: KeyVersion, key: Key, now: Instant, *, overridden: bool = False) -> None:
    """Raise NotYetUsable unless verifiers could have fetched `version` for long enough (I1)."""
    usable = timeline.usable_at(version, key.policy)
    if overridden or (usable is not None and usable <= now):
        return
    fields: Mapping[str, object] = {
        "kid": version.kid,
        "visible_since": optional(version.visible_since),
        "publish_lead": key.policy.publish_lead,
        "usable_at": optional(usable),
        "now": to_datetime(now),
    }
    if usable is None:
        detail = f"Version {version.number} is not served by every live worker yet."
    else:
        detail = f"Version {version.number} may sign from {to_datetime(usable).isoformat()} on."
    raise errors.NotYetUsable(detail, fields=fields)


def require_rotation_room(tx: ReadTx, key_set: KeySet, key: Key, versions: list[KeyVersion]) -> None:
    """Raise RotationInProgress while another key of the set has a retiring version, or the document has no room."""
    versions = timeline.of_document(key.alg, versions)
    blocker = timeline.rotation_blocker(key.id, versions)
    if blocker is not None:
        until = timeline.retirable_at(blocker)
        raise errors.RotationInProgress(
            "Another key of the set has a retiring version in the document.",
            fields={"kid": blocker.kid, "possible_at": optional(until)},
        )
    # Publishing the next standby must not push the document over its limit.
    externals = timeline.of_document(key.alg, tx.external_keys(key_set.id))
    kids = timeline.kids_after_rotation(key.id, versions, externals)
    if kids > timeline.MAX_KIDS:
        retiring = [t for v in versions if (t := timeline.retirable_at(v)) and v.state is _S.RETIRING]
        raise errors.RotationInProgress(
            f"With the next standby the document would hold {kids} kids of {timeline.MAX_KIDS}.",
            fields={"possible_at": optional(min(retiring, default=None))},
        )


def ensure_standby(tx: WriteTx, key: Key) -> KeyVersion | None:
    """Ask for a standby unless one is published or coming (I4). Returns the new version, if there is one."""
    waiting = tx.versions(key_id=key.id, states={_S.CREATING, _S.PUBLISHED})
    if waiting or key.disabled_at is not None:
        return None
    return add_version(tx, key)


def is_early(tx: ReadTx, key: Key, version: KeyVersion) -> bool:
    """Whether activating `version` now would break I1."""
    usable = timeline.usable_at(version, key.policy)
    return usable is None or usable > tx.now()


def withdraw(
    tx: WriteTx, key: Key, version: KeyVersion, *, breach: str | None = None, who: str | None = None
) -> KeyVersion:
    """Take a retiring version out of the JWKS once no token it signed can be alive (I2), and date its destruction.

    `breach` overrides I2 with that reason, which stays on the version with `who`; the pair is kept all the same until
    no token can be alive.
    """
    now = tx.now()
    if version.state is not _S.RETIRING:
        raise _refused(version, _S.RETIRED)
    due = timeline.retirable_at(version)
    early = due is None or due > now
    if early and breach is None:
        raise errors.TransitionRefused(
            f"Version {version.number} must stay in the JWKS: tokens it signed may be alive (I2).",
            fields={"retirable_at": optional(due), "now": to_datetime(now)},
        )
    breaches = (*version.breaches, Breach("I2", now, breach, who)) if early and breach else version.breaches
    retired = replace(version, state=_S.RETIRED, retired_at=now, breaches=breaches)
    retired = replace(retired, destroy_at=_destruction_date(retired, key, now))
    tx.save(retired)
    return retired


def _destruction_date(version: KeyVersion, key: Key, now: Instant) -> Instant | None:
    """When a version that leaves is to be destroyed: `destroy_after` from now, and not before its tokens have ended.

    An adopted pair belongs to whoever made it and may serve others too: only a person dates its destruction.
    """
    if version.origin is Origin.ADOPTED:
        return version.destroy_at
    due = version.destroy_at or timeline.later(now, key.policy.destroy_after)
    return max(due, timeline.retirable_at(version) or due)


def revoke(
    tx: WriteTx, key_set: KeySet, key: Key, version: KeyVersion, reason: str, *, lease: int
) -> KeyVersion | None:
    """Take a compromised version out of the JWKS for ever; its standby signs at once, however young.

    Returns the successor that signs now, or None where there is none yet (a new one is asked for).
    """
    now = tx.now()
    if not version.state.may_become(_S.REVOKED) or version.kid is None:
        raise _refused(version, _S.REVOKED)
    was_active = version.state is _S.ACTIVE
    gone = replace(
        version,
        state=_S.REVOKED,
        revoked_at=now,
        revoke_reason=reason or None,
        deactivated_at=version.deactivated_at or (now if was_active else None),
        emergency=False,
    )
    tx.save(replace(gone, destroy_at=_destruction_date(gone, key, now)))
    successor = None
    if was_active and key.disabled_at is None:
        standby = timeline.successor(tx.versions(key_id=key.id), key.policy)
        if standby is not None:
            usable = timeline.usable_at(standby, key.policy)
            early = usable is None or usable > now
            successor = activate(
                tx,
                key_set,
                key,
                standby,
                lease=lease,
                breach=f"emergency: version {version.number} was revoked" if early else None,
            )
    if successor is None and version.state is not _S.RETIRED:
        ensure_standby(tx, key)
    return successor


def schedule_destruction(tx: WriteTx, version: KeyVersion, when: Instant | None, destroy_after: int) -> KeyVersion:
    """Date the destruction of a retired or revoked version: at least 7 days ahead, and no token it signed alive then.

    Raises TransitionRefused, InvalidField with the earliest date.
    """
    now = tx.now()
    if not version.state.may_become(_S.DESTROYED) or version.state is _S.CREATING:
        raise _refused(version, _S.DESTROYED)
    _require_not_begun(tx, version)
    floor = timeline.later(now, timeline.MIN_DESTROY_AFTER)
    ended = max(floor, timeline.retirable_at(version) or floor)
    at = max(timeline.later(now, destroy_after), ended) if when is None else when
    if at < ended:
        why = (
            f"a destruction leaves at least {timeline.MIN_DESTROY_AFTER} s to take it back"
            if ended == floor
            else "a token it signed can be alive until then (I2)"
        )
        raise errors.InvalidField(f"destroy_at: {why}", fields={"field": "destroy_at", "earliest": to_datetime(ended)})
    if at > timeline.later(now, timeline.FARTHEST):
        raise errors.InvalidField("destroy_at: lies over 10 years ahead", fields={"field": "destroy_at"})
    _forget_attempts(tx, version)
    scheduled = replace(version, destroy_at=at)
    tx.save(scheduled)
    return scheduled


def cancel_destruction(tx: WriteTx, version: KeyVersion) -> KeyVersion:
    """Take a dated destruction back. Raises TransitionRefused once the key is gone or being destroyed."""
    if version.destroy_at is None or version.state is _S.DESTROYED:
        raise errors.TransitionRefused(f"No destruction of version {version.number} is scheduled.")
    _require_not_begun(tx, version)
    _forget_attempts(tx, version)
    kept = replace(version, destroy_at=None)
    tx.save(kept)
    return kept


def _forget_attempts(tx: WriteTx, version: KeyVersion) -> None:
    """A destruction that its module put off must not come up again under a date that no longer holds."""
    for intent in tx.intents(states={IntentState.PENDING}, version_id=version.id):
        if intent.kind is not IntentKind.GENERATE:
            tx.save(
                replace(intent, state=IntentState.ABANDONED, finished_at=tx.now(), error="the destruction was redated")
            )


def _require_not_begun(tx: ReadTx, version: KeyVersion) -> None:
    """An attempt that failed, or whose custodian ended, may have destroyed the key all the same."""
    attempts = (i for i in tx.intents(version_id=version.id) if i.kind is IntentKind.DESTROY)
    if any(i.term is not None for i in attempts):
        raise errors.TransitionRefused(f"The destruction of version {version.number} has begun.")


def begin_anew(tx: WriteTx) -> list[Key]:
    """What a registry that was restored from a backup needs before anybody trusts it: a new incarnation, every key
    disabled until an operator enables it, nothing under way, and no standby known to any verifier.

    What a version promised since the backup is lost: who signed last, and which kids verifiers have seen leave. Returns
    the keys that were disabled.
    """
    now = tx.now()
    tx.new_incarnation()
    for intent in tx.intents(states={IntentState.PENDING, IntentState.STARTED}):
        tx.save(replace(intent, state=IntentState.ABANDONED, finished_at=now, error="the registry was restored"))
    counter = tx.next_epoch().counter
    for version in tx.versions(states={_S.CREATING, _S.PUBLISHED}):
        if version.state is _S.CREATING:
            add_intent(tx, IntentKind.GENERATE, version, now)
        else:
            tx.save(replace(version, published_epoch=counter, visible_since=None, first_fill=False))
    keys = tx.keys()
    disabled = [replace(key, disabled_at=now, revision=key.revision + 1) for key in keys if key.disabled_at is None]
    for key in disabled:
        tx.save(key)
    return disabled


def widen(tx: WriteTx, key_set: KeySet, key: Key, *, lease: int) -> None:
    """Record a changed policy or cache lifetime on every version that can still sign (I2 counts the largest)."""
    for version in tx.versions(key_id=key.id, states={_S.ACTIVE, _S.RETIRING}):
        wanted = timeline.bounds(key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
        if version.state is _S.RETIRING:
            # A handover cannot be lengthened afterwards (timeline.pinned_until), the rest can still matter.
            wanted = Bounds(
                wanted.max_token_ttl, wanted.clock_skew, version.bounds.handover, wanted.lease, wanted.cache_lifetime
            )
        tx.save(replace(version, bounds=version.bounds.widened(wanted)))


def require_room(tx: ReadTx, key_set: KeySet, alg: str, *, more_keys: int = 0, more_externals: int = 0) -> None:
    """Raise LimitReached when the document of `alg`'s keys could not hold what is added (I5)."""
    keys = len(timeline.of_document(alg, tx.keys(key_set.id))) + more_keys
    externals = len(timeline.of_document(alg, tx.external_keys(key_set.id))) + more_externals
    problem = timeline.room_problem(keys, externals)
    if problem is not None:
        raise errors.LimitReached(
            problem,
            fields={"kids": timeline.kids_reserved(keys, externals), "limit": timeline.MAX_KIDS},
        )
    versions = timeline.of_document(alg, tx.versions(key_set_id=key_set.id))
    # A key with several standbys (adopted ones) takes up what the others need to rotate.
    living = Counter(v.key_id for v in versions if v.state in (_S.CREATING, _S.PUBLISHED, _S.ACTIVE))
    reserved = timeline.kids_reserved(keys, externals) + sum(max(0, count - 2) for count in living.values())
    if reserved > timeline.MAX_KIDS:
        raise errors.LimitReached(
            f"With further standbys the set needs {reserved} kids to rotate; a document holds {timeline.MAX_KIDS}.",
            fields={"kids": reserved, "limit": timeline.MAX_KIDS},
        )
    # What the document holds now may be more than is reserved: a key that rotated often has several retiring versions.
    held = [v for v in versions if v.state.in_jwks or v.state is _S.CREATING]
    coming = len(held) + externals + 2 * more_keys
    if coming > timeline.MAX_KIDS:
        raise errors.LimitReached(
            f"The document would come to {coming} kids; it holds {timeline.MAX_KIDS}. Retiring versions make room.",
            fields={"kids": coming, "limit": timeline.MAX_KIDS},
        )


def require_small_document(tx: ReadTx, key_set: KeySet) -> None:
    """Raise LimitReached when one of the set's documents is larger than verifiers read (I5)."""
    entries = document_entries(tx.keys(key_set.id), tx.versions(key_set_id=key_set.id), tx.external_keys(key_set.id))
    size = max(len(render_jwks(in_document(entries, post_quantum))) for post_quantum in (False, True))
    if size > timeline.MAX_DOCUMENT:
        raise errors.LimitReached(
            f"The document would have {size} bytes; {timeline.MAX_DOCUMENT} are allowed.",
            fields={"bytes": size, "limit": timeline.MAX_DOCUMENT},
        )


def _refused(version: KeyVersion, target: VersionState) -> errors.TransitionRefused:
    return errors.TransitionRefused(
        f"Version {version.number} is {version.state.value} and cannot become {target.value}.",
        fields={"kid": version.kid, "state": version.state.value},
    )
