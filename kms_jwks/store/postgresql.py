"""How this program talks to PostgreSQL: every wait is bounded, so that lost packets are an error and not a hang.

Three kinds of silence have three bounds. The server itself ends a statement that takes too long (statement_timeout,
lock_timeout). The kernel notices a peer that is gone (keepalives, tcp_user_timeout). Where a middlebox acknowledges
packets that never reach the server, the client gives up (`BoundedConnection`).
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

RV = TypeVar("RV")

DRIVER = "postgresql+psycopg"
_PING_AFTER = 2.0
"""Idle seconds after which a connection is tested before it is used. A worker polls far more often."""
_PING_TIMEOUT = 2.0
_GRACE = 0.5
"""Seconds that the client waits longer than the server: the server's error says more."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose every exchange with the server ends within `timeout` seconds; None sets no limit."""

    timeout: float | None = None

    def wait(self, gen: PQGen[RV], *arguments: Any, **more: Any) -> RV:
        """Run one exchange. If it takes too long, close the connection and raise OperationalError."""
        if self.timeout is None:
            return super().wait(gen, *arguments, **more)
        try:
            return super().wait(_within(gen, self.timeout), *arguments, **more)
        except TimeoutError as error:
            self.close()
            raise psycopg.OperationalError("timeout: the server did not answer in time") from error

    @contextmanager
    def within(self, seconds: float | None) -> Iterator[None]:
        """Another timeout for the block."""
        before, self.timeout = self.timeout, seconds
        try:
            yield
        finally:
            self.timeout = before


def _within(gen: PQGen[RV], seconds: float) -> PQGen[RV]:
    # While nothing arrives psycopg resumes ten times a second with "nothing is ready".
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


def make_engine(url: URL, pool_size: int, timeout: float, application_name: str) -> Engine:
    """An engine in autocommit mode. `timeout` in seconds: for one statement, for a lock, for a new connection.

    The URL's own query wins over these settings.
    """
    engine = create_engine(
        url.set(drivername=DRIVER),
        isolation_level="AUTOCOMMIT",  # a transaction begins with a statement of ours that says its isolation level
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout,
        pool_use_lifo=True,
        use_native_hstore=False,
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: list[Any], asked: dict[str, Any]) -> BoundedConnection:
        made = BoundedConnection.connect(*arguments, **_parameters(asked, timeout, application_name))
        made.timeout = timeout + _GRACE
        return made

    event.listen(engine, "connect", _prepare)
    event.listen(engine, "checkin", _note_idle)
    event.listen(engine, "checkout", _check_idle)
    return engine


def _parameters(asked: dict[str, Any], timeout: float, application_name: str) -> dict[str, Any]:
    """libpq's parameters: those of the URL, and ours for the rest."""
    milliseconds = int(timeout * 1000)
    defaults = {
        "application_name": application_name,
        "connect_timeout": max(2, math.ceil(timeout)),
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
    }
    bounds = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds,
        # A client that vanishes in a transaction holds up the writers of all nodes. They wait longer than this.
        "idle_in_transaction_session_timeout": milliseconds // 2,
    }
    options = [f"-c {name}={value}" for name, value in bounds.items()]
    # Of two values for one setting the last wins.
    return defaults | asked | {"options": " ".join([*options, str(asked.get("options", ""))]).strip()}


def _prepare(connection: BoundedConnection, _: Any) -> None:
    """Make commits durable in this session where the database is configured with synchronous_commit = off."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    connection.commit()


def _note_idle(connection: BoundedConnection | None, record: Any) -> None:
    if connection is not None:
        record.info["idle_since"] = time.monotonic()


def _check_idle(connection: BoundedConnection, record: Any, _: Any) -> None:
    """Replace a connection that was lost while it was idle.

    What the server sent meanwhile, the end of the session above all, can be read without an exchange. An end that has
    not arrived yet shows in the first exchange (`Database._retry_once`).
    """
    since = record.info.get("idle_since")
    if since is None:
        return
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    lost = bool(poll.poll(0))
    if not lost and time.monotonic() - since > _PING_AFTER:
        try:
            with connection.within(_PING_TIMEOUT):
                connection.execute("")
        except psycopg.Error:
            lost = True
    if lost:
        raise InvalidatePoolError("the connection was lost while it was idle")
