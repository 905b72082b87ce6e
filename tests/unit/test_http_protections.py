"""The deadline of a request, and the end of a process whose threads a module holds. No server, no clock of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kms_jwks.http.protections import RequestDeadlines, Verdict, WornOutCheck

if TYPE_CHECKING:
    from kms_jwks.service import Service


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class TestRequestDeadlines:
    def setup_method(self) -> None:
        self.clock = Clock()
        self.stopped: list[str] = []
        self.deadlines = RequestDeadlines(3.0, self.stopped.append, self.clock)

    def test_a_request_that_comes_in_time_is_left_alone(self) -> None:
        self.deadlines.begin(1, "a")
        self.clock.now += 2.9
        self.deadlines.enforce()
        assert self.deadlines.received(1)
        self.clock.now += 60
        self.deadlines.enforce()
        assert not self.stopped, "an answer may take as long as it takes"

    def test_a_request_that_takes_too_long_is_not_read_any_further(self) -> None:
        self.deadlines.begin(1, "a")
        self.clock.now += 2
        self.deadlines.begin(2, "b")
        self.clock.now += 1
        self.deadlines.enforce()
        assert self.stopped == ["a"]
        assert not self.deadlines.received(1), "its connection cannot be used again"
        assert self.deadlines.received(2)

    def test_it_is_stopped_once(self) -> None:
        self.deadlines.begin(1, "a")
        self.clock.now += 3
        self.deadlines.enforce()
        self.deadlines.enforce()
        assert self.stopped == ["a"]

    def test_a_request_that_is_over_is_forgotten(self) -> None:
        self.deadlines.begin(1, "a")
        self.deadlines.forget(1)
        self.deadlines.forget(1)
        self.clock.now += 3
        self.deadlines.enforce()
        assert not self.stopped

    def test_the_next_request_of_a_thread_has_a_deadline_of_its_own(self) -> None:
        self.deadlines.begin(1, "a")
        self.deadlines.received(1)
        self.clock.now += 2
        self.deadlines.begin(1, "b")
        self.clock.now += 2
        self.deadlines.enforce()
        assert not self.stopped
        self.clock.now += 1
        self.deadlines.enforce()
        assert self.stopped == ["b"]


class TestWornOutCheck:
    def setup_method(self) -> None:
        self.lost: frozenset[int] = frozenset()
        self.reason: str | None = None
        self.service = cast(
            "Service",
            SimpleNamespace(backends=SimpleNamespace(lost_threads=lambda: self.lost), worn_out=lambda: self.reason),
        )
        self.check = WornOutCheck(threads=2)

    def verdict(self, *, stopping: bool = False, open_connections: bool = False) -> Verdict:
        return self.check.check(self.service, stopping=stopping, open_connections=open_connections)

    def test_a_healthy_worker_serves(self) -> None:
        self.check.enter(1)
        assert self.verdict() is Verdict.SERVE
        assert self.check.has_threads
        assert not self.check.has_lost_threads

    def test_a_worn_out_worker_stops(self) -> None:
        self.reason = "3 calls have not come back"
        assert self.verdict() is Verdict.STOP

    def test_a_worker_that_stops_is_not_asked_again_whether_it_is_worn_out(self) -> None:
        """Its replacement is counted once."""
        self.service.worn_out = pytest.fail  # type: ignore[method-assign]
        assert self.verdict(stopping=True) is Verdict.STOP

    @pytest.mark.parametrize(
        ("handling", "lost", "open_connections", "verdict"),
        [
            ([1, 2], [1], False, Verdict.STOP),
            ([1], [1], False, Verdict.EXIT),
            ([1, 2], [1, 2], False, Verdict.EXIT),
            ([1], [1], True, Verdict.STOP),
            ([1, 2], [1, 2], True, Verdict.EXIT),
            ([], [], False, Verdict.STOP),
            ([1], [], False, Verdict.STOP),
        ],
        ids=[
            "another request is under way",
            "only the lost thread is left",
            "all threads are lost",
            "a connection may bring a request, and a thread is free for it",
            "a connection may bring a request, and no thread is free",
            "nothing is under way: gunicorn ends it",
            "no thread is lost: gunicorn waits for it",
        ],
    )
    def test_a_worker_that_stops_exits_once_only_lost_threads_are_left(
        self, handling: list[int], lost: list[int], verdict: Verdict, *, open_connections: bool
    ) -> None:
        for thread in handling:
            self.check.enter(thread)
        self.lost = frozenset(lost)
        assert self.verdict(stopping=True, open_connections=open_connections) is verdict

    def test_threads_that_come_back_count_again(self) -> None:
        self.check.enter(1)
        self.check.enter(2)
        self.lost = frozenset({1, 2})
        self.verdict()
        assert not self.check.has_threads
        assert self.check.has_lost_threads
        self.check.leave(1)
        self.lost = frozenset({2})
        self.verdict()
        assert self.check.has_threads
