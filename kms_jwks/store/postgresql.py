"""How this program talks to PostgreSQL: every wait is bounded, so that packets that vanish are an error and not a hang.

Three kinds of silence, three bounds: a server that works too long ends the statement itself (statement_timeout,
lock_timeout); a peer that is gone is the kernel's to notice (keepalives, tcp_user_timeout); and where something in
between still acknowledges what nobody reads, the client gives up (`Bounded`).
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError

from kms_jwks.store.engine import Connecting

RV = TypeVar("RV")

DRIVER = "postgresql+psycopg"
_PING_AFTER = 2.0
"""Seconds of rest after which a connection is asked whether it still is one. A worker's poll comes far more often."""
_PING_PATIENCE = 2.0
_GRACE = 0.5
"""Seconds that the client waits longer than the server, whose error says more."""


class Bounded(psycopg.Connection[Any]):
    """A connection whose every exchange with the server ends within `patience` seconds; None waits for ever."""

    patience: float | None = None

    def wait(self, gen: PQGen[RV], *arguments: Any, **more: Any) -> RV:
        """Run one exchange. Raises OperationalError, and the connection is closed, when it takes too long."""
        if self.patience is None:
            return super().wait(gen, *arguments, **more)
        try:
            return super().wait(_within(gen, self.patience), *arguments, **more)
        except TimeoutError as error:
            self.close()
            raise psycopg.OperationalError("timeout: the server did not answer in time") from error

    @contextmanager
    def patient(self, seconds: float | None) -> Iterator[None]:
        """Another patience for the block."""
        before, self.patience = self.patience, seconds
        try:
            yield
        finally:
            self.patience = before


def _within(gen: PQGen[RV], seconds: float) -> PQGen[RV]:
    # psycopg looks in ten times a second while nothing comes, with "nothing is ready".
    end = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > end:
                raise TimeoutError
            wanted = gen.send(ready)
    except StopIteration as done:
        result: RV = done.value
        return result
    finally:
        if isinstance(gen, Generator):
            gen.close()


def make_engine(url: URL, connecting: Connecting) -> Engine:
    """An engine that connects as `connecting` says, for what the URL's own query leaves open."""
    engine = create_engine(
        url.set(drivername=DRIVER),
        # A writer's statements see what was committed before it got the lock; a reader's all see one moment.
        isolation_level="READ COMMITTED",
        pool_size=connecting.pool_size,
        max_overflow=0,
        pool_timeout=connecting.timeout,
        pool_use_lifo=True,
        use_native_hstore=False,
    )
    patience = connecting.timeout + _GRACE

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: list[Any], parameters: dict[str, Any]) -> Bounded:
        made = Bounded.connect(*arguments, **_parameters(parameters, connecting))
        made.patience = patience
        return made

    event.listen(engine, "connect", _prepare)
    event.listen(engine, "checkin", _note_rest)
    event.listen(engine, "checkout", _look_again)
    return engine


def _parameters(asked: dict[str, Any], connecting: Connecting) -> dict[str, Any]:
    """libpq's parameters: what the URL asks for, and ours for the rest."""
    milliseconds = int(connecting.timeout * 1000)
    defaults = {
        "application_name": connecting.application_name,
        "connect_timeout": max(2, math.ceil(connecting.timeout)),
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
    }
    bounds = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds,
        # Who vanishes in the midst of a transaction holds up the writers of all nodes; they wait longer than that.
        "idle_in_transaction_session_timeout": milliseconds // 2,
    }
    options = [f"-c {name}={value}" for name, value in bounds.items()]
    # Of two values for one setting the last wins.
    return defaults | asked | {"options": " ".join([*options, str(asked.get("options", ""))]).strip()}


def _prepare(connection: Bounded, _: Any) -> None:
    """What was answered stays answered: a database that was told to be careless is told otherwise, ours alone."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    connection.commit()


def _note_rest(connection: Bounded | None, record: Any) -> None:
    if connection is not None:
        record.info["resting_since"] = time.monotonic()


def _look_again(connection: Bounded, record: Any, _: Any) -> None:
    """Before a connection is used again. What can be seen without asking costs nothing: the server's goodbye."""
    since = record.info.get("resting_since")
    if since is None:
        return
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    gone = bool(poll.poll(0))
    if not gone and time.monotonic() - since > _PING_AFTER:
        try:
            with connection.patient(_PING_PATIENCE):
                connection.autocommit = True
                connection.execute("")
                connection.autocommit = False
        except psycopg.Error:
            gone = True
    if gone:
        raise InvalidatePoolError("the connection was lost while it rested")
