"""State transitions of key versions, each in the caller's transaction and under the invariants of `timeline`.

The API's use cases and the custodian share them. A transition that an invariant forbids raises an error with both sides
as instants and changes nothing. No transition calls a module: what a module has to do becomes an intent.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from kms_jwks import errors, timeline
from kms_jwks.custodian import document_limits
from kms_jwks.model import (
    Bounds,
    Breach,
    Epoch,
    ExternalKey,
    ExternalKeyChange,
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
from kms_jwks.times import format_earliest, optional, to_datetime
from kms_jwks.worker.snapshot import is_post_quantum

_S = VersionState
T = TypeVar("T", Key, KeyVersion, ExternalKey)


def add_version(tx: WriteTx, key: Key) -> KeyVersion:
    """Add a version of `key`, `creating`, and the intent for the custodian to generate its key pair."""
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
    """Add an intent for the custodian to change something in a module. Each attempt has a label of its own."""
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
    """The prefix of every label of this installation."""
    return f"kj-{tx.installation().id}-"


def give_up(tx: WriteTx, version: KeyVersion, code: str, detail: str) -> None:
    """End a version that was never published, with the reason: no attempt to make its pair follows.

    A pair that waits for its first document is destroyed in its module. An adopted one stays there: the service did
    not make it. `code` is a problem code.
    """
    now = tx.now()
    for intent in tx.intents(states={IntentState.PENDING}, version_id=version.id):
        tx.save(replace(intent, state=IntentState.ABANDONED, finished_at=now, error=detail))
    is_adopted = version.origin is Origin.ADOPTED
    if is_adopted:
        detail = f"{detail} Its adopted key pair stays in the module."
    version = replace(version, failure={"code": code, "detail": detail})
    if version.kid is None or is_adopted:
        tx.save(replace(version, state=_S.DESTROYED, destroyed_at=now))
        return
    tx.save(replace(version, destroy_at=now))
    add_intent(tx, IntentKind.DESTROY, version, now)


def publish_ready(tx: WriteTx, key_set: KeySet) -> list[KeyVersion]:
    """Publish the versions of `key_set` whose key pairs are made, each in the document that it belongs to.

    The first publication of a document waits for every requested key pair, so that all its first keys appear at once
    and may sign as soon as every worker serves them (I1). It does not wait for key pairs of disabled keys.
    """
    known = {is_post_quantum(alg) for _, alg in tx.ever_published(key_set.id)}
    enabled = {key.id for key in tx.keys(key_set.id) if key.disabled_at is None}
    creating = tx.versions(key_set_id=key_set.id, states={_S.CREATING})
    creating = [v for v in creating if timeline.is_to_be_published(v) and (v.kid is not None or v.key_id in enabled)]
    published: list[KeyVersion] = []
    for post_quantum in (False, True):
        requested = [v for v in creating if is_post_quantum(v.alg) is post_quantum]
        ready = [v for v in requested if v.kid is not None]
        first = post_quantum not in known
        if ready and not (first and len(ready) < len(requested)):
            published += _publish(tx, key_set, ready, first=first)
    if published and key_set.first_published_at is None:
        now = tx.now()
        tx.save(replace(key_set, first_published_at=now, revision=key_set.revision + 1, updated_at=now))
    return published


def _publish(tx: WriteTx, key_set: KeySet, ready: list[KeyVersion], *, first: bool) -> list[KeyVersion]:
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
    """Make `version` the active one: the version that was active becomes `retiring`, a standby is requested (I4).

    Raises NotYetUsable (I1), TransitionRefused, RotationInProgress (I5). `breach` overrides I1 with that reason. Where
    I1 does not hold, the reason is recorded on the version, together with `who` if an admin did it.
    """
    now = tx.now()
    if version.state is not _S.PUBLISHED:
        raise _refused(version, _S.ACTIVE)
    usable = timeline.usable_at(version, key.policy)
    early = usable is None or usable > now
    if early and breach is None:
        raise _not_yet_usable(version, key, usable, now)
    versions = tx.versions(key_set_id=key_set.id)
    own = [v for v in versions if v.key_id == key.id]
    active = next((v for v in own if v.state is _S.ACTIVE), None)
    in_force = timeline.bounds(key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
    if active is not None:
        document_limits.require_rotation_room(tx, key_set, key, versions)
        ended = replace(active, state=_S.RETIRING, deactivated_at=now, bounds=active.bounds.widened(in_force))
        tx.save(replace(ended, emergency=False))
    took_over = active is None and timeline.lost_by_revocation(own)
    # The emergency ends with the rotation to a kid that was published after it began: no verifier can hold that kid.
    goes_on = active is not None and active.emergency and (version.published_at or now) <= (active.activated_at or now)
    started = replace(
        version,
        state=_S.ACTIVE,
        activated_at=now,
        bounds=in_force,
        breaches=(*version.breaches, Breach("I1", now, breach, who)) if early and breach else version.breaches,
        emergency=took_over or goes_on,
    )
    tx.save(started)
    if key_set.first_activated_at is None:
        tx.save(replace(key_set, first_activated_at=now))
    ensure_standby(tx, key)
    return started


def _not_yet_usable(version: KeyVersion, key: Key, usable: Instant | None, now: Instant) -> errors.NotYetUsable:
    fields: Mapping[str, object] = {
        "kid": version.kid,
        "visible_since": optional(version.visible_since),
        "publish_lead": key.policy.publish_lead,
        "usable_at": optional(usable),
        "now": to_datetime(now),
    }
    if usable is None:
        return errors.NotYetUsable(f"Version {version.number} is not served by every live worker yet.", fields=fields)
    return errors.NotYetUsable(f"Version {version.number} may sign from {format_earliest(usable)} on.", fields=fields)


def ensure_standby(tx: WriteTx, key: Key) -> KeyVersion | None:
    """Request a standby unless one is published or being made (I4). Returns the new version, or None."""
    standbys = tx.versions(key_id=key.id, states={_S.CREATING, _S.PUBLISHED})
    if standbys or key.disabled_at is not None:
        return None
    return add_version(tx, key)


def retire(
    tx: WriteTx, key: Key, version: KeyVersion, *, breach: str | None = None, who: str | None = None
) -> KeyVersion:
    """Take a retiring version out of the JWKS once no token it signed can be alive (I2), and date its destruction.

    `breach` overrides I2 with that reason, which is recorded on the version with `who`. The key pair is kept until no
    token can be alive in any case. Raises TransitionRefused.
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
    """The destruction date of a version that leaves the JWKS: `destroy_after` from now, and not before its tokens end.

    An adopted key pair was made elsewhere and may be used elsewhere too: it gets a date on request only.
    """
    if version.origin is Origin.ADOPTED:
        return version.destroy_at
    due = version.destroy_at or timeline.later(now, key.policy.destroy_after)
    return max(due, timeline.retirable_at(version) or due)


