"""The limit of worker restarts, which holds across restarts and for all workers of a node."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kms_jwks.model import SECOND
from kms_jwks.worker.restart_limit import LONGEST_PAUSE, REMEMBERED, RestartLimit
from tests.children import fresh_processes


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000 * SECOND

    def __call__(self) -> int:
        return self.now


def granted(restart_limit: RestartLimit, clock: Clock, seconds: int) -> list[int]:
    """When a worker that asks every second is replaced."""
    started, found = clock.now, []
    while clock.now < started + seconds * SECOND:
        if restart_limit.permit() == 0.0:
            found.append((clock.now - started) // SECOND)
        clock.now += SECOND
    return found


def test_the_first_round_is_quick_and_each_further_one_slower(tmp_path: Path) -> None:
    clock = Clock()
    times = granted(RestartLimit(tmp_path, 2, clock), clock, 400)
    assert times[:8] == [0, 1, 11, 21, 41, 61, 101, 141]
    assert max(b - a for a, b in itertools.pairwise(times)) <= LONGEST_PAUSE


def test_even_a_module_that_hangs_for_hours_costs_few_workers(tmp_path: Path) -> None:
    clock = Clock()
    times = granted(RestartLimit(tmp_path, 1, clock), clock, 6 * 3600)
    assert len(times) < 6 * 30
    assert any(b - a == LONGEST_PAUSE for a, b in itertools.pairwise(times))


def test_after_an_hour_without_restarts_the_first_round_begins_again(tmp_path: Path) -> None:
    clock = Clock()
    restart_limit = RestartLimit(tmp_path, 1, clock)
    assert granted(restart_limit, clock, 30) == [0, 10]
    assert restart_limit.count() == 2
    clock.now += REMEMBERED * SECOND
    assert restart_limit.count() == 0
    assert granted(restart_limit, clock, 30) == [0, 10]


def test_the_answer_is_the_remaining_wait(tmp_path: Path) -> None:
    clock = Clock()
    restart_limit = RestartLimit(tmp_path, 1, clock)
    assert restart_limit.permit() == 0.0
    clock.now += 4 * SECOND
    assert restart_limit.permit() == 6.0
    assert RestartLimit(tmp_path, 1, clock).permit() == 6.0, "another process sees the same"


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '["x", null]', "[99999999999999999999]"])
def test_an_unreadable_file_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "recycled.json").write_text(text)
    assert RestartLimit(tmp_path, 1, Clock()).permit() == 0.0


def test_after_a_reboot_the_clock_starts_again(tmp_path: Path) -> None:
    clock = Clock()
    assert RestartLimit(tmp_path, 1, clock).permit() == 0.0
    clock.now = 5 * SECOND
    assert RestartLimit(tmp_path, 1, clock).permit() == 0.0


def test_without_a_file_no_worker_is_replaced(tmp_path: Path) -> None:
    restart_limit = RestartLimit(tmp_path / "missing", 1, Clock())
    assert restart_limit.permit() == LONGEST_PAUSE
    assert restart_limit.count() == 0


def _permit(folder: Path) -> float:
    return RestartLimit(folder, 1).permit()


def test_of_many_that_ask_at_once_one_is_replaced(tmp_path: Path) -> None:
    with fresh_processes(4) as processes:
        waits = list(processes.map(_permit, [tmp_path] * 16))
    assert sum(wait == 0.0 for wait in waits) == 1
