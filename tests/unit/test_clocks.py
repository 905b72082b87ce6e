"""Database time from polls: late at most by what an answer took, never early, and after a step at once right again."""

from __future__ import annotations

import random

import pytest

from kms_jwks import errors
from kms_jwks.model import SECOND, Instant
from kms_jwks.worker.clocks import DatabaseClock


class Scene:
    """A boot clock and a database's clock that differ by `offset`."""

    def __init__(self, offset: int = 1_000 * SECOND) -> None:
        self.boot = 50 * SECOND
        self.offset = offset
        self.clock = DatabaseClock(lambda: self.boot)

    def poll(self, there: int, back: int) -> None:
        """A poll whose way there and back takes so many microseconds."""
        before = self.boot
        self.boot += there
        answer = Instant(self.boot + self.offset)
        self.boot += back
        self.clock.observe(before, answer)

    @property
    def error(self) -> int:
        """By how much the clock is early; negative: late."""
        return self.clock.now() - (self.boot + self.offset)


@pytest.mark.parametrize(("there", "back"), [(0, 0), (400_000, 0), (0, 400_000), (SECOND, SECOND)])
def test_it_is_never_early_and_late_at_most_by_the_answer_s_way(there: int, back: int) -> None:
    scene = Scene()
    scene.poll(there, back)
    assert -back <= scene.error <= 0


def test_the_fastest_of_the_last_polls_counts() -> None:
    scene = Scene()
    scene.poll(0, 100)
    for _ in range(5):
        scene.poll(random.randrange(SECOND), random.randrange(1000, SECOND))
        assert scene.error == -100
    for _ in range(10):
        scene.poll(0, 2000)
    assert scene.error == -2000, "older ones are forgotten, since clocks drift"


@pytest.mark.parametrize("step", [-3600, -5, 5, 3600])
def test_a_clock_that_was_set_is_followed_at_once(step: int) -> None:
    scene = Scene()
    for _ in range(5):
        scene.poll(500, 500)
    scene.offset += step * SECOND
    scene.poll(500, 500)
    assert -500 <= scene.error <= 0


@pytest.mark.parametrize("step", [-3600, -301, 301, 3600])
def test_by_how_much_a_clock_was_set_shows_until_it_is_set_back(step: int) -> None:
    scene = Scene()
    for _ in range(5):
        scene.poll(500, 500)
        scene.boot += SECOND // 4
    scene.clock.require_agreement(60)
    scene.offset += step * SECOND
    for _ in range(200):
        scene.poll(500, 500)
        scene.boot += SECOND // 4
        assert abs(scene.clock.departure - step * SECOND) < SECOND, "polls do not make a step the rule"
    scene.clock.require_agreement(abs(step) + 1)
    with pytest.raises(errors.ClocksDisagree, match=f"moved by {step / abs(step):+.0f}"[:-1]) as refused:
        scene.clock.require_agreement(abs(step) - 1)
    assert f"{abs(step) - 1} s are allowed" in refused.value.detail
    scene.offset -= step * SECOND
    scene.poll(500, 500)
    scene.clock.require_agreement(60)


@pytest.mark.parametrize("parts_per_million", [-500, 0, 500])
def test_drift_and_slow_answers_are_no_step(parts_per_million: int) -> None:
    scene = Scene()
    for _ in range(2000):
        scene.poll(random.randrange(2 * SECOND), random.randrange(2 * SECOND))
        scene.boot += 60 * SECOND
        scene.offset += 60 * parts_per_million
        scene.clock.require_agreement(3)


def test_a_long_silence_is_no_step() -> None:
    scene = Scene()
    scene.poll(0, 0)
    scene.boot += 7 * 86_400 * SECOND
    scene.offset += 60 * SECOND
    scene.poll(0, 0)
    scene.poll(0, 0)
    scene.clock.require_agreement(60)


def test_before_the_first_poll_it_is_this_machine_s() -> None:
    clock = DatabaseClock()
    assert clock.seconds() > 1_700_000_000
