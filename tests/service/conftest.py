"""A started world for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.world import World
from tests.service.world import world as make_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as made:
        yield made


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path, workers=2) as made:
        yield made


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[World]:
    """A world without a custodian."""
    made = World(tmp_path).start(custodian=False)
    yield made
    made.close()


@pytest.fixture
def short_lease(tmp_path: Path) -> Iterator[World]:
    """A world that waits 2 s for a silent worker."""
    with make_world(tmp_path, lease=2) as made:
        yield made
