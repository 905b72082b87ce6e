"""Use cases on key sets: list, create, read, change, retire, delete."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from msgspec import UNSET

from kms_jwks import errors, wire
from kms_jwks.access import Permission, Scope, allow
from kms_jwks.custodian import transitions
from kms_jwks.model import Access, Id, KeySet
from kms_jwks.service import views
from kms_jwks.service.control import Control, check_revision
from kms_jwks.service.definitions import (
    add_key_set,
    ask_backend,
    check_cache_lifetime,
    check_issuer,
    check_policy,
)
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.idempotency import find_created, record_created
from kms_jwks.service.views import Created
from kms_jwks.store import ReadTx


class KeySets:
    """Key sets, for administrators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(
        self,
        context: RequestContext,
        limit: int,
        cursor: str | None,
        *,
        purpose: str | None = None,
        access: str | None = None,
    ) -> wire.Page:
        """The key sets that the caller's grants cover, each with its keys in short; `get` has them whole."""
        with self._control.store.read() as tx:
            caller = self._control.guard.enter_any(tx, context, Permission.KEY_SET_READ)
            shown: list[KeySet] = []
            after = Id(cursor) if cursor else None
            while len(shown) <= limit:
                chunk = tx.key_sets(after=after, limit=limit + 1)
                wanted = [s for s in chunk if purpose in (None, s.purpose) and access in (None, s.access)]
                shown += [s for s in wanted if allow(caller.grants, Permission.KEY_SET_READ, Scope(s.id))]
                if len(chunk) <= limit:
                    break
                after = chunk[-1].id
            return views.page(shown, limit, views.key_set_summaries(tx, self._control.public_url))

    def get(self, context: RequestContext, name: str) -> wire.KeySet:
        """One key set with its keys."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_SET_READ, name)
            return views.key_set(tx, found.key_set, self._control.public_url)

    def create(self, context: RequestContext, request: wire.KeySetCreate) -> Created[wire.KeySet]:
        """Create a key set, with the keys named in the same call: these sign as soon as every worker publishes them.

        Raises the module's refusal where it declines to make a pair. Then no set is left, or, where other keys of it
        are published already, the set without the key that the error names.
        """
        control = self._control
        with control.store.read() as reading:
            self._authorise_creation(reading, context, request)
            earlier = find_created(reading, context, request, reading.key_set_by_id)
        candidates = [ask_backend(control, wanted) for wanted in request.keys] if earlier is None else []
        with control.store.write() as tx:
            self._authorise_creation(tx, context, request)
            earlier = earlier or find_created(tx, context, request, tx.key_set_by_id)
            if earlier is not None:
                key_set, versions = earlier, _first_versions(tx, earlier, request)
            else:
                key_set, versions = add_key_set(tx, control, request, candidates)
                record_created(tx, context, request, key_set.id)
            answer = views.key_set(tx, key_set, control.public_url)
        complete = True
        if versions:
            try:
                complete = control.wait_for_custodian(versions)
            except errors.Error as error:
                self._remove(key_set, error)
                raise
            with control.store.read() as after:
                answer = views.key_set(after, after.key_set_by_id(key_set.id) or key_set, control.public_url)
        else:
            control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return Created(answer, complete, f"/v1/key-sets/{key_set.name}")

    def _authorise_creation(self, tx: ReadTx, context: RequestContext, request: wire.KeySetCreate) -> None:
        self._control.guard.enter(tx, context, Permission.KEY_SET_CREATE)
        if any(wanted.adopt is not UNSET for wanted in request.keys):
            self._control.guard.enter(tx, context, Permission.KEY_ADOPT)

    def retire(self, context: RequestContext, name: str) -> wire.KeySet:
        """Retire a set with all its keys: the answer comes when no worker signs with them. Repeating changes nothing.

        Raises Conflict for the default key set.
        """
        control = self._control
        with control.change_everywhere() as tx:
            found = control.guard.enter_set(tx, context, Permission.KEY_SET_DELETE, name)
            self._refuse_default(name)
            retired = transitions.retire_key_set(tx, found.key_set, lease=control.confirmation.lease(tx))
            return views.key_set(tx, retired, control.public_url)

    def delete(self, context: RequestContext, name: str) -> None:
        """Delete a set that never published anything; its name and issuer are free again.

        Raises AlreadyPublished, and Conflict for the default key set.
        """
        with self._control.change() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_SET_DELETE, name)
            self._refuse_default(name)
            transitions.delete_key_set(tx, found.key_set)

    def _refuse_default(self, name: str) -> None:
        if name == self._control.default_key_set:
            raise errors.Conflict(
                f"Key set {name!r} is this node's default_key_set, which the paths without a key set's name serve.",
                next_step="Name another set in default_key_set on every node and restart them, or retire single keys.",
            )

    def _remove(self, created: KeySet, refusal: errors.Error) -> None:
        """Delete the set that a call created, or, if it has published other keys, the key that `refusal` names.

        `refusal` then says what is left.
        """
        with contextlib.suppress(errors.Error), self._control.change() as tx:
            key_set = tx.key_set_by_id(created.id)
            if key_set is None or key_set.deleted_at is not None or key_set.retired_at is not None:
                return
            if key_set.first_published_at is None:
                transitions.delete_key_set(tx, key_set)
                tx.remove_idempotency_record(key_set.id)
                refusal.next_step = f"No key set was created. {refusal.next_step}"
                return
            failed = tx.key(key_set.id, str(refusal.fields.get("key")))
            if failed is not None:
                transitions.delete_key(tx, failed)
            kept = [key.name for key in tx.keys(key_set.id)]
            refusal.fields["created"] = kept
            refusal.next_step = f"The key set exists with {', '.join(kept)}: create the other key in it, or retire it."

    def patch(self, context: RequestContext, name: str, request: wire.KeySetPatch, if_match: int | None) -> wire.KeySet:
        """Change issuer (before a key could sign), access, cache lifetime. Raises Immutable, PolicyRefused."""
        control = self._control
        with control.change() as tx:
            found = control.guard.enter_set(tx, context, Permission.KEY_SET_UPDATE, name)
            key_set = found.key_set
            check_revision(key_set.revision, if_match)
            if key_set.retired_at is not None and request.issuer is not UNSET:
                raise errors.KeySetRetired(f"Key set {name!r} is retired, and its issuer stays taken.")
            changed = key_set
            if request.issuer is not UNSET and request.issuer != key_set.issuer:
                if key_set.first_activated_at is not None:
                    raise errors.Immutable("The issuer cannot change once a key of the set could sign.")
                changed = replace(changed, issuer=check_issuer(tx, control, request.issuer, name))
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
            return views.key_set(tx, changed, control.public_url)


def _first_versions(tx: ReadTx, key_set: KeySet, request: wire.KeySetCreate) -> list[Id]:
    """The first versions of the keys that an earlier call made with the key set.

    Also of a key that was deleted since, unless there is a newer one of its name: a key that was refused to the first
    call is missing for the second one too.
    """
    names = {wanted.name for wanted in request.keys}
    newest: dict[str, Id] = {}
    for version in tx.versions(key_set_id=key_set.id):
        key = tx.key_by_id(version.key_id)
        if key is not None and key.name in names and version.number == 1:
            newest[key.name] = version.id
    return list(newest.values())
