"""`safety`: each invariant of a version with both sides as instants, and what happens to it next."""

from __future__ import annotations

from dataclasses import dataclass

from kms_jwks.model import Instant, Key, KeySet, KeyVersion, VersionState
from kms_jwks.timeline.invariants import destructible_at, retirable_at, usable_at
from kms_jwks.timeline.rotation import rotation_wanted

_S = VersionState


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant with both sides as instants: it holds when `left` is there and not before `right`."""

    invariant: str
    statement: str
    left: Instant | None
    right: Instant | None

    @property
    def holds(self) -> bool:
        """Whether both sides are known and in order."""
        return self.left is not None and self.right is not None and self.left >= self.right


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """What `safety` finds: the checks, and what happens next to the version and when."""

    checks: tuple[Check, ...]
    next: str
    next_at: Instant | None


def safety(version: KeyVersion, key: Key, key_set: KeySet, now: Instant) -> SafetyReport:
    """Each invariant of `version` with both sides: as recorded where the step was taken, else as if taken now."""
    checks: list[Check] = []
    if version.state is not _S.CREATING:
        lead = "visible_since" if version.first_fill else f"visible_since + publish_lead ({key.policy.publish_lead} s)"
        checks.append(
            Check(
                "I1",
                f"activated_at ≥ {lead}" if version.activated_at else f"activation now ≥ {lead}",
                version.activated_at or now,
                usable_at(version, key.policy),
            )
        )
    if version.deactivated_at is not None:
        b = version.bounds
        end = (
            f"deactivated_at + handover ({b.handover} s) + lease ({b.lease} s)"
            f" + max_token_ttl ({b.max_token_ttl} s) + clock_skew ({b.clock_skew} s)"
        )
        if version.revoked_at is None:
            step = "retired_at" if version.retired_at else "withdrawal now"
            checks.append(Check("I2", f"{step} ≥ {end}", version.retired_at or now, retirable_at(version)))
        elif version.destroy_at is not None:
            # A revoked version left at once; what its tokens still bound is the destruction of the key.
            when = version.destroyed_at or version.destroy_at
            checks.append(Check("I2", f"destruction ≥ {end}", when, retirable_at(version)))
    words, at = _next(version, key, now)
    return SafetyReport(tuple(checks), words, at)


def _next(version: KeyVersion, key: Key, now: Instant) -> tuple[str, Instant | None]:
    match version.state:
        case _S.CREATING:
            return "the custodian makes its key pair and publishes it", None
        case _S.PUBLISHED:
            at = usable_at(version, key.policy)
            if at is None:
                return "it becomes visible once every live worker publishes it", None
            return ("it may be activated" if at <= now else "it may be activated from then on"), at
        case _S.ACTIVE if version.emergency:
            return "it signs until its standby is usable: the second rotation after the emergency", None
        case _S.ACTIVE:
            return "it signs until its scheduled rotation, or until it is revoked", rotation_wanted(version, key.policy)
        case _S.RETIRING:
            return "it leaves the JWKS", retirable_at(version)
        case _S.RETIRED | _S.REVOKED if version.destroy_at is not None:
            return (
                "its private key is destroyed in the module; the destruction can be cancelled until then",
                destructible_at(version),
            )
        case _S.RETIRED | _S.REVOKED:
            return "its private key stays in the module until somebody schedules its destruction", None
        case _:
            return "nothing: the record stays", None
