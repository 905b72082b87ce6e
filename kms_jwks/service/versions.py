"""Use cases on key versions: list, create, read, evidence, safety, activate, revoke, destroy."""

from __future__ import annotations

from msgspec import UNSET

from kms_jwks import errors, timeline, wire
from kms_jwks.access import EVERYTHING, Permission
from kms_jwks.backends.base import KeyRef
from kms_jwks.custodian import transitions
from kms_jwks.model import Id, Instant, KeyVersion, VersionState
from kms_jwks.service import adoption, views
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control, find_version
from kms_jwks.service.guard import Entered
from kms_jwks.service.keys import breach, require_enabled
from kms_jwks.service.revocation import Revocation
from kms_jwks.service.views import Created
from kms_jwks.store import ReadTx
from kms_jwks.times import optional, to_datetime, to_instant


class Versions:
    """Key versions, for operators. `version` is a number or a kid."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._revoking = Revocation(control)

    def list(self, context: RequestContext, key_set: str, key: str, limit: int, cursor: str | None) -> wire.Page:
        """The key's versions, destroyed ones included."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            after = Id(cursor) if cursor else None
            versions = tx.versions(key_id=found.key.id, after=after, limit=limit + 1)
            items = [views.version(found.key, v, views.trouble(tx, v)) for v in versions]
        return views.page(items, [v.id for v in versions], limit)

    def get(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Version:
        """One version. Raises VersionNotFound."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            value = _find(tx, found, version)
            return views.version(found.key, value, views.trouble(tx, value))

    def create(
        self, context: RequestContext, key_set: str, key: str, request: wire.VersionCreate
    ) -> Created[wire.Version]:
        """Ask for a standby, or adopt one. Raises TransitionRefused when one is to be made and there is one already."""
        control = self._control
        if request.adopt is not UNSET:
            return self._adopt(context, key_set, key, request.adopt)
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ROTATE, key_set, key)
            require_enabled(found.key)
            made = transitions.ensure_standby(tx, found.key)
            if made is None:
                raise errors.TransitionRefused(f"Key {key!r} has a standby version already.")
        return self._made(found, made)

    def _adopt(self, context: RequestContext, key_set: str, key: str, wanted: wire.Adopt) -> Created[wire.Version]:
        """A further version beside the standby, which signs first: this one is activated by name."""
        control = self._control
        with control.store.read() as reading:
            found = control.guard.enter_key(reading, context, Permission.KEY_ADOPT, key_set, key)
            control.guard.require(context, Permission.KEY_ADOPT, EVERYTHING)  # a module is no key set's own
            require_enabled(found.key)
        candidate = adoption.examine(control.backends, found.key.backend, found.key.alg, wanted)
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ADOPT, key_set, key)
            require_enabled(found.key)
            made = adoption.add_adopted(tx, found.key, candidate)
            adoption.publish(tx, found.key_set, [candidate])
        return self._made(found, made)

    def _made(self, found: Entered, made: KeyVersion) -> Created[wire.Version]:
        """The answer once the version is published everywhere, or without it after a while."""
        control = self._control
        complete = control.wait_for_custodian([made.id])
        with control.store.read() as tx:
            made = tx.version(made.id) or made
            answer = views.version(found.key, made, views.trouble(tx, made))
        path = f"/v1/key-sets/{found.key_set.name}/keys/{found.key.name}/versions/{made.number}"
        return Created(answer, complete, path)

    def public_jwk(self, context: RequestContext, key_set: str, key: str, version: str) -> dict[str, object]:
        """The public half as the JWKS shows it. Raises VersionNotFound while there is no pair."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            jwk = views.published_jwk(_find(tx, found, version))
        if jwk is None:
            raise errors.VersionNotFound("This version has no key pair.")
        return jwk

    def safety(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Safety:
        """Each invariant with both sides, and what happens next."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            value = _find(tx, found, version)
        report = timeline.safety(value, found.key, found.key_set, found.now)
        return wire.Safety(
            kid=value.kid,
            state=value.state.value,
            now=to_datetime(found.now),
            checks=views.checks(report),
            next=report.next,
            next_at=optional(report.next_at),
        )

    def attributes(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Attributes:
        """The evidence of promise 1, read from the module for this call, beside what was recorded at creation."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            value = _find(tx, found, version)
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
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.VERSION_ACTIVATE, key_set, key)
            require_enabled(found.key)
            broken = breach(control, context, tx, found, request or wire.ActivateRequest())
            wanted = _find(tx, found, version)
            value = transitions.activate(
                tx,
                found.key_set,
                found.key,
                wanted,
                lease=control.confirmation.lease(tx),
                breach=broken if transitions.is_early(tx, found.key, wanted) else None,
                who=found.caller.client,
            )
            answer = views.version(found.key, value)
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer

    def retire(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.RetireRequest
    ) -> wire.Version:
        """Take a retiring version out of the JWKS now; the custodian does so by itself when I2 allows it.

        Raises TransitionRefused with `retirable_at`; `break_glass` with a reason overrides I2 alone. The answer comes
        when no worker signs for callers that pinned the version.
        """
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ROTATE, key_set, key)
            broken = breach(control, context, tx, found, request)
            value = transitions.retire(tx, found.key, _find(tx, found, version), breach=broken, who=found.caller.client)
            answer, lease = views.version(found.key, value), control.confirmation.lease(tx)
        control.confirmation.wait_until_confirmed(tx.committed_epoch, lease)
        return answer

    def revoke(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.RevokeRequest
    ) -> wire.Revoked:
        """Revoke now, or say what that would do. No worker anywhere signs with the version once this returns."""
        return self._revoking.version(context, key_set, key, version, request)

    def destroy(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.DestroyRequest
    ) -> wire.Version:
        """Date the destruction of a retired or revoked version, 7 days ahead at least."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.VERSION_DESTROY, key_set, key)
            when = None if request.destroy_at is UNSET else _instant(request)
            value = transitions.schedule_destruction(
                tx, _find(tx, found, version), when, found.key.policy.destroy_after
            )
            answer = views.version(found.key, value)
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer

    def cancel_destroy(self, context: RequestContext, key_set: str, key: str, version: str) -> wire.Version:
        """Take a dated destruction back."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.VERSION_DESTROY, key_set, key)
            answer = views.version(found.key, transitions.cancel_destruction(tx, _find(tx, found, version)))
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer


def _instant(request: wire.DestroyRequest) -> Instant:
    try:
        return to_instant(request.destroy_at)  # type: ignore[arg-type]
    except ValueError as error:
        raise errors.InvalidField(f"destroy_at: {error}", fields={"field": "destroy_at"}) from None


def _find(tx: ReadTx, found: Entered, version: str) -> KeyVersion:
    return find_version(tx, found.key, version)
