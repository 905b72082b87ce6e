"""Rotation by schedule, as a specification: when, in which order, in which words. Seconds after T0, Friday 08:00."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_jwks import timeline
from kms_jwks.model import (
    DAY,
    SECOND,
    Bounds,
    ExternalKey,
    Id,
    Instant,
    Key,
    KeySet,
    KeyVersion,
    Policy,
    VersionState,
)
from kms_jwks.timeline import Step, StepKind
from tests.unit.builders import T0, at, external, key, key_set, version

S = VersionState
HOUR = 3600
RETIRE = 60 + 10 + 3600 + 300
"""Seconds from a deactivation to the retirement, at the defaults."""
EXACT = {"rotate_jitter": 0}
PUBLISHED = key_set(first_published_at=T0, first_activated_at=T0)


def a_key(name: str = "default", *, id: str = "key-1", disabled_at: Instant | None = None, **policy: Any) -> Key:  # noqa: A002
    return key(id=Id(id), name=name, policy=Policy(**(EXACT | policy)), disabled_at=disabled_at)


def signing(key_id: str = "key-1", *, standby_seen: Instant | None = T0, **active: Any) -> list[KeyVersion]:
    """A version that signs since T0, and its standby."""
    first = {"id": Id(f"{key_id}-1"), "activated_at": T0, "visible_since": T0, "first_fill": True} | active
    return [
        version(1, S.ACTIVE, key_id=Id(key_id), **first),
        version(2, S.PUBLISHED, id=Id(f"{key_id}-2"), key_id=Id(key_id), published_at=T0, visible_since=standby_seen),
    ]


def activation(
    keys: list[Key],
    versions: list[KeyVersion],
    now: Instant = T0,
    *,
    owner: KeySet = PUBLISHED,
    externals: list[ExternalKey] | None = None,
    subject: str | None = None,
) -> Step:
    """The one activation in the plan, or that of `subject`."""
    steps = timeline.plan(owner, keys, versions, now, externals or [])
    found = [s for s in steps if s.kind is StepKind.ACTIVATE and subject in (None, s.subject)]
    (step,) = found
    return step


# --- the schedule


def test_the_standby_takes_over_when_the_version_has_signed_for_long_enough() -> None:
    step = activation([a_key()], signing())
    assert (step.due, step.subject, step.waits_for, step.breach) == (at(90 * DAY), "key-1-2", "", None)
    assert "rotate_every 7776000 s less its jitter of 0 s ends at 2027-04-15T08:00:00Z" in step.reason


@given(number=st.uuids(), wanted=st.integers(0, 10 * DAY), every=st.integers(2 * DAY, 400 * DAY))
def test_jitter_is_fixed_per_version_early_and_at_most_a_tenth(number: object, wanted: int, every: int) -> None:
    policy = Policy(rotate_jitter=wanted, rotate_every=every)
    early = timeline.jitter(version(1, S.ACTIVE, id=Id(str(number))), policy)
    assert 0 <= early <= min(wanted, every // 10)
    assert early == timeline.jitter(version(9, S.RETIRED, id=Id(str(number))), policy)
    found = activation([key(policy=policy)], signing(id=Id(str(number))))
    assert found.due == max(at(every - early), at(DAY))


def test_jitter_spreads_versions_over_its_whole_width() -> None:
    found = [timeline.jitter(version(n, S.ACTIVE), Policy(rotate_jitter=99)) for n in range(500)]
    assert len(set(found)) > 60
    assert min(found) < 10 and max(found) > 90


@pytest.mark.parametrize("every", [30, 5, 2], ids=["shortened", "to the very day", "below what has passed"])
def test_a_changed_rotate_every_counts_from_the_activation(every: int) -> None:
    step = activation([a_key(rotate_every=every * DAY)], signing(), now=at(5 * DAY))
    assert step.due == at(every * DAY)
    assert step.is_due(at(5 * DAY)) == (every <= 5)


def test_what_is_overdue_by_much_happens_at_once() -> None:
    assert activation([a_key()], signing(), now=at(400 * DAY)).is_due(at(400 * DAY))


def test_a_rotation_waits_for_a_standby_that_is_too_young_and_says_so() -> None:
    step = activation([a_key()], signing(standby_seen=at(90 * DAY - HOUR)), now=at(90 * DAY))
    assert (step.due, step.since) == (at(91 * DAY - HOUR), at(90 * DAY))
    assert "may sign 86400 s later (publish_lead), at 2027-04-16T07:00:00Z (I1)" in step.waits_for


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        (signing(standby_seen=None), "not every live worker publishes version 2 yet"),
        (signing()[:1], "its standby is not published yet"),
    ],
)
def test_a_rotation_without_a_usable_standby_has_no_date(versions: list[KeyVersion], says: str) -> None:
    step = activation([a_key()], versions, now=at(100 * DAY))
    assert (step.due, step.waits_for, step.since) == (None, says, at(90 * DAY))


def test_a_raised_publish_lead_counts_for_the_standby_that_waits() -> None:
    assert activation([a_key(publish_lead=100 * DAY, rotate_every=200 * DAY)], signing()).due == at(200 * DAY)
    slow = a_key(publish_lead=95 * DAY)
    assert activation([slow], signing()).due == at(95 * DAY)


def test_a_disabled_key_is_not_rotated() -> None:
    off = a_key(disabled_at=T0)
    assert timeline.plan(PUBLISHED, [off], signing(), at(100 * DAY)) == []


# --- hold_until and rotate_window


def test_hold_until_puts_planned_activations_off() -> None:
    held = a_key(hold_until=at(120 * DAY))
    step = activation([held], signing(), now=at(100 * DAY))
    assert (step.due, step.waits_for) == (at(120 * DAY), "hold_until 2027-05-15T08:00:00Z")
    first = version(1, S.PUBLISHED, visible_since=T0, first_fill=True)
    assert activation([held], [first]).due == at(120 * DAY)
    assert activation([a_key(hold_until=at(80 * DAY))], signing()).due == at(90 * DAY)


@pytest.mark.parametrize(
    ("text", "when", "opens"),
    [
        # T0 is Friday 2027-01-15, 08:00 UTC.
        ("", 0, 0),
        ("fri 08:00-09:00", 0, 0),
        ("fri 08:00-09:00", HOUR, 7 * DAY),
        ("fri 07:00-08:00", 0, 7 * DAY - HOUR),
        ("fri 07:00-08:00", -1, -1),
        ("mon-thu 09:00-16:00", 0, 3 * DAY + HOUR),
        ("mon-thu 09:00-16:00", 3 * DAY + 8 * HOUR, 4 * DAY + HOUR),
        ("sat,sun 22:00-04:00", 0, DAY + 14 * HOUR),
        ("sat,sun 22:00-04:00", 2 * DAY + 19 * HOUR, 2 * DAY + 19 * HOUR),  # Monday 03:00, from Sunday
        ("sat,sun 22:00-04:00", 2 * DAY + 20 * HOUR, 8 * DAY + 14 * HOUR),
        ("SUN-Mon 00:00-24:00", 0, DAY + 16 * HOUR),
        ("10:00-11:00", 0, 2 * HOUR),
        ("10:00-11:00", 3 * HOUR, DAY + 2 * HOUR),
        ("mon 09:00-10:00; fri 12:00-13:00", 0, 4 * HOUR),
        ("sun-sat 00:00-24:00", 5, 5),
    ],
)
def test_a_window_opens(text: str, when: int, opens: int) -> None:
    assert timeline.window(text).opens(at(when)) == at(opens)


@given(
    st.integers(0, 4 * 7 * DAY), st.sampled_from(["mon-thu 09:00-16:00", "sat,sun 22:00-04:00", "fri-mon 23:59-24:00"])
)
def test_a_window_opens_within_a_week_and_is_open_then(when: int, text: str) -> None:
    found = timeline.window(text).opens(at(when))
    assert at(when) <= found < at(when + 7 * DAY)
    assert timeline.window(text).opens(found) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("weekdays 09:00-16:00", "'weekdays' is none of mon, tue, wed"),
        ("mon 9:00-16:00", "is not DAYS HH:MM-HH:MM"),
        ("mon", "is not DAYS HH:MM-HH:MM"),
        ("mon 09:00-16:00,", "is not DAYS HH:MM-HH:MM"),
        ("mon 09:00-16:60", "16:60 is no time of day"),
        ("mon 09:00-24:01", "24:01 is no time of day"),
        ("mon 09:00-09:00", "has no hours"),
        ("mon 24:00-09:00", "has no hours"),
        ("mon-tue-wed 09:00-10:00", "'tue-wed' is none of"),
        ("mon 09:00-10:00;", "'' is not DAYS"),
        ("mon  09:00-10:00", "is not DAYS"),
    ],
)
def test_a_window_that_says_nothing_is_refused_in_words(text: str, says: str) -> None:
    (problem,) = timeline.policy_problems(Policy(rotate_window=text), cache_lifetime=300, lease=10)
    assert problem.startswith("rotate_window: ")
    assert says in problem


def test_the_window_applies_to_rotation_retirement_and_destruction() -> None:
    quiet = a_key(rotate_window="mon 09:00-10:00")
    monday = 3 * DAY + HOUR
    step = activation([quiet], signing(), now=at(90 * DAY))  # a Thursday
    assert step.due == at(monday + 13 * 7 * DAY)
    assert step.waits_for == "rotate_window 'mon 09:00-10:00' opens at 2027-04-19T09:00:00Z"
    retiring = version(1, S.RETIRING, deactivated_at=T0)
    doomed = version(2, S.RETIRED, destroy_at=at(5), destroy_told=at(5))
    assert [(s.kind, s.due) for s in timeline.plan(PUBLISHED, [quiet], [retiring, doomed], at(HOUR))] == [
        (StepKind.RETIRE, at(monday)),
        (StepKind.DESTROY, at(monday)),
    ]


def test_neither_window_nor_hold_delays_a_standby_or_the_first_document() -> None:
    quiet = a_key(rotate_window="mon 09:00-10:00", hold_until=at(400 * DAY))
    (create, _) = timeline.plan(PUBLISHED, [quiet], signing()[:1], T0)
    assert (create.kind, create.due) == (StepKind.CREATE, T0)
    ready = version(2, S.CREATING)
    assert timeline.plan(PUBLISHED, [quiet], [signing()[0], ready], T0)[0].is_due(T0)
    first = version(1, S.PUBLISHED, visible_since=at(1), first_fill=True)
    assert activation([a_key(rotate_window="mon 09:00-10:00")], [first]).due == at(1)


# --- one key of a set at a time (I5)


def test_two_keys_due_at_once_go_one_after_the_other() -> None:
    keys = [a_key("b", id="key-1"), a_key("a", id="key-2")]
    versions = [*signing("key-1"), *signing("key-2")]
    now = at(90 * DAY)
    first, second = (activation(keys, versions, now, subject=f"key-{n}-2") for n in (1, 2))
    assert (first.due, first.waits_for) == (now, "")
    assert (second.due, second.since) == (at(90 * DAY + RETIRE), at(90 * DAY))
    assert second.waits_for == "key 'b' of the set rotates first, at 2027-04-15T08:00:00Z (I5)"
    assert [s.due for s in timeline.plan(PUBLISHED, keys[::-1], versions[::-1], now)] == [first.due, second.due]


def test_the_longest_overdue_goes_first_and_one_that_has_to_wait_delays_no_other() -> None:
    keys = [a_key(id="key-1"), a_key(id="key-2")]
    now = at(100 * DAY)
    versions = [*signing("key-1", activated_at=at(DAY)), *signing("key-2")]
    assert activation(keys, versions, now, subject="key-2-2").is_due(now)
    stuck = [*signing("key-1", activated_at=at(DAY)), *signing("key-2", standby_seen=None)]
    assert activation(keys, stuck, now, subject="key-1-2").is_due(now)
    assert activation(keys, stuck, now, subject="key-2-2").due is None


def test_a_rotation_waits_until_another_keys_retiring_version_has_left() -> None:
    keys = [a_key(id="key-1"), a_key("other", id="key-2")]
    retiring = version(7, S.RETIRING, id=Id("r"), key_id=Id("key-2"), deactivated_at=at(90 * DAY))
    step = activation(keys, [*signing(), retiring], at(90 * DAY))
    assert step.due == at(90 * DAY + RETIRE)
    assert "version 7 of key 'other' is retiring, keys of a set rotate one at a time (I5)" in step.waits_for
    own = replace(retiring, key_id=Id("key-1"))
    assert activation(keys[:1], [*signing(), own], at(90 * DAY)).due == at(90 * DAY)


def test_a_rotation_waits_for_room_in_the_document() -> None:
    full = [external(id=Id(f"e{n}"), kid=f"e{n}", remove_at=at(900 * DAY)) for n in range(8)]
    step = activation([a_key()], signing(), at(90 * DAY), externals=full)
    assert (step.due, step.waits_for) == (None, "11 kids of 10 (I5)")
    retiring = version(7, S.RETIRING, id=Id("r"), deactivated_at=at(90 * DAY))
    step = activation([a_key()], [*signing(), retiring], at(90 * DAY), externals=full[:7])
    assert step.due == at(90 * DAY + RETIRE)


# --- emergencies


def test_the_second_rotation_comes_as_soon_as_its_standby_is_usable() -> None:
    busy = a_key(rotate_window="mon 09:00-10:00", hold_until=at(400 * DAY))
    step = activation([busy], signing(emergency=True, standby_seen=at(5)), now=at(5))
    assert step.due == at(5 + DAY)
    assert "version 1 took over from a revoked one" in step.reason


def test_emergencies_go_first_and_retirements_then_ignore_the_window() -> None:
    keys = [a_key(id="key-1", rotate_window="mon 09:00-10:00"), a_key(id="key-2")]
    versions = [*signing("key-1", emergency=True), *signing("key-2")]
    now = at(100 * DAY)
    assert activation(keys, versions, now, subject="key-1-2").is_due(now)
    assert not activation(keys, versions, now, subject="key-2-2").is_due(now)
    retiring = version(9, S.RETIRING, id=Id("r"), deactivated_at=now)
    steps = timeline.plan(PUBLISHED, keys, [*versions, retiring], now)
    assert next(s for s in steps if s.kind is StepKind.RETIRE).due == at(100 * DAY + RETIRE)


def test_the_standby_of_a_revoked_version_ignores_window_and_hold() -> None:
    busy = a_key(rotate_window="mon 09:00-10:00", hold_until=at(400 * DAY))
    gone = version(1, S.REVOKED, activated_at=T0, deactivated_at=at(9), revoked_at=at(9))
    for seen in (None, at(8)):
        step = activation([busy], [gone, version(2, S.PUBLISHED, visible_since=seen)], now=at(10))
        assert (step.due, step.breach) == (at(10), "I1")
    old = version(2, S.PUBLISHED, visible_since=at(10 - DAY))
    assert activation([busy], [gone, old], now=at(10)).breach is None


def test_a_module_that_declined_for_good_is_asked_again_after_an_hour() -> None:
    declined = version(2, S.DESTROYED, kid=None, destroyed_at=at(50))
    create = timeline.plan(PUBLISHED, [a_key()], [signing()[0], declined], at(60))[0]
    assert (create.kind, create.due) == (StepKind.CREATE, at(50 + HOUR))
    assert "declined at" in create.waits_for


# --- destruction


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"destroy_at": at(20 * DAY)}, [(StepKind.TELL, 0), (StepKind.DESTROY, 20 * DAY)]),
        ({"destroy_at": at(50 * DAY)}, [(StepKind.TELL, 20 * DAY), (StepKind.DESTROY, 50 * DAY)]),
        ({"destroy_at": at(20 * DAY), "destroy_told": at(20 * DAY)}, [(StepKind.DESTROY, 20 * DAY)]),
        (
            {"destroy_at": at(25 * DAY), "destroy_told": at(20 * DAY)},
            [(StepKind.TELL, 0), (StepKind.DESTROY, 25 * DAY)],
        ),
        ({"destroy_told": at(20 * DAY)}, [(StepKind.TELL, 0)]),
        ({}, []),
        ({"destroy_at": at(-5)}, [(StepKind.DESTROY, -5)]),
    ],
    ids=["told at once", "told 30 days ahead", "told already", "another date", "taken back", "no date", "overdue"],
)
def test_a_module_is_told_a_destruction_and_then_destroys(
    changes: dict[str, Any], steps: list[tuple[StepKind, int]]
) -> None:
    leaving = version(1, S.RETIRED, retired_at=T0, **changes)
    found = timeline.plan(PUBLISHED, [a_key()], [leaving], T0)
    assert [(s.kind, s.due) for s in found] == [(kind, at(due)) for kind, due in steps]


def test_a_revoked_version_is_not_destroyed_while_its_tokens_can_be_alive() -> None:
    long = Bounds(40 * DAY, 300, 60, 10, 300)
    gone = version(1, S.REVOKED, deactivated_at=T0, revoked_at=T0, bounds=long, destroy_at=at(30 * DAY))
    destroy = timeline.plan(PUBLISHED, [a_key()], [gone], at(31 * DAY))[-1]
    assert (destroy.kind, destroy.due) == (StepKind.DESTROY, at(40 * DAY + 370))
    assert "(I2)" in destroy.waits_for


@pytest.mark.parametrize(
    ("seconds", "days"), [(0, 7), (7 * DAY, 7), (7 * DAY + 1, 8), (29 * DAY + 1, 30), (30 * DAY, 30), (99 * DAY, 30)]
)
def test_the_days_a_module_is_told_never_end_before_the_date(seconds: int, days: int) -> None:
    assert timeline.days_until(at(seconds), T0) == days


# --- the forecast


def test_a_forecast_draws_what_was_and_what_comes() -> None:
    events = timeline.forecast(PUBLISHED, [a_key()], signing(), at(DAY), a_key(), at(100 * DAY))
    assert [(e.kind, e.number, (e.at - T0) / SECOND) for e in events if not e.past] == [
        ("activate", 2, 90 * DAY),
        ("create", 3, 90 * DAY),
        ("withdraw", 1, 90 * DAY + RETIRE),
        ("tell", 1, 90 * DAY + RETIRE),
    ]
    assert [(e.kind, e.number) for e in events if e.past and e.number == 1] == [
        ("created", 1),
        ("visible", 1),
        ("activated", 1),
    ]
    assert events == sorted(events, key=lambda e: e.at)


def test_a_forecast_keeps_the_schedule_over_years_and_simulates_the_other_keys_too() -> None:
    keys = [a_key("a", id="key-1", rotate_every=30 * DAY), a_key("b", id="key-2", rotate_every=30 * DAY)]
    versions = [*signing("key-1"), *signing("key-2")]
    found = {
        k.name: [
            e.at for e in timeline.forecast(PUBLISHED, keys, versions, T0, k, at(365 * DAY)) if e.kind == "activate"
        ]
        for k in keys
    }
    assert found["a"] == [at(n * 30 * DAY) for n in range(1, 13)]
    assert len(found["b"]) == 12
    assert found["b"][0] == at(30 * DAY + RETIRE)


def test_a_forecast_assumes_that_modules_and_workers_answer() -> None:
    waiting = version(1, S.CREATING, kid=None)
    events = timeline.forecast(key_set(), [a_key()], [waiting], T0, a_key(), at(2 * DAY))
    assert [(e.kind, e.number) for e in events if not e.past] == [("activate", 1), ("create", 2)]


def test_a_forecast_over_decades_ends() -> None:
    hasty = a_key(rotate_every=DAY, publish_lead=1, allow_unsafe_publish_lead=True, destroy_after=7 * DAY)
    events = timeline.forecast(PUBLISHED, [hasty], signing(), T0, hasty, at(30 * 365 * DAY))
    assert len(events) < 2500