def revoke(
    tx: WriteTx, key_set: KeySet, key: Key, version: KeyVersion, reason: str, *, lease: int
) -> KeyVersion | None:
    """Take a compromised version out of the JWKS for ever; the standby signs at once, even if I1 does not hold.

    Returns the successor: the standby that signs now. None if there was no standby; one is requested then.
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
        standby = timeline.choose_standby(tx.versions(key_id=key.id), key.policy)
        if standby is not None:
            reason = f"emergency: version {version.number} was revoked"
            successor = activate(tx, key_set, key, standby, lease=lease, breach=reason)
    if successor is None and version.state is not _S.RETIRED:
        ensure_standby(tx, key)
    return successor


def withdraw_external(
    tx: WriteTx, external: ExternalKey, what: str, *, who: str | None = None, revoke_reason: str | None = None
) -> ExternalKey:
    """Take an external key out of the JWKS; `what` is the change that its record keeps.

    With `what` = `revoked` its public key is never published again.
    """
    now = tx.now()
    change = ExternalKeyChange(what, now, external.remove_at, who)
    gone = replace(external, removed_at=now, changes=(*external.changes, change))
    if what == "revoked":
        gone = replace(gone, revoked_at=now, revoke_reason=revoke_reason or None)
    tx.save(gone)
    return gone


# --- the end of keys and key sets


def retire_key(tx: WriteTx, key_set: KeySet, key: Key, *, lease: int) -> Key:
    """End a key: it signs no longer, for ever. A retired key is disabled too, and stays as a tombstone with its name.

    The version that signs leaves the JWKS when no token it signed can be alive (I2). Versions that never signed leave
    it, or end, at once. Each pair is destroyed `destroy_after` later. Repeating changes nothing.
    """
    if key.retired_at is not None:
        return key
    now = tx.now()
    for version in tx.versions(key_id=key.id):
        if version.state is _S.CREATING and version.failure is None:
            give_up(tx, version, errors.KeyRetired.code, "The key was retired before this version was published.")
        elif version.state is _S.PUBLISHED:
            retired = replace(version, state=_S.RETIRED, retired_at=now)
            tx.save(replace(retired, destroy_at=_destruction_date(retired, key, now)))
        elif version.state is _S.ACTIVE:
            in_force = timeline.bounds(key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
            ended = replace(version, state=_S.RETIRING, deactivated_at=now, bounds=version.bounds.widened(in_force))
            tx.save(replace(ended, emergency=False))
    retired_key = replace(key, retired_at=now, disabled_at=key.disabled_at or now)
    retired_key = replace(retired_key, revision=key.revision + 1, updated_at=now)
    tx.save(retired_key)
    return retired_key


def retire_key_set(tx: WriteTx, key_set: KeySet, *, lease: int) -> KeySet:
    """Retire every key of a set, which takes no new one. Its JWKS is served on, empty in the end.

    External keys stay until their dates. Repeating changes nothing.
    """
    for key in tx.keys(key_set.id):
        retire_key(tx, key_set, key, lease=lease)
    if key_set.retired_at is not None:
        return key_set
    now = tx.now()
    retired = replace(key_set, retired_at=now, revision=key_set.revision + 1, updated_at=now)
    tx.save(retired)
    return retired


def delete_key(tx: WriteTx, key: Key) -> None:
    """Delete a key that never published a version, with its grants. The row stays as a tombstone; the name is free.

    Raises AlreadyPublished.
    """
    versions = tx.versions(key_id=key.id)
    if any(v.published_at is not None for v in versions):
        raise errors.AlreadyPublished(f"Key {key.name!r} has published a version.")
    now = tx.now()
    for version in versions:
        if version.state is _S.CREATING and version.failure is None:
            give_up(tx, version, errors.KeyNotFound.code, "The key was deleted before this version was published.")
        elif version.state is _S.REVOKED and version.origin is Origin.GENERATED:
            # No plan covers a deleted key, so its date does not come.
            tx.save(replace(version, destroy_at=now))
            add_intent(tx, IntentKind.DESTROY, version, now)
    for grant in tx.grants():
        if grant.key_id == key.id:
            tx.save(replace(grant, deleted_at=now))
    gone = replace(key, deleted_at=now, disabled_at=key.disabled_at or now)
    tx.save(replace(gone, revision=key.revision + 1, updated_at=now))


def delete_key_set(tx: WriteTx, key_set: KeySet) -> None:
    """Delete a key set that never published anything, with its keys and grants, as `delete_key` does.

    Raises AlreadyPublished.
    """
    if key_set.first_published_at is not None:
        raise errors.AlreadyPublished(f"Key set {key_set.name!r} has published a key.")
    now = tx.now()
    for key in tx.keys(key_set.id):
        delete_key(tx, key)
    for grant in tx.grants():
        if grant.key_set_id == key_set.id:
            tx.save(replace(grant, deleted_at=now))
    tx.save(replace(key_set, deleted_at=now, revision=key_set.revision + 1, updated_at=now))


# --- destruction


def schedule_destruction(tx: WriteTx, version: KeyVersion, when: Instant | None, destroy_after: int) -> KeyVersion:
    """Date the destruction of a retired or revoked version: at least 7 days ahead, and not while its tokens are alive.

    `destroy_after`, in seconds from now, is the date where `when` is None. Raises TransitionRefused, InvalidField with
    the earliest date.
    """
    now = tx.now()
    if not version.state.may_become(_S.DESTROYED) or version.state is _S.CREATING:
        raise _refused(version, _S.DESTROYED)
    _require_not_started(tx, version)
    _require_sole_user(tx, version)
    floor = timeline.later(now, timeline.MIN_DESTROY_AFTER)
    ended = max(floor, timeline.retirable_at(version) or floor)
    at = max(timeline.later(now, destroy_after), ended) if when is None else when
    if at < ended:
        why = (
            f"a destruction leaves at least {timeline.MIN_DESTROY_AFTER} s to cancel it"
            if ended == floor
            else "a token it signed can be alive until then (I2)"
        )
        raise errors.InvalidField(f"destroy_at: {why}", fields={"field": "destroy_at", "earliest": to_datetime(ended)})
    if at > timeline.later(now, timeline.FARTHEST):
        raise errors.InvalidField("destroy_at: lies over 10 years ahead", fields={"field": "destroy_at"})
    _abandon_attempts(tx, version)
    scheduled = replace(version, destroy_at=at)
    tx.save(scheduled)
    return scheduled


def cancel_destruction(tx: WriteTx, version: KeyVersion) -> KeyVersion:
    """Cancel a scheduled destruction. Raises TransitionRefused once the key is destroyed or being destroyed."""
    if version.destroy_at is None or version.state in (_S.CREATING, _S.DESTROYED):
        raise errors.TransitionRefused(f"No destruction of version {version.number} is scheduled.")
    _require_not_started(tx, version)
    _abandon_attempts(tx, version)
    kept = replace(version, destroy_at=None)
    tx.save(kept)
    return kept


def _abandon_attempts(tx: WriteTx, version: KeyVersion) -> None:
    """Abandon pending module calls of a destruction whose date has changed."""
    for intent in tx.intents(states={IntentState.PENDING}, version_id=version.id):
        if intent.kind is not IntentKind.GENERATE:
            tx.save(
                replace(intent, state=IntentState.ABANDONED, finished_at=tx.now(), error="the destruction was redated")
            )


def _require_sole_user(tx: ReadTx, version: KeyVersion) -> None:
    """Raise TransitionRefused where another key set has adopted the same pair and may still need it."""
    assert version.public_jwk is not None
    for other in tx.versions(public_jwk=version.public_jwk):
        done = other.state in (_S.RETIRED, _S.REVOKED, _S.DESTROYED)
        if other.id != version.id and other.backend == version.backend and not done:
            owner = tx.key_set_by_id(other.key_set_id)
            assert owner is not None
            raise errors.TransitionRefused(
                f"Key set {owner.name!r} uses the same key pair: its version {other.number} is {other.state.value}.",
                next_step="Destroy it once that version is retired or revoked.",
                fields={"key_set": owner.name, "kid": other.kid},
            )


def _require_not_started(tx: ReadTx, version: KeyVersion) -> None:
    """Raise TransitionRefused once a destruction was attempted: a failed attempt may have destroyed the key too."""
    attempts = (i for i in tx.intents(version_id=version.id) if i.kind is IntentKind.DESTROY)
    if any(i.term is not None for i in attempts):
        raise errors.TransitionRefused(f"The destruction of version {version.number} has begun.")


def start_new_incarnation(tx: WriteTx, superseded: Epoch | None = None) -> list[Key]:
    """Prepare a registry that was restored from a backup for use, and return the keys that were disabled.

    It gets a new incarnation, every key is disabled until an operator enables it, every intent is abandoned, and no
    standby counts as visible. The registry does not know what happened after the backup: which version signed last, and
    which kids left the JWKS. Nodes that have confirmed at most the epoch `superseded` accept the new incarnation.
    """
    now = tx.now()
    tx.new_incarnation(superseded)
    for intent in tx.intents(states={IntentState.PENDING, IntentState.STARTED}):
        tx.save(replace(intent, state=IntentState.ABANDONED, finished_at=now, error="the registry was restored"))
    counter = tx.next_epoch().counter
    keys = tx.keys()
    living = {key.id for key in keys}
    for version in tx.versions(states={_S.CREATING, _S.PUBLISHED, _S.REVOKED}):
        if version.state is _S.CREATING and version.failure is not None:
            add_intent(tx, IntentKind.DESTROY, version, now)
        elif version.state is _S.CREATING and version.kid is None:
            add_intent(tx, IntentKind.GENERATE, version, now)
        elif version.state is _S.PUBLISHED:
            tx.save(replace(version, published_epoch=counter, visible_since=None, first_fill=False))
        elif version.state is _S.REVOKED and version.key_id not in living and version.origin is Origin.GENERATED:
            # No plan covers a deleted key (`delete_key`).
            add_intent(tx, IntentKind.DESTROY, version, now)
    disabled = [replace(key, disabled_at=now, revision=key.revision + 1) for key in keys if key.disabled_at is None]
    for key in disabled:
        tx.save(key)
    return disabled


def widen(tx: WriteTx, key_set: KeySet, key: Key, *, lease: int) -> None:
    """Record a changed policy or cache lifetime on every version that can still sign (I2 uses the largest values)."""
    for version in tx.versions(key_id=key.id, states={_S.ACTIVE, _S.RETIRING}):
        wanted = timeline.bounds(key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
        if version.state is _S.RETIRING:
            # A handover cannot be lengthened after the deactivation (timeline.pinned_until); the other values can.
            wanted = Bounds(
                wanted.max_token_ttl, wanted.clock_skew, version.bounds.handover, wanted.lease, wanted.cache_lifetime
            )
        tx.save(replace(version, bounds=version.bounds.widened(wanted)))


def _refused(version: KeyVersion, target: VersionState) -> errors.TransitionRefused:
    return errors.TransitionRefused(
        f"Version {version.number} is {version.state.value} and cannot become {target.value}.",
        fields={"kid": version.kid, "state": version.state.value},
    )
