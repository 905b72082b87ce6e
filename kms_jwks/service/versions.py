"""Use cases on key versions: list, create, read, evidence, safety, activate, retire, destroy."""

from __future__ import annotations

from collections.abc import Collection

from msgspec import UNSET

from kms_jwks import errors, timeline, wire
from kms_jwks.access import Permission
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import KeyRef
from kms_jwks.custodian import transitions
from kms_jwks.model import Id, KeyVersion, VersionState
from kms_jwks.service import adoption, views
from kms_jwks.service.control import Control, find_version, read_instant, require_enabled
from kms_jwks.service.guard import Entered, RequestContext
from kms_jwks.service.idempotency import find_created, record_created
from kms_jwks.service.views import Created
from kms_jwks.times import optional, to_datetime


class Versions:
    """Key versions, for operators. `version` is a number or a kid."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(
        self,
        context: RequestContext,
        key_set: str,
        key: str,
        limit: int,
        cursor: str | None,
        *,
        states: Collection[str] | None = None,
    ) -> wire.Page:
        """The key's versions in some states, or all of them, destroyed ones included."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            after = Id(cursor) if cursor else None
            wanted = None if states is None else {VersionState(state) for state in states}
            versions = tx.versions(key_id=found.key.id, states=wanted, after=after, limit=limit + 1)
            return views.page(versions, limit, lambda v: views.version(tx, found.key, v))

    def get(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Version:
        """One version. Raises VersionNotFound."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            return views.version(tx, found.key, find_version(tx, found.key, version))

    def create(
        self, context: RequestContext, key_set: str, key: str, request: wire.VersionCreate
    ) -> Created[wire.Version]:
        """Request a further version: one to be made, as the standby, or one to adopt.

        Raises TransitionRefused for a standby to be made where there is one already.
        """
        control = self._control
        if request.adopt is not UNSET:
            return self._adopt(context, key_set, key, request, request.adopt)
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ROTATE, key_set, key)
            made = find_created(tx, context, request, tx.version, key_set, key)
            if made is None:
                require_enabled(found.key)
                made = transitions.ensure_standby(tx, found.key)
                if made is None:
                    raise errors.TransitionRefused(f"Key {key!r} has a standby version already.")
                record_created(tx, context, request, made.id, key_set, key)
        return self._await_creation(found, made)

    def _adopt(
        self, context: RequestContext, key_set: str, key: str, request: wire.VersionCreate, wanted: wire.Adopt
    ) -> Created[wire.Version]:
        """Add a further version beside the standby. The standby stays next in line; this one is activated by name."""
        control = self._control
        with control.store.read() as reading:
            found = control.guard.enter_key(reading, context, Permission.KEY_ADOPT, key_set, key)
            earlier = find_created(reading, context, request, reading.version, key_set, key)
            if earlier is None:
                require_enabled(found.key)
        if earlier is not None:
            return self._await_creation(found, earlier)
        candidate = adoption.examine(control.backends, found.key.backend, ALGORITHMS[found.key.alg], wanted)
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ADOPT, key_set, key)
            made = find_created(tx, context, request, tx.version, key_set, key)
            if made is None:
                require_enabled(found.key)
                made = adoption.add_adopted(tx, found.key, candidate, who=found.caller.client)
                adoption.publish(tx, found.key_set, [candidate])
                record_created(tx, context, request, made.id, key_set, key)
        return self._await_creation(found, made)

    def _await_creation(self, found: Entered, made: KeyVersion) -> Created[wire.Version]:
        """The answer once the version is published everywhere, or the incomplete one when that takes too long."""
        complete = self._control.wait_for_custodian([made.id])
        with self._control.store.read() as tx:
            answer = views.version(tx, found.key, tx.version(made.id) or made)
        path = f"/v1/key-sets/{found.key_set.name}/keys/{found.key.name}/versions/{made.number}"
        return Created(answer, complete, path)

    def public_jwk(self, context: RequestContext, key_set: str, key: str, version: str) -> dict[str, object]:
        """The public half as the JWKS shows it. Raises VersionNotFound while the pair is not made."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            jwk = views.published_jwk(find_version(tx, found.key, version))
        if jwk is None:
            raise errors.VersionNotFound("This version has no key pair.")
        return jwk

    def safety(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Safety:
        """Each invariant with both sides, what happens next, and the external keys that verifiers trust beside it."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            value = find_version(tx, found.key, version)
            externals = views.external_keys(tx, found.key_set)
            removed = tx.count_removed_external_keys(found.key_set.id)
            warnings = views.same_key_warnings(tx, value)
        report = timeline.safety(value, found.key, found.key_set, found.now)
        return wire.Safety(
            kid=value.kid,
            state=value.state.value,
            now=to_datetime(found.now),
            checks=views.checks(report),
            next=report.next,
            next_at=optional(report.next_at),
            external_keys=externals,
            external_keys_removed=removed,
            warnings=warnings,
        )

    def attributes(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Attributes:
        """The evidence of promise 1, read from the module for this call, beside what was recorded at creation."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            value = find_version(tx, found.key, version)
        if value.kid is None or value.ref is None or value.state is VersionState.DESTROYED:
            raise errors.VersionNotFound("This version has no key pair in a module.")
        ref = KeyRef.of(**value.ref)
        evidence = self._control.backends.ask(value.backend, "attributes", lambda b: b.attributes(ref))
        return wire.Attributes(
            kid=value.kid,
            backend=value.backend,
            generated_in_module=evidence.generated_in_module,
            non_extractable=evidence.non_extractable,
            sign_only=evidence.sign_only,
            attributes=dict(evidence.attributes),
            recorded=dict(value.evidence or {}),
        )

    def activate(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.ActivateRequest | None = None
    ) -> wire.Version:
        """Let a published version sign. Raises NotYetUsable, TransitionRefused, RotationInProgress.

        `break_glass` with a reason overrides I1 alone.
        """
        control = self._control
        with control.change() as tx:
            found = control.guard.enter_key(tx, context, Permission.VERSION_ACTIVATE, key_set, key)
            require_enabled(found.key)
            reason = control.check_break_glass(context, found, request or wire.ActivateRequest())
            value = transitions.activate(
                tx,
                found.key_set,
                found.key,
                find_version(tx, found.key, version),
                lease=control.confirmation.lease(tx),
                breach=reason,
                who=found.caller.client,
            )
            return views.version(tx, found.key, value)

    def retire(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.RetireRequest
    ) -> wire.Version:
        """Take a retiring version out of the JWKS now; the custodian does so by itself when I2 allows it.

        Raises TransitionRefused with `retirable_at`; `break_glass` with a reason overrides I2 alone. The answer comes
        when no worker signs for callers that pinned the version.
        """
        control = self._control
        with control.change_everywhere() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ROTATE, key_set, key)
            reason = control.check_break_glass(context, found, request)
            value = find_version(tx, found.key, version)
            value = transitions.retire(tx, found.key, value, breach=reason, who=found.caller.client)
            return views.version(tx, found.key, value)

    def destroy(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.DestroyRequest
    ) -> wire.Version:
        """Schedule the destruction of a retired or revoked version, at least 7 days ahead."""
        with self._control.change() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.VERSION_DESTROY, key_set, key)
            when = None if request.destroy_at is UNSET else read_instant(request.destroy_at, "destroy_at")
            value = find_version(tx, found.key, version)
            value = transitions.schedule_destruction(tx, value, when, found.key.policy.destroy_after)
            return views.version(tx, found.key, value)

    def cancel_destroy(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Version:
        """Cancel a scheduled destruction."""
        with self._control.change() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.VERSION_DESTROY, key_set, key)
            value = transitions.cancel_destruction(tx, find_version(tx, found.key, version))
            return views.version(tx, found.key, value)
