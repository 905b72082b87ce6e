"""Nodes whose clocks are half a minute off, each way, on one PostgreSQL: the database's time decides on all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jwt
import pytest

from kms_jwks import wiring
from kms_jwks.model import SECOND
from kms_jwks.service import Service
from kms_jwks.worker import clocks
from tests.postgres import Postgres
from tests.service.world import World

SKEWS = (-30, 0, 30)


def half_a_minute_ahead(real: Callable[[], int]) -> int:
    return real() + 30 * SECOND * 1000


@pytest.fixture
def world(tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Every clock that a node could ask for the time of day is wrong by half a minute."""
    made = World(tmp_path, workers=len(SKEWS), url=postgres.url(postgres.create()))
    monkeypatch.setattr("kms_jwks.worker.clocks.time.time_ns", partial(half_a_minute_ahead, time.time_ns))
    yield made.start()
    made.close()


def skewed(world: World, seconds: int) -> Service:
    """A node whose boot clock began at another moment; its wall clock is wrong as well."""
    made = wiring.assemble(
        world.settings,
        store=world.store(),
        backends=world.backends(),
        boot=lambda: clocks.boot_clock() + seconds * SECOND,
    )
    made.sync.poll()
    return made


def test_tokens_and_deadlines_are_the_database_s(world: World, postgres: Postgres) -> None:
    world.create()
    world.standby()
    nodes = [skewed(world, seconds) for seconds in SKEWS]
    with contextlib.ExitStack() as stack:
        for node in nodes:
            stack.callback(node.stop)
            node.sync.poll()
            before = database_time(postgres)
            token = world.sign(worker=node).token
            after = database_time(postgres)
            claims = jwt.decode(token, options={"verify_signature": False})
            assert before - 2 <= claims["iat"] <= after, "late by a poll at most, and never early"
        with world.registry.read() as tx:
            beats = [worker.heartbeat_at for worker in tx.workers()]
            assert max(beats) - min(beats) < 20 * SECOND
            assert max(beats) <= tx.now()


def database_time(postgres: Postgres) -> float:
    with postgres.connect() as connection:
        row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert row is not None
    return float(row[0])
