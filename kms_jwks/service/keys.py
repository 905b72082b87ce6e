"""Use cases on keys: list, create, read, change, rotate, disable, enable, retire, delete."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from msgspec import UNSET

from kms_jwks import errors, timeline, wire
from kms_jwks.access import Permission, Scope, allow
from kms_jwks.custodian import transitions
from kms_jwks.model import Key, VersionState
from kms_jwks.service import adoption, key_timeline, views
from kms_jwks.service.control import Control, check_revision, require_enabled
from kms_jwks.service.definitions import add_key, ask_backend, check_policy, check_profile, merge, merge_policy
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.idempotency import find_created, record_created
from kms_jwks.service.views import Created
from kms_jwks.store import WriteTx


class Keys:
    """Keys, for administrators and operators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(
        self,
        context: RequestContext,
        key_set: str,
        limit: int,
        cursor: str | None,
        *,
        state: str | None = None,
        backend: str | None = None,
    ) -> wire.Page:
        """The set's keys that the caller's grants cover: those that are `enabled` or `disabled`, or of one backend."""
        with self._control.store.read() as tx:
            caller = self._control.guard.enter_any(tx, context, Permission.KEY_READ)
            found = tx.key_set(key_set)
            keys = tx.keys(found.id) if found else []
            shown = [k for k in keys if allow(caller.grants, Permission.KEY_READ, Scope(k.key_set_id, k.id))]
            if found is None or (not shown and not allow(caller.grants, Permission.KEY_READ, Scope(found.id))):
                # Answer the same whether the set exists or not, unless the caller may know that it exists.
                self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
                raise errors.KeySetNotFound(f"There is no key set {key_set!r}.")
            if state is not None:
                shown = [k for k in shown if (k.disabled_at is None) == (state == "enabled")]
            if backend is not None:
                shown = [k for k in shown if k.backend == backend]
            if cursor:
                shown = [k for k in shown if k.id > cursor]
            return views.page(shown, limit, lambda k: views.key(tx, found, k))

    def get(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """One key with its versions."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            return views.key(tx, found.key_set, found.key)

    def timeline(self, context: RequestContext, key_set: str, key: str) -> wire.Timeline:
        """The states of the key's versions, recorded and planned, and the steps that are planned."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            facts = key_timeline.read_facts(tx, found.key_set, found.key)
        return key_timeline.build_timeline(facts)

    def create(self, context: RequestContext, key_set: str, request: wire.KeyCreate) -> Created[wire.Key]:
        """Create a key. In a set that has published before, its first version signs after the publish lead.

        Raises the module's refusal where it declines to make the first pair; no key is left then.
        """
        control = self._control
        permission = Permission.KEY_CREATE if request.adopt is UNSET else Permission.KEY_ADOPT
        with control.store.read() as reading:
            control.guard.enter_set(reading, context, permission, key_set)
            earlier = find_created(reading, context, request, reading.key_by_id, key_set)
        candidate = ask_backend(control, request) if earlier is None else None
        with control.store.write() as tx:
            found = control.guard.enter_set(tx, context, permission, key_set)
            earlier = earlier or find_created(tx, context, request, tx.key_by_id, key_set)
            if earlier is not None:
                key, first = earlier, tx.version_by_number(earlier.id, 1)
            else:
                key, first = add_key(tx, control, found.key_set, request, candidate, who=found.caller.client)
                if candidate is not None:
                    adoption.publish(tx, found.key_set, [candidate])
                record_created(tx, context, request, key.id, key_set)
        try:
            complete = control.wait_for_custodian([first.id] if first else [])
        except errors.Error as error:
            self._remove(key, error)
            raise
        with control.store.read() as tx:
            answer = views.key(tx, found.key_set, tx.key_by_id(key.id) or key)
        return Created(answer, complete, f"/v1/key-sets/{key_set}/keys/{key.name}")

    def patch(
        self, context: RequestContext, key_set: str, key: str, request: wire.KeyPatch, if_match: int | None
    ) -> wire.Key:
        """Change the policy or the profile. Raises PolicyRefused with the numbers."""
        control = self._control
        with control.change() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_UPDATE, key_set, key)
            check_revision(found.key.revision, if_match)
            changed = replace(
                found.key,
                policy=merge_policy(found.key.policy, request.policy, tx.now()),
                profile=merge(found.key.profile, request.profile),
            )
            if changed != found.key:
                lease = control.confirmation.lease(tx)
                check_policy(changed.policy, found.key_set, lease)
                check_profile(changed)
                changed = _save(tx, changed)
                transitions.widen(tx, found.key_set, changed, lease=lease)
            return views.key(tx, found.key_set, changed)

    def rotate(self, context: RequestContext, key_set: str, key: str, request: wire.RotateRequest) -> wire.Key:
        """Activate the standby now. Raises NoStandby, NotYetUsable (with usable_at), RotationInProgress.

        `break_glass` with a reason overrides I1 alone.
        """
        control = self._control
        with control.change() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ROTATE, key_set, key)
            require_enabled(found.key)
            versions = tx.versions(key_id=found.key.id)
            active_kid = next((v.kid for v in versions if v.state is VersionState.ACTIVE), None)
            if request.expected_kid not in (UNSET, active_kid):
                raise errors.ActiveKidMismatch(
                    "The active version is not the expected one.", fields={"active_kid": active_kid}
                )
            standby = timeline.choose_standby(versions, found.key.policy)
            if standby is None:
                raise errors.NoStandby(f"Key {key!r} has no published standby version.")
            transitions.activate(
                tx,
                found.key_set,
                found.key,
                standby,
                lease=control.confirmation.lease(tx),
                breach=control.check_break_glass(context, found, request),
                who=found.caller.client,
            )
            return views.key(tx, found.key_set, found.key)

    def disable(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """Stop signing with the key; its versions stay published. The answer comes when no worker signs any more."""
        with self._control.change_everywhere() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_DISABLE, key_set, key)
            changed = found.key
            if changed.disabled_at is None:
                changed = _save(tx, replace(changed, disabled_at=tx.now()))
            return views.key(tx, found.key_set, changed)

    def enable(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """Let the key sign again."""
        with self._control.change() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_ENABLE, key_set, key)
            changed = found.key
            if changed.retired_at is not None:
                raise errors.KeyRetired(f"Key {key!r} is retired.")
            if changed.disabled_at is not None:
                changed = _save(tx, replace(changed, disabled_at=None))
            return views.key(tx, found.key_set, changed)

    def retire(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """End a key: the answer comes when no worker signs with it. Repeating changes nothing."""
        control = self._control
        with control.change_everywhere() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_DELETE, key_set, key)
            retired = transitions.retire_key(tx, found.key_set, found.key, lease=control.confirmation.lease(tx))
            return views.key(tx, found.key_set, retired)

    def delete(self, context: RequestContext, key_set: str, key: str) -> None:
        """Delete a key that never published anything; its name is free again. Raises AlreadyPublished."""
        with self._control.change() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_DELETE, key_set, key)
            transitions.delete_key(tx, found.key)

    def _remove(self, created: Key, refusal: errors.Error) -> None:
        """Delete the key that a call created and whose first pair was not made; `refusal` then says so."""
        with contextlib.suppress(errors.Error), self._control.change() as tx:
            key = tx.key_by_id(created.id)
            if key is not None and key.deleted_at is None and key.retired_at is None:
                transitions.delete_key(tx, key)
                tx.remove_idempotency_record(key.id)
                refusal.next_step = f"No key was created. {refusal.next_step}"


def _save(tx: WriteTx, key: Key) -> Key:
    saved = replace(key, revision=key.revision + 1, updated_at=tx.now())
    tx.save(saved)
    return saved
