"""The bounded pool: every caller is answered by its deadline, and a call that hangs costs no more than its share."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from kms_jwks.backends.pool import CallPool
from kms_jwks.errors import BackendRefused, BackendTimeout, BackendUnavailable


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Hung:
    """Work that does not come back before it is let go."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self) -> str:
        self.entered.release()
        assert self.released.wait(60)
        return "late"


@pytest.fixture
def hung() -> Iterator[Hung]:
    hung = Hung()
    yield hung
    hung.released.set()


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as threads:
        yield threads


def lose(pool: CallPool, work: Callable[[], object], count: int, key: str = "k") -> None:
    """Have so many calls hang; on a busy machine some may not even get so far."""
    while pool.stuck() < count:
        with pytest.raises(BackendTimeout):
            pool.run(key, work, soon(0.05))


def make(places: int = 8, *, stuck_limit: int = 4, share: int = 2, slow: float = 60.0) -> CallPool:
    return CallPool("test", places, stuck_limit=stuck_limit, share=share, slow=slow)


def refuse() -> None:
    raise BackendRefused("no")


def test_what_the_work_returns_or_raises_is_the_callers() -> None:
    pool = make()
    assert pool.run("k", lambda: None, soon()) is None
    assert pool.run("k", threading.current_thread, soon()) is not threading.current_thread()
    with pytest.raises(BackendRefused):
        pool.run("k", refuse, soon())
    with pytest.raises(ZeroDivisionError):
        pool.run("k", lambda: 1 // 0, soon())
    with pytest.raises(SystemExit):
        pool.run("k", sys.exit, soon())
    assert pool.run("k", lambda: "alive", soon()) == "alive", "no thread died of it"
    assert (pool.stuck(), pool.timeouts, pool.refused) == (0, 0, 0)
    assert not pool._keys, "nothing is kept of keys that have nothing under way"


def test_a_caller_is_answered_by_its_deadline_and_the_place_comes_back_with_the_thread(hung: Hung) -> None:
    pool = make(places=1, stuck_limit=1)
    started = time.monotonic()
    with pytest.raises(BackendTimeout):
        pool.run("k", hung, soon(0.2))
    assert 0.2 <= time.monotonic() - started < 10
    lose(pool, hung, 1)
    assert pool.timeouts >= 1
    with pytest.raises(BackendUnavailable) as refused:
        pool.run("other", lambda: "no place", soon())
    assert refused.value.retry_after == 1
    assert pool.refused == 1
    hung.released.set()
    until(lambda: pool.stuck() == 0)
    assert pool.run("other", lambda: "again", soon()) == "again"
    assert not pool._keys


def test_whoever_waits_for_a_place_gets_it_when_it_is_free(hung: Hung, callers: ThreadPoolExecutor) -> None:
    pool = make(places=2, stuck_limit=9)
    for _ in range(2):
        callers.submit(pool.run, "k", hung, soon())
    for _ in range(2):
        assert hung.entered.acquire(timeout=20)
    waiting = callers.submit(pool.run, "other", lambda: "mine", soon())
    with pytest.raises(BackendTimeout, match="all its 2 places"):
        pool.run("third", lambda: "never", soon(0.05))
    assert pool.stuck() == 0, "it held no thread"
    hung.released.set()
    assert waiting.result(20) == "mine"


def test_the_queue_is_bounded(hung: Hung, callers: ThreadPoolExecutor) -> None:
    pool = make(places=2, stuck_limit=9)
    for _ in range(2):
        callers.submit(pool.run, "k", hung, soon())
    until(lambda: pool._idle == 0 and pool._threads == 2)
    queued = [callers.submit(pool.run, f"q{i}", lambda: "done", soon()) for i in range(2)]
    until(lambda: pool._queued == 2)
    with pytest.raises(BackendUnavailable):
        pool.run("one too many", lambda: "never", soon())
    hung.released.set()
    assert [q.result(20) for q in queued] == ["done", "done"]


def test_one_keys_stuck_calls_leave_places_to_others(hung: Hung) -> None:
    pool = make(places=8, stuck_limit=3)
    lose(pool, hung, 3, "bad")
    started = time.monotonic()
    for _ in range(5):
        with pytest.raises(BackendUnavailable):
            pool.run("bad", hung, soon(30))
    assert time.monotonic() - started < 10, "nobody waited for a key that does not come back"
    assert pool.stuck() == 3
    assert [pool.run("good", lambda: "fine", soon()) for _ in range(20)] == ["fine"] * 20


def test_a_key_that_hangs_holds_no_more_than_its_share_of_the_callers(hung: Hung, callers: ThreadPoolExecutor) -> None:
    pool = make(places=32, stuck_limit=32, share=2, slow=0.05)
    waiting = [callers.submit(pool.run, "bad", hung, soon()) for _ in range(2)]
    for _ in range(2):
        assert hung.entered.acquire(timeout=20)
    time.sleep(0.06)
    with pytest.raises(BackendUnavailable):
        pool.run("bad", hung, soon())
    assert pool.run("good", lambda: "fine", soon()) == "fine"
    hung.released.set()
    assert [w.result(20) for w in waiting] == ["late", "late"]
    assert pool.run("bad", lambda: "well again", soon()) == "well again"


def test_a_single_lost_call_does_not_make_its_key_suspect(hung: Hung, callers: ThreadPoolExecutor) -> None:
    pool = make(share=1, slow=0.05)
    lost = callers.submit(pool.run, "key", hung, soon(0.1))
    assert hung.entered.acquire(timeout=20)
    assert pool.run("key", lambda: "works", soon()) == "works"
    with pytest.raises(BackendTimeout):
        lost.result(20)
    gate = threading.Barrier(4)
    together = [callers.submit(pool.run, "key", gate.wait, soon()) for _ in range(4)]
    assert sorted(t.result(20) for t in together) == [0, 1, 2, 3], "four at once, although the share is one"


def test_a_callback_that_raises_costs_no_thread() -> None:
    pool = make(places=1)
    for _ in range(3):
        call = pool.submit("k", lambda: "done", soon())
        call.on_done(lambda: 1 // 0) if not call.ended else None
        call.wait()
        assert call.result() == "done"
    assert pool.run("k", lambda: "alive", soon()) == "alive"


def test_overdue_are_those_that_had_patience_enough(hung: Hung) -> None:
    pool = make()
    lose(pool, hung, 1)
    assert not pool.overdue(time.monotonic(), 1000)
    (call,) = pool.overdue(time.monotonic() + 2000, 1000)
    assert pool.overdue(time.monotonic() + 3000, 1000) == {call}
    hung.released.set()
    until(lambda: not pool.overdue(time.monotonic() + 2000, 1000))


def test_many_callers_over_few_places_lose_nothing(callers: ThreadPoolExecutor) -> None:
    pool = make(places=3, share=40)

    def work(key: int) -> list[tuple[int, int]]:
        return [pool.run(key, partial(divmod, turn, 7), soon(60)) for turn in range(200)]

    results: list[Future[Any]] = [callers.submit(work, number) for number in range(3)]
    assert [r.result(60) for r in results] == [[divmod(j, 7) for j in range(200)]] * 3
    until(lambda: pool._idle == pool._threads)
    assert 1 <= pool._threads <= 3
    assert (pool._queued, pool.stuck(), pool.timeouts, pool.refused, pool._keys) == (0, 0, 0, 0, {})


def test_a_stuck_thread_does_not_hold_up_the_end_of_the_interpreter() -> None:
    program = """
import time
from kms_jwks.errors import BackendTimeout
from kms_jwks.backends.pool import CallPool
pool = CallPool("test", 2, stuck_limit=2, share=2, slow=9.0)
try:
    pool.run("k", lambda: time.sleep(600), time.monotonic() + 0.05)
except BackendTimeout:
    print("answered", pool.stuck(), flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "answered 1\n"
    assert ended.stderr == ""
