"""Use cases on key sets: list, create, read, change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from msgspec import UNSET

from kms_jwks import errors, timeline, wire
from kms_jwks.access import Permission, Scope, allow
from kms_jwks.custodian import transitions
from kms_jwks.model import Access, Id, KeySet, Purpose, name_error, new_id
from kms_jwks.service import adoption, views
from kms_jwks.service.adoption import Candidate
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control, check_revision
from kms_jwks.service.keys import add_key, check_policy, look_at
from kms_jwks.service.views import Created
from kms_jwks.store import ReadTx, WriteTx


class KeySets:
    """Key sets, for administrators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self, context: RequestContext, limit: int, cursor: str | None) -> wire.Page:
        """The key sets that the caller's grants cover."""
        with self._control.store.read() as tx:
            caller = self._control.guard.enter_any(tx, context, Permission.KEY_SET_READ)
            shown: list[KeySet] = []
            after = Id(cursor) if cursor else None
            while len(shown) <= limit:
                chunk = tx.key_sets(after=after, limit=limit + 1)
                shown += [s for s in chunk if allow(caller.grants, Permission.KEY_SET_READ, Scope(s.id))]
                if len(chunk) <= limit:
                    break
                after = chunk[-1].id
            items = [views.key_set(tx, s, self._control.public_url) for s in shown[: limit + 1]]
        return views.page(items, [s.id for s in shown], limit)

    def get(self, context: RequestContext, name: str) -> wire.KeySet:
        """One key set with its keys."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_SET_READ, name)
            return views.key_set(tx, found.key_set, self._control.public_url)

    def create(self, context: RequestContext, request: wire.KeySetCreate) -> Created[wire.KeySet]:
        """Create a key set, with the keys named in the same call: these sign as soon as every worker publishes them."""
        control = self._control
        with control.store.read() as reading:
            self._enter(reading, context, request)
        candidates = [look_at(control, wanted) for wanted in request.keys]
        with control.store.write() as tx:
            self._enter(tx, context, request)
            key_set, versions = add_key_set(tx, control, request, candidates)
            answer = views.key_set(tx, key_set, control.public_url)
        complete = True
        if versions:
            complete = control.wait_for_custodian(versions)
            with control.store.read() as after:
                answer = views.key_set(after, after.key_set_by_id(key_set.id) or key_set, control.public_url)
        else:
            control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return Created(answer, complete, f"/v1/key-sets/{key_set.name}")

    def _enter(self, tx: ReadTx, context: RequestContext, request: wire.KeySetCreate) -> None:
        self._control.guard.enter(tx, context, Permission.KEY_SET_CREATE)
        if any(wanted.adopt is not UNSET for wanted in request.keys):
            self._control.guard.enter(tx, context, Permission.KEY_ADOPT)

    def patch(self, context: RequestContext, name: str, request: wire.KeySetPatch, if_match: int | None) -> wire.KeySet:
        """Change issuer (before anything could sign), access, cache lifetime. Raises Immutable, PolicyRefused."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_set(tx, context, Permission.KEY_SET_UPDATE, name)
            key_set = found.key_set
            check_revision(key_set.revision, if_match)
            changed = key_set
            if request.issuer is not UNSET and request.issuer != key_set.issuer:
                if key_set.first_activated_at is not None:
                    raise errors.Immutable("The issuer cannot change once a key of the set could sign.")
                changed = replace(changed, issuer=check_issuer(request.issuer))
            if request.access is not UNSET:
                changed = replace(changed, access=Access(request.access))
            if request.cache_lifetime is not UNSET:
                changed = replace(changed, cache_lifetime=check_cache_lifetime(request.cache_lifetime))
            if request.stale_if_error is not UNSET:
                changed = replace(changed, stale_if_error=request.stale_if_error)
            if changed != key_set:
                changed = replace(changed, revision=key_set.revision + 1, updated_at=tx.now())
                lease = control.confirmation.lease(tx)
                for key in tx.keys(key_set.id):
                    check_policy(key.policy, changed, lease)
                    transitions.widen(tx, changed, key, lease=lease)
                tx.save(changed)
            answer = views.key_set(tx, changed, control.public_url)
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer


def add_key_set(
    tx: WriteTx, control: Control, request: wire.KeySetCreate, candidates: Sequence[Candidate | None] = ()
) -> tuple[KeySet, list[Id]]:
    """Write a key set and its first keys, some of them adopted. Returns it with the ids of their first versions."""
    problem = name_error(request.name)
    if problem is not None:
        raise errors.InvalidField(f"name: {problem}", fields={"field": "name"})
    now = tx.now()
    key_set = KeySet(
        id=new_id(),
        name=request.name,
        issuer=f"{control.public_url}/{request.name}" if request.issuer is UNSET else check_issuer(request.issuer),
        access=Access(request.access),
        purpose=Purpose(request.purpose),
        cache_lifetime=check_cache_lifetime(request.cache_lifetime),
        stale_if_error=request.stale_if_error,
        existing_issuer=request.existing_issuer,
        created_at=now,
        updated_at=now,
    )
    tx.add(key_set)
    found = candidates or [None] * len(request.keys)
    versions = [
        add_key(tx, control, key_set, wanted, candidate)[1].id
        for wanted, candidate in zip(request.keys, found, strict=True)
    ]
    if any(found):
        adoption.publish(tx, key_set, [candidate for candidate in found if candidate is not None])
    return key_set, versions


def check_issuer(issuer: str) -> str:
    """An issuer identifier: an http or https URL without query or fragment (OIDC Discovery §3, RFC 8414 §2)."""
    try:
        parts = urlsplit(issuer)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_fine = urlsplit(""), False
    sound = parts.scheme in ("http", "https") and parts.hostname and port_is_fine and issuer.isprintable()
    if not sound or "?" in issuer or "#" in issuer or " " in issuer or "@" in parts.netloc:
        raise errors.InvalidField(
            "issuer: an http or https URL without user, query or fragment is needed", fields={"field": "issuer"}
        )
    return issuer


def check_cache_lifetime(seconds: int) -> int:
    """60 to 900 seconds. Raises InvalidField."""
    least, most = timeline.CACHE_LIFETIME
    if not least <= seconds <= most:
        raise errors.InvalidField(
            f"cache_lifetime: {seconds} is outside {least} to {most}", fields={"field": "cache_lifetime"}
        )
    return seconds
