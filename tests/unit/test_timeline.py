"""The invariants and the plan, as a specification: instants in seconds after T0."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_jwks import timeline
from kms_jwks.model import DAY, SECOND, ExternalKey, Id, Instant, Key, KeyVersion, Policy, VersionState
from kms_jwks.timeline import StepKind
from tests.unit.builders import T0, at, external, key, key_set, version

S = VersionState
HOUR = 3600


# --- policies


def test_the_defaults_are_sound() -> None:
    assert timeline.policy_problems(Policy(), cache_lifetime=300, lease=10) == []
    assert timeline.policy_warnings(Policy(), cache_lifetime=300) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"publish_lead": 7199}, "publish_lead 7199 is under the floor 7200"),
        ({"rotate_every": DAY + HOUR + 300 + 9}, "rotate_every"),
        ({"max_token_ttl": 0}, "max_token_ttl"),
        ({"clock_skew": 59}, "clock_skew 59 is under 60"),
        ({"handover": 601}, "handover 601"),
        ({"handover": -1}, "handover -1"),
        ({"destroy_after": 7 * DAY - 1}, "destroy_after"),
    ],
)
def test_a_policy_is_refused_with_its_numbers(changes: dict[str, int], says: str) -> None:
    problems = timeline.policy_problems(replace(Policy(), **changes), cache_lifetime=300, lease=10)  # type: ignore[arg-type]
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"publish_lead": 7200},
        {"rotate_every": DAY + HOUR + 300 + 10},
        {"clock_skew": 60},
        {"handover": 600},
        {"handover": 0},
        {"destroy_after": 7 * DAY},
    ],
)
def test_the_limits_themselves_are_allowed(changes: dict[str, int]) -> None:
    assert timeline.policy_problems(replace(Policy(), **changes), cache_lifetime=300, lease=10) == []  # type: ignore[arg-type]


def test_an_unsafe_lead_is_allowed_by_name_and_stays_visible() -> None:
    policy = Policy(publish_lead=5, allow_unsafe_publish_lead=True)
    assert timeline.policy_problems(policy, cache_lifetime=300, lease=10) == []
    assert "unsafe publish_lead" in timeline.policy_warnings(policy, cache_lifetime=300)[0]


def test_the_floor_grows_with_a_long_cache_lifetime() -> None:
    assert timeline.publish_lead_floor(300) == 7200
    assert timeline.publish_lead_floor(7200) == 7260


def test_stale_if_error_stays_within_the_smallest_lead() -> None:
    assert timeline.stale_if_error(3600, cache_lifetime=300, publish_leads=[DAY]) == 3600
    assert timeline.stale_if_error(9000, cache_lifetime=300, publish_leads=[DAY, 7200]) == 6600
    assert timeline.stale_if_error(3600, cache_lifetime=300, publish_leads=[5]) == 0


# --- I1, I2


def test_i1_counts_from_visibility_not_from_publication() -> None:
    hidden = version(2, S.PUBLISHED, published_at=T0)
    assert timeline.usable_at(hidden, Policy()) is None
    seen = replace(hidden, visible_since=at(7))
    assert timeline.usable_at(seen, Policy()) == at(7 + DAY)


def test_the_first_document_skips_the_lead_but_not_visibility() -> None:
    first = version(1, S.PUBLISHED, first_fill=True)
    assert timeline.usable_at(first, Policy()) is None
    assert timeline.usable_at(replace(first, visible_since=at(1)), Policy()) == at(1)


def test_i2_counts_the_recorded_bounds_not_the_policy_of_today() -> None:
    retiring = version(1, S.RETIRING, deactivated_at=at(100))
    assert timeline.last_possible_signature(retiring) == at(100 + 60 + 10)
    assert timeline.retirable_at(retiring) == at(100 + 60 + 10 + 3600 + 300)
    assert timeline.retirable_at(version(1, S.ACTIVE)) is None


def test_a_handover_raised_later_does_not_lengthen_the_pinning() -> None:
    retiring = version(1, S.RETIRING, deactivated_at=at(100))
    assert timeline.pinned_until(retiring, Policy(handover=600)) == at(160)
    assert timeline.pinned_until(retiring, Policy(handover=5)) == at(105)
    assert timeline.pinned_until(version(1, S.ACTIVE), Policy()) is None


@given(handover=st.integers(0, 600), today=st.integers(0, 600), lease=st.integers(1, 60))
def test_no_pinned_call_is_signed_after_the_last_possible_signature(handover: int, today: int, lease: int) -> None:
    base = version(1, S.RETIRING, deactivated_at=T0)
    retiring = replace(base, bounds=replace(base.bounds, handover=handover, lease=lease))
    until, last = timeline.pinned_until(retiring, Policy(handover=today)), timeline.last_possible_signature(retiring)
    assert until is not None
    assert last is not None
    assert until + lease * SECOND <= last


# --- I5


@pytest.mark.parametrize(
    ("keys", "externals", "fits"),
    [(4, 0, True), (5, 0, False), (4, 1, False), (3, 2, True), (0, 10, True), (0, 11, False)],
)
def test_room(keys: int, externals: int, fits: bool) -> None:
    assert (timeline.room_problem(keys, externals) is None) == fits


def test_keys_of_a_set_rotate_one_at_a_time() -> None:
    other = version(1, S.RETIRING, key_id=Id("key-2"), deactivated_at=T0)
    assert timeline.rotation_blocker(Id("key-1"), [other]) is other
    assert timeline.rotation_blocker(Id("key-2"), [other]) is None


# --- the plan


def kinds(
    keys: list[Key], versions: list[KeyVersion], externals: list[ExternalKey], now: Instant = T0
) -> list[tuple[StepKind, int]]:
    """What has a date, in seconds after T0."""
    steps = timeline.plan(key_set(), keys, versions, now, externals)
    return [(step.kind, (step.due - T0) // SECOND) for step in steps if step.due is not None]


def test_an_active_version_gets_a_standby_and_no_second_one() -> None:
    active = version(1, S.ACTIVE, activated_at=T0)
    assert kinds([key()], [active], []) == [(StepKind.CREATE, 0)]
    assert kinds([key()], [active, version(2, S.CREATING, kid=None)], []) == []
    assert kinds([key()], [active, version(2, S.CREATING)], []) == [(StepKind.PUBLISH, 0)]
    assert kinds([key()], [active, version(2, S.PUBLISHED)], []) == []


def test_the_first_document_waits_for_every_pair_that_was_asked_for() -> None:
    made, unmade = version(1, S.CREATING), version(1, S.CREATING, id=Id("v"), key_id=Id("key-2"), kid=None)
    keys = [key(), key(id=Id("key-2"), name="second")]
    assert kinds(keys, [made, unmade], []) == []
    steps = timeline.plan(key_set(), keys, [made, unmade], T0)
    assert "1 of 2 are made" in steps[0].waits_for
    later_one = key_set(first_published_at=T0)
    assert [s.due for s in timeline.plan(later_one, keys, [made, unmade], T0)] == [T0, None]


def test_the_first_version_signs_when_it_is_usable() -> None:
    assert kinds([key()], [version(1, S.PUBLISHED)], []) == []
    assert kinds([key()], [version(1, S.PUBLISHED, visible_since=at(1), first_fill=True)], []) == [
        (StepKind.ACTIVATE, 1)
    ]
    assert kinds([key()], [version(1, S.PUBLISHED, visible_since=at(1))], []) == [(StepKind.ACTIVATE, 1 + DAY)]


def test_after_a_revocation_without_a_standby_one_is_made_and_signs_at_once() -> None:
    gone = version(1, S.REVOKED, activated_at=T0, deactivated_at=at(5), revoked_at=at(5))
    assert kinds([key()], [gone], []) == [(StepKind.CREATE, 0)]
    assert kinds([key()], [gone, version(2, S.CREATING, kid=None)], []) == []
    for seen in (at(9), None):
        young = version(2, S.PUBLISHED, visible_since=seen)
        (step,) = timeline.plan(key_set(), [key()], [gone, young], at(10))
        assert (step.kind, step.due, step.breach) == (StepKind.ACTIVATE, at(10), "I1")


def test_a_version_revoked_after_its_rotation_is_no_emergency() -> None:
    rotated = version(1, S.REVOKED, activated_at=T0, deactivated_at=at(5), revoked_at=at(50))
    steps = timeline.plan(key_set(), [key()], [rotated, version(2, S.PUBLISHED, visible_since=at(9))], at(60))
    assert [s.breach for s in steps] == [None]


def test_a_disabled_key_gets_retirements_and_destructions_only() -> None:
    off = key(disabled_at=T0)
    retiring = version(1, S.RETIRING, deactivated_at=T0)
    doomed = version(2, S.RETIRED, destroy_at=at(50))
    waiting = version(3, S.PUBLISHED, visible_since=T0, first_fill=True)
    assert kinds([off], [retiring, doomed, waiting], []) == [
        (StepKind.TELL, 0),
        (StepKind.DESTROY, 50),
        (StepKind.RETIRE, 60 + 10 + 3600 + 300),
    ]


def test_external_keys_leave_on_their_date() -> None:
    assert kinds([], [], [external(), external(id=Id("x"), removed_at=T0)]) == [(StepKind.REMOVE_EXTERNAL, 3600)]


# --- safety


def test_safety_shows_both_sides() -> None:
    report = timeline.safety(version(2, S.PUBLISHED, visible_since=at(10)), key(), key_set(), at(20))
    (check,) = report.checks
    assert (check.invariant, check.left, check.right, check.holds) == ("I1", at(20), at(10 + DAY), False)
    assert report.next_at == at(10 + DAY)


def test_safety_of_a_retiring_version_names_the_date_of_its_retirement() -> None:
    retiring = version(1, S.RETIRING, visible_since=T0, first_fill=True, activated_at=at(1), deactivated_at=at(100))
    report = timeline.safety(retiring, key(), key_set(), at(200))
    assert [(c.invariant, c.holds) for c in report.checks] == [("I1", True), ("I2", False)]
    assert report.next_at == at(100 + 60 + 10 + 3600 + 300)


def test_every_state_has_words_for_what_comes_next() -> None:
    for state in S:
        deactivated = T0 if state is S.RETIRING else None
        assert timeline.safety(version(1, state, deactivated_at=deactivated), key(), key_set(), T0).next
