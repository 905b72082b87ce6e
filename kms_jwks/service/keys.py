"""Use cases on keys: list, create, read, change, rotate, disable, enable."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from kms_jwks import errors, timeline, wire
from kms_jwks.access import EVERYTHING, Permission, Scope, allow
from kms_jwks.algorithms import ALGORITHMS, DEFAULT_RSA_BITS
from kms_jwks.custodian import document_limits, transitions
from kms_jwks.model import (
    Instant,
    Key,
    KeySet,
    KeyVersion,
    Policy,
    SigningProfile,
    VersionState,
    name_error,
    new_id,
)
from kms_jwks.service import adoption, key_timeline, views
from kms_jwks.service.adoption import Candidate
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control, check_revision
from kms_jwks.service.guard import Entered
from kms_jwks.service.views import Created
from kms_jwks.store import ReadTx, WriteTx
from kms_jwks.times import to_instant

T = TypeVar("T", Policy, SigningProfile)


class Keys:
    """Keys, for administrators and operators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self, context: RequestContext, key_set: str, limit: int, cursor: str | None) -> wire.Page:
        """The set's keys that the caller's grants cover."""
        with self._control.store.read() as tx:
            caller = self._control.guard.enter_any(tx, context, Permission.KEY_READ)
            found = tx.key_set(key_set)
            keys = tx.keys(found.id) if found else []
            shown = [k for k in keys if allow(caller.grants, Permission.KEY_READ, Scope(k.key_set_id, k.id))]
            if found is None or (not shown and not allow(caller.grants, Permission.KEY_READ, Scope(found.id))):
                # The same answer whether the set exists or not, unless the caller may know.
                self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
                raise errors.KeySetNotFound(f"There is no key set {key_set!r}.")
            if cursor:
                shown = [k for k in shown if k.id > cursor]
            items = [views.key(tx, found, k) for k in shown[: limit + 1]]
        return views.page(items, [k.id for k in shown], limit)

    def get(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """One key with its versions."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            return views.key(tx, found.key_set, found.key)

    def timeline(self, context: RequestContext, key_set: str, key: str) -> wire.Timeline:
        """What was, what is, and what is planned for the key's versions."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_key(tx, context, Permission.KEY_READ, key_set, key)
            facts = key_timeline.read(tx, found.key_set, found.key)
        return key_timeline.of_key(facts)

    def create(self, context: RequestContext, key_set: str, request: wire.KeyCreate) -> Created[wire.Key]:
        """Create a key. In a set that has published before, its first version signs after the publish lead."""
        control = self._control
        permission = Permission.KEY_CREATE if request.adopt is UNSET else Permission.KEY_ADOPT
        with control.store.read() as reading:
            control.guard.enter_set(reading, context, permission, key_set)
            if request.adopt is not UNSET:
                # A module is no key set's own: whoever may adopt from it could take any application's key.
                control.guard.require(context, permission, EVERYTHING)
        candidate = look_at(control, request)
        with control.store.write() as tx:
            found = control.guard.enter_set(tx, context, permission, key_set)
            key, version = add_key(tx, control, found.key_set, request, candidate)
            if candidate is not None:
                adoption.publish(tx, found.key_set, [candidate])
        complete = control.wait_for_custodian([version.id])
        with control.store.read() as tx:
            answer = views.key(tx, found.key_set, tx.key_by_id(key.id) or key)
        return Created(answer, complete, f"/v1/key-sets/{key_set}/keys/{key.name}")

    def patch(
        self, context: RequestContext, key_set: str, key: str, request: wire.KeyPatch, if_match: int | None
    ) -> wire.Key:
        """Change the policy or the profile. Raises PolicyRefused with the numbers."""
        control = self._control
        with control.store.write() as tx:
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
                changed = replace(changed, revision=found.key.revision + 1, updated_at=tx.now())
                tx.save(changed)
                transitions.widen(tx, found.key_set, changed, lease=lease)
            answer = views.key(tx, found.key_set, changed)
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer

    def rotate(self, context: RequestContext, key_set: str, key: str, request: wire.RotateRequest) -> wire.Key:
        """Activate the standby now. Raises NoStandby, NotYetUsable (with usable_at), RotationInProgress.

        `break_glass` with a reason overrides I1 alone.
        """
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ROTATE, key_set, key)
            require_enabled(found.key)
            versions = tx.versions(key_id=found.key.id)
            active = next((v for v in versions if v.state is VersionState.ACTIVE), None)
            if request.expected_kid is not UNSET and (active is None or active.kid != request.expected_kid):
                raise errors.ActiveKidMismatch(
                    "The active version is not the expected one.", fields={"active_kid": active.kid if active else None}
                )
            standby = _standby(found.key, versions)
            broken = breach(control, context, tx, found, request)
            transitions.activate(
                tx,
                found.key_set,
                found.key,
                standby,
                lease=control.confirmation.lease(tx),
                breach=broken if transitions.is_early(tx, found.key, standby) else None,
                who=found.caller.client,
            )
            answer = views.key(tx, found.key_set, found.key)
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer

    def disable(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """Stop signing with the key; its versions stay published. The answer comes when no worker signs any more."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_DISABLE, key_set, key)
            changed = found.key
            if changed.disabled_at is None:
                changed = _touched(tx, replace(changed, disabled_at=tx.now()))
            answer = views.key(tx, found.key_set, changed)
            lease, here = control.confirmation.lease(tx), tx.epoch()
        # Said again, it waits again: who lost the first answer gets the same certainty.
        control.confirmation.wait_until_confirmed(tx.committed_epoch or here, lease)
        return answer

    def enable(self, context: RequestContext, key_set: str, key: str) -> wire.Key:
        """Let the key sign again."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_key(tx, context, Permission.KEY_ENABLE, key_set, key)
            changed = found.key
            if changed.disabled_at is not None:
                changed = _touched(tx, replace(changed, disabled_at=None))
            answer = views.key(tx, found.key_set, changed)
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return answer


def add_key(
    tx: WriteTx, control: Control, key_set: KeySet, request: wire.KeyCreate, candidate: Candidate | None = None
) -> tuple[Key, KeyVersion]:
    """Write a key and its first version, `creating`: to be made, or adopted and to be published by the caller.

    Raises every refusal of a key's definition.
    """
    problem = name_error(request.name)
    if problem is not None:
        raise errors.InvalidField(f"name: {problem}", fields={"field": "name"})
    now = tx.now()
    key = Key(
        id=new_id(),
        key_set_id=key_set.id,
        name=request.name,
        alg=request.alg,
        rsa_bits=_rsa_bits(request) if candidate is None else candidate.rsa_bits,
        backend=backend_of(control, request),
        policy=merge_policy(Policy(), request.policy, now),
        profile=merge(SigningProfile(), request.profile),
        created_at=now,
        updated_at=now,
    )
    check_policy(key.policy, key_set, control.confirmation.lease(tx))
    check_profile(key)
    check_compatible_algorithms(tx, key_set, key.alg)
    document_limits.require_room(tx, key_set, key.alg, more_keys=1)
    tx.add(key)
    if candidate is None:
        return key, transitions.add_version(tx, key)
    return key, adoption.add_adopted(tx, key, candidate)


def look_at(control: Control, request: wire.KeyCreate) -> Candidate | None:
    """What a module can say before anything is written: the pair to be adopted, or that it lacks the algorithm.

    A module that is away is waited for only to adopt; else the custodian finds out. Raises
    UnsupportedAlgorithmRequested, and what `adoption.examine` raises.
    """
    if request.adopt is not UNSET:
        bits = None if request.rsa_bits is UNSET else request.rsa_bits
        return adoption.examine(control.backends, backend_of(control, request), request.alg, request.adopt, bits)
    name = control.backends.default if request.backend is UNSET else request.backend
    if name not in control.backends.by_name or request.alg not in ALGORITHMS:
        return None  # refused by name further on
    with contextlib.suppress(errors.BackendError):
        offered = control.backends.ask(name, "capabilities", lambda backend: backend.capabilities())
        if request.alg not in offered:
            raise errors.UnsupportedAlgorithmRequested(
                f"Backend {name!r} does not offer {request.alg}.", fields={"algorithms": sorted(offered)}
            )
    return None


def merge(current: T, changes: msgspec.Struct | msgspec.UnsetType) -> T:
    """`current` with the fields of a request struct that were sent."""
    if changes is UNSET:
        return current
    given: dict[str, Any] = msgspec.structs.asdict(changes)
    return replace(current, **{name: value for name, value in given.items() if value is not UNSET})


def merge_policy(current: Policy, changes: wire.PolicyFields | msgspec.UnsetType, now: Instant) -> Policy:
    """`merge`, with the API's datetime as an instant. Raises InvalidField."""
    if changes is UNSET or changes.hold_until is UNSET or changes.hold_until is None:
        return merge(current, changes)
    try:
        until = to_instant(changes.hold_until)
    except ValueError as error:
        raise errors.InvalidField(f"hold_until: {error}", fields={"field": "policy.hold_until"}) from None
    if until > timeline.later(now, timeline.FARTHEST):
        raise errors.InvalidField("hold_until: lies over 10 years ahead", fields={"field": "policy.hold_until"})
    return replace(merge(current, changes), hold_until=until)


def breach(
    control: Control, context: RequestContext, tx: ReadTx, found: Entered, request: wire.BreakGlassRequest
) -> str | None:
    """The reason for which this call may override an invariant, None where it does not ask for that.

    Raises InvalidField without a reason, Forbidden without the permission, be there something to override or not.
    """
    if not request.break_glass:
        return None
    control.guard.require(context, Permission.BREAK_GLASS, Scope(found.key_set.id, found.key.id))
    if not request.reason.strip():
        raise errors.InvalidField("reason: breaking the glass needs one", fields={"field": "reason"})
    return request.reason


def check_policy(policy: Policy, key_set: KeySet, lease: int) -> None:
    """Raise PolicyRefused with every rule that is broken."""
    problems = timeline.policy_problems(policy, cache_lifetime=key_set.cache_lifetime, lease=lease)
    if problems:
        raise errors.PolicyRefused("; ".join(problems) + ".", fields={"problems": problems})


def check_profile(key: Key) -> None:
    """Raise PolicyRefused for a default lifetime that no token could have."""
    # 300 s is what nobody asked for: with a smaller max_token_ttl that one is the default.
    lifetime, most = key.profile.default_lifetime, key.policy.max_token_ttl
    if lifetime < 1 or (lifetime > most and lifetime != SigningProfile().default_lifetime):
        raise errors.PolicyRefused(
            f"default_lifetime {lifetime} is outside 1 to max_token_ttl {most}.", fields={"limit": most}
        )


def require_enabled(key: Key) -> None:
    """Raise KeyDisabled."""
    if key.disabled_at is not None:
        raise errors.KeyDisabled(f"Key {key.name!r} is disabled.")


def _touched(tx: WriteTx, key: Key) -> Key:
    changed = replace(key, revision=key.revision + 1, updated_at=tx.now())
    tx.save(changed)
    return changed


def _standby(key: Key, versions: list[KeyVersion]) -> KeyVersion:
    standby = timeline.choose_standby(versions, key.policy)
    if standby is None:
        raise errors.NoStandby(f"Key {key.name!r} has no published standby version.")
    return standby


def _rsa_bits(request: wire.KeyCreate) -> int | None:
    alg = ALGORITHMS.get(request.alg)
    if alg is None:
        raise errors.UnsupportedAlgorithmRequested(
            f"The algorithm is none of {', '.join(sorted(ALGORITHMS))}.", fields={"algorithms": sorted(ALGORITHMS)}
        )
    if not alg.is_rsa:
        if request.rsa_bits is not UNSET:
            raise errors.InvalidField(f"rsa_bits: {alg.name} has no modulus", fields={"field": "rsa_bits"})
        return None
    return DEFAULT_RSA_BITS if request.rsa_bits is UNSET else request.rsa_bits


def backend_of(control: Control, request: wire.KeyCreate) -> str:
    """The backend that a request names or leaves to the default. Raises InvalidField, BackendUnknown."""
    name = control.backends.default if request.backend is UNSET else request.backend
    if name is None:
        raise errors.InvalidField(
            "backend: several are configured and none is the default; name one", fields={"field": "backend"}
        )
    if name not in control.backends.by_name:
        raise errors.BackendUnknown(f"No backend {name!r} is configured.")
    return name


def check_compatible_algorithms(tx: ReadTx, key_set: KeySet, alg: str) -> None:
    """Raise LimitReached where verifiers that do not know one key's algorithm would lose the whole set (I5)."""
    row = ALGORITHMS[alg]
    others = [ALGORITHMS[k.alg] for k in tx.keys(key_set.id)]
    others += [ALGORITHMS[e.alg] for e in tx.external_keys(key_set.id)]
    others = [other for other in others if other.is_post_quantum is row.is_post_quantum]  # the others' document
    if any(row.exclusive != other.exclusive for other in others):
        raise errors.LimitReached(
            f"{alg} and {next(o.name for o in others if o.exclusive != row.exclusive)} cannot share a key set: "
            "widespread verifiers reject a whole set over one key they do not know."
        )
