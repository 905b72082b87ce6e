"""The life of key versions in time: invariants I1, I2, I4, I5, what is due next, and why. Pure; the clock is injected.

Every function takes what the registry holds and an instant, and reads nothing else. `plan` says what the custodian
does, `forecast` what that comes to, `safety` shows each invariant with both sides, and the service refuses with the
same numbers.
"""

from kms_jwks.timeline.activation import successor
from kms_jwks.timeline.calendar import Window, jitter, later, shown, window
from kms_jwks.timeline.forecast import Event, forecast
from kms_jwks.timeline.invariants import (
    destructible_at,
    kids_after_rotation,
    kids_reserved,
    last_possible_signature,
    lost_by_revocation,
    of_document,
    pinned_until,
    retirable_at,
    room_problem,
    rotation_blocker,
    usable_at,
)
from kms_jwks.timeline.plan import in_emergency, plan
from kms_jwks.timeline.policies import (
    CACHE_LIFETIME,
    FARTHEST,
    HANDOVER,
    MAX_DOCUMENT,
    MAX_KIDS,
    MIN_CLOCK_SKEW,
    MIN_DESTROY_AFTER,
    MIN_PUBLISH_LEAD,
    STALE_MARGIN,
    TELL_DAYS,
    bounds,
    policy_problems,
    policy_warnings,
    publish_lead_floor,
    stale_if_error,
)
from kms_jwks.timeline.retirement import days_until
from kms_jwks.timeline.rotation import rotation_wanted
from kms_jwks.timeline.safety import Check, SafetyReport, safety
from kms_jwks.timeline.steps import Step, StepKind

__all__ = [
    "CACHE_LIFETIME",
    "FARTHEST",
    "HANDOVER",
    "MAX_DOCUMENT",
    "MAX_KIDS",
    "MIN_CLOCK_SKEW",
    "MIN_DESTROY_AFTER",
    "MIN_PUBLISH_LEAD",
    "STALE_MARGIN",
    "TELL_DAYS",
    "Check",
    "Event",
    "SafetyReport",
    "Step",
    "StepKind",
    "Window",
    "bounds",
    "days_until",
    "destructible_at",
    "forecast",
    "in_emergency",
    "jitter",
    "kids_after_rotation",
    "kids_reserved",
    "last_possible_signature",
    "later",
    "lost_by_revocation",
    "of_document",
    "pinned_until",
    "plan",
    "policy_problems",
    "policy_warnings",
    "publish_lead_floor",
    "retirable_at",
    "room_problem",
    "rotation_blocker",
    "rotation_wanted",
    "safety",
    "shown",
    "stale_if_error",
    "successor",
    "usable_at",
    "window",
]
