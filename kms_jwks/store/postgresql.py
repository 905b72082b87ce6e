"""How this program talks to PostgreSQL: every wait is bounded, so that lost packets are an error and not a hang.

Three kinds of silence have three bounds. The server itself ends a statement that takes too long (statement_timeout,
lock_timeout). The kernel notices a peer that is gone (keepalives, tcp_user_timeout). Where a middlebox acknowledges
packets that never reach the server, the client gives up (`BoundedConnection`).
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError

from kms_jwks import errors

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

    sessions = _SessionCheck()

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: list[Any], asked: dict[str, Any]) -> BoundedConnection:
        def make() -> BoundedConnection:
            parameters = _parameters(asked, timeout, application_name)
            made = BoundedConnection.connect(*arguments, autocommit=True, **parameters)
            made.timeout = timeout + _GRACE
            return made

        made = make()
        try:
            sessions.require(made, _prepare(made, timeout, asked), make)
        except BaseException:
            made.close()
            raise
        return made

    event.listen(engine, "invalidate", lambda *_: sessions.forget())
    event.listen(engine, "checkin", _note_idle)
    event.listen(engine, "checkout", _check_idle)
    return engine


def _parameters(asked: dict[str, Any], timeout: float, application_name: str) -> dict[str, Any]:
    """libpq's parameters: those of the URL, and ours for the rest.

    The server's own settings are not among them: poolers refuse startup parameters that they do not know.
    """
    defaults = {
        "application_name": application_name,
        "client_encoding": "UTF8",  # whatever the database's encoding is: psycopg takes that one otherwise
        "connect_timeout": max(2, math.ceil(timeout)),
        "tcp_user_timeout": int(timeout * 1000),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
    }
    return defaults | asked


def _prepare(connection: BoundedConnection, timeout: float, asked: dict[str, Any]) -> int:
    """Set a new session's limits, and make its commits durable. Returns the number of the server's process.

    The URL's `options` win over the limits. Commits are made durable where the database is configured with
    synchronous_commit = off. It is one exchange, within the connection's own timeout.
    """
    milliseconds = int(timeout * 1000)
    bounds = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds,
        # A client that vanishes in a transaction holds up the writers of all nodes. They wait longer than this.
        "idle_in_transaction_session_timeout": milliseconds // 2,
    }
    # A setting that came with the connection has the source "client".
    ours = "(SELECT source FROM pg_settings WHERE name = '{}') <> 'client'" if "options" in asked else "true"
    settings = {"synchronous_commit": ("on", "current_setting('synchronous_commit') = 'off'")}
    settings |= {name: (str(value), ours.format(name)) for name, value in bounds.items()}
    columns = [
        f"CASE WHEN {condition} THEN set_config('{name}', '{value}', false) END"
        for name, (value, condition) in settings.items()
    ]
    row = connection.execute(f"SELECT {', '.join(['pg_backend_pid()', *columns])}").fetchone()
    assert row is not None
    return int(row[0])


class _SessionCheck:
    """Refuses a pooler in transaction mode, where what a session sets applies to other clients' transactions.

    Between transactions such a pooler gives the server's process to any client. In session mode a process belongs to
    one client until it disconnects. A setting that is read back proves nothing: the next transaction often gets the
    same process. So there is a second client. In session mode it never gets the process of the first one, and that of
    the first one never changes. In transaction mode one of the two happens in the first round, unless other clients
    come in between.
    """

    _ROUNDS = 5
    _TIMEOUT = 2.0
    """Seconds that the second client waits for a process. In session mode all may be taken."""

    def __init__(self) -> None:
        self._passed = False

    def forget(self) -> None:
        """Check again: a connection was lost, and the pooler may be another one since."""
        self._passed = False

    def require(self, first: BoundedConnection, process: int, connect: Callable[[], BoundedConnection]) -> None:
        """Raise PoolerUnsuitable if a pooler gives the server's `process` of a new connection to other clients.

        Nothing is asked without a pooler: a server says the number of its process when a connection is made, and a
        pooler says a number of its own.
        """
        if self._passed or process == first.info.backend_pid:
            return
        try:
            second = connect()
        except psycopg.Error:
            return  # the pooler takes no more clients; the check is repeated with the next connection
        try:
            with second.within(self._TIMEOUT):
                for _ in range(self._ROUNDS):
                    second.execute("BEGIN")
                    if _process_of(second) == process or _process_of(first) != process:
                        raise _unsuitable("transaction")
                    second.execute("ROLLBACK")
        except psycopg.OperationalError as error:
            if "statement pooling" in str(error):
                raise _unsuitable("statement") from error
            return  # no process is free for the second client
        finally:
            second.close()
        self._passed = True


def _unsuitable(mode: str) -> errors.PoolerUnsuitable:
    return errors.PoolerUnsuitable(
        f"A pooler in {mode} mode is before the registry's database: it does not keep a session's settings.",
        fields={"cause": "pooler_mode"},
    )


def _process_of(connection: BoundedConnection) -> int:
    """The number of the server's process that answers this connection now."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


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
