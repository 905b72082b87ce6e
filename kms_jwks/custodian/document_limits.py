"""What a JWKS document can hold (I5), checked in the caller's transaction: keys, rotations, size, algorithms."""

from __future__ import annotations

from collections import Counter

from kms_jwks import errors, timeline
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import IN_JWKS, Key, KeySet, KeyVersion, VersionState
from kms_jwks.store import ReadTx
from kms_jwks.times import format_instant, optional
from kms_jwks.worker.snapshot import document_entries, in_document, render_jwks

_S = VersionState


def require_room(tx: ReadTx, key_set: KeySet, alg: str, *, more_keys: int = 0, more_externals: int = 0) -> None:
    """Raise LimitReached if the document of `alg`'s keys has no room for the keys to be added (I5).

    Raises KeySetRetired for a retired set, which takes no more keys.
    """
    if key_set.retired_at is not None:
        raise errors.KeySetRetired(f"Key set {key_set.name!r} is retired.")
    living_keys = [key for key in tx.keys(key_set.id) if key.retired_at is None]
    keys = len(timeline.of_document(alg, living_keys)) + more_keys
    externals = len(timeline.of_document(alg, tx.external_keys(key_set.id))) + more_externals
    problem = timeline.room_problem(keys, externals)
    if problem is not None:
        room = max(0, timeline.MAX_KIDS - timeline.kids_reserved(keys - more_keys, externals - more_externals))
        fit = f"; it has room for {room} more external {'key' if room == 1 else 'keys'}" if more_externals else ""
        raise errors.LimitReached(
            f"{problem}{fit}.",
            next_step=_how_to_make_room(tx, key_set, alg),
            fields={"kids": timeline.kids_reserved(keys, externals), "limit": timeline.MAX_KIDS, "room": room},
        )
    versions = timeline.of_document(alg, tx.versions(key_set_id=key_set.id))
    # A key with several standbys (adopted ones) uses room that the other keys need to rotate.
    living = Counter(v.key_id for v in versions if v.state in (_S.CREATING, _S.PUBLISHED, _S.ACTIVE))
    reserved = timeline.kids_reserved(keys, externals) + sum(max(0, count - 2) for count in living.values())
    if reserved > timeline.MAX_KIDS:
        raise errors.LimitReached(
            f"With further standbys the set needs {reserved} kids to rotate; a document holds {timeline.MAX_KIDS}.",
            next_step="Let a standby take over first (kms-jwks version activate), or use another key set.",
            fields={"kids": reserved, "limit": timeline.MAX_KIDS},
        )
    # The document may hold more than is reserved: a key that rotated often has several retiring versions.
    held = [v for v in versions if v.state.in_jwks or timeline.is_to_be_published(v)]
    coming = len(held) + externals + 2 * more_keys
    if coming > timeline.MAX_KIDS:
        raise errors.LimitReached(
            f"The document would come to {coming} kids; it holds {timeline.MAX_KIDS}. Retiring versions make room.",
            next_step="Wait until a retiring version has left the JWKS (`key timeline` says when), or use another set.",
            fields={"kids": coming, "limit": timeline.MAX_KIDS},
        )


def _how_to_make_room(tx: ReadTx, key_set: KeySet, alg: str) -> str:
    """The next step for a full document: what leaves it first, and what may be taken out of it."""
    externals = timeline.of_document(alg, tx.external_keys(key_set.id))
    if not externals:
        return errors.LimitReached.next_step
    leaving = sorted(externals, key=lambda e: e.remove_at)
    listed = ", ".join(f"{e.kid} ({format_instant(e.remove_at)})" for e in leaving)
    return (
        "Add a key that no live token names later, or remove an external key whose tokens have expired. "
        f"These leave by their dates: {listed}."
    )


def require_small_document(tx: ReadTx, key_set: KeySet) -> None:
    """Raise LimitReached if one of the set's documents is larger than verifiers read (I5)."""
    entries = document_entries(tx.keys(key_set.id), tx.versions(key_set_id=key_set.id), tx.external_keys(key_set.id))
    size = max(len(render_jwks(in_document(entries, post_quantum))) for post_quantum in (False, True))
    if size > timeline.MAX_DOCUMENT:
        raise errors.LimitReached(
            f"The document would have {size} bytes; {timeline.MAX_DOCUMENT} are allowed.",
            fields={"bytes": size, "limit": timeline.MAX_DOCUMENT},
        )


def require_rotation_room(tx: ReadTx, key_set: KeySet, key: Key, versions: list[KeyVersion]) -> None:
    """Raise RotationInProgress while another key of the document has a retiring version, or there is no room (I5)."""
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


def check_compatible_algorithms(tx: ReadTx, key_set: KeySet, alg: str) -> None:
    """Raise LimitReached where verifiers that do not know one key's algorithm would reject the whole set (I5)."""
    row = ALGORITHMS[alg]
    shown = {v.key_id for v in tx.versions(key_set_id=key_set.id, states=IN_JWKS)}
    # A retired key counts until its last version has left the JWKS.
    others = [ALGORITHMS[k.alg] for k in tx.keys(key_set.id) if k.retired_at is None or k.id in shown]
    others += [ALGORITHMS[e.alg] for e in tx.external_keys(key_set.id)]
    # Algorithms of the other document (JWKS or post-quantum JWKS) do not count.
    conflicting = [o for o in others if o.is_post_quantum is row.is_post_quantum and o.exclusive != row.exclusive]
    if conflicting:
        raise errors.LimitReached(
            f"{alg} and {conflicting[0].name} cannot share a key set: "
            "widespread verifiers reject a whole set over one key they do not know."
        )
