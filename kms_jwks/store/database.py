"""Connections to the registry's database and transactions on them. No connection is shared over a fork.

SQLite's locks on a file belong to a process. A child inherits the memory that says the locks are held, but not the
locks. If it went on with the parent's connection, the parent's close would find no other process, delete the
write-ahead log, and what the child commits afterwards would be in a file without a name: commits lost silently.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Row, Select, event, literal_column, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from kms_jwks import errors
from kms_jwks.model import Instant
from kms_jwks.store import sqlite
from kms_jwks.store.error_map import HOW_TO_CREATE, is_session_end, translate_errors, unavailable_file

T = TypeVar("T")

_WAIT_FOR_PROBE = 0.25
"""Seconds that a call waits for another thread's attempt to reach a server that was lost just now."""
_JUST_NOW = 1.0
"""Seconds after a loss in which one lost connection is a likelier cause than an absent server."""

_MIGRATION_LOCK = 0x6B6D736A776B73
"""The key of PostgreSQL's advisory lock under which one program at a time changes the schema."""

_POSTGRESQL_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

_BEGIN = "begin_statement"
"""The execution option that names the statement with which a connection's transactions begin; None sends none."""


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """How a server is connected to. `timeout` in seconds: for one statement, for a lock, for a new connection.

    `pool_size` bounds the connections of one process.
    """

    pool_size: int = 5
    timeout: float = 5.0
    application_name: str = "kms-jwks"


class Database:
    """One database. It opens nothing until it is used; a child process opens connections of its own."""

    def __init__(self, url: str, wall: Callable[[], int] | None, settings: ConnectionSettings | None = None) -> None:
        self._url = _parse_url(url)
        self._settings = settings or ConnectionSettings()
        self._wall = wall or (lambda: time.time_ns() // 1000)
        self._engine: Engine | None = None
        self._opened_file: tuple[int, int] | None = None
        self._in_use = 0
        self._parents_engine: Engine | None = None
        self._unreachable_since: float | None = None
        self._probing = threading.Lock()
        self._write_slots = self._new_write_slots()
        with _fork_lock:
            _databases.add(self)

    @property
    def url_without_password(self) -> str:
        """The URL, its password masked."""
        return self._url.render_as_string(hide_password=True)

    @property
    def is_sqlite(self) -> bool:
        """Whether the registry is a file of this node."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def file(self) -> Path | None:
        """SQLite's file; None for a server."""
        return Path(self._url.database) if self.is_sqlite and self._url.database else None

    def create_file(self) -> None:
        """Create SQLite's file with mode 0600 before the first connection opens it. Raises StoreUnavailable."""
        if self.file is not None:
            try:
                os.close(os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise unavailable_file("The registry's file cannot be made", error) from error

    # --- transactions

    def now(self, connection: Connection) -> Instant:
        """The database's time."""
        if self.is_sqlite:
            return Instant(self._wall())
        return Instant(connection.scalar(text(f"SELECT {_POSTGRESQL_NOW}")))

    @contextmanager
    def begin(self, *, write: bool) -> Iterator[Connection]:
        """A transaction. On SQLite a writer takes the lock at once, so that a transaction never has to be repeated."""
        with (
            translate_errors(),
            self._write_slot() if write and not self.is_sqlite else nullcontext(),
            self._connection(self._begin_statement(write)) as connection,
            self._retry_once(connection, connection.begin),
        ):
            yield connection

    def fetch_first(self, query: Select[*tuple[Any, ...]]) -> tuple[Row[*tuple[Any, ...]], Instant] | None:
        """The first row of an answer and the database's time: one statement, one exchange, no transaction."""
        with translate_errors(), self._connection(None) as connection:
            if self.is_sqlite:
                row = connection.execute(query).first()
                return None if row is None else (row, self.now(connection))
            with_time = query.add_columns(literal_column(_POSTGRESQL_NOW).label("now"))
            row = self._retry_once(connection, lambda: connection.execute(with_time).first())
            return None if row is None else (row, Instant(row.now))

    @contextmanager
    def migrate(self) -> Iterator[Connection]:
        """A transaction that changes the schema, one program at a time.

        Alembic's batch mode rebuilds tables that others refer to, so SQLite checks foreign keys once before the commit
        and not after each statement.
        """
        with translate_errors(), self._connection(self._begin_statement(write=True)) as connection:
            connection.detach()
            if self.is_sqlite:
                sqlite.run(connection.connection.dbapi_connection, "PRAGMA foreign_keys=OFF")
            else:
                # Rewriting a table may take longer than any other statement.
                connection.connection.dbapi_connection.timeout = None  # type: ignore[union-attr]
            with connection.begin():
                if not self.is_sqlite:
                    for bound in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                        connection.execute(text(f"SET LOCAL {bound} = 0"))
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
                yield connection
                if self.is_sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
                    raise errors.InternalError(f"The migration would leave {len(broken)} rows that refer to nothing.")

    def _begin_statement(self, write: bool) -> str:
        if self.is_sqlite:
            return "BEGIN IMMEDIATE" if write else "BEGIN"
        # A writer's statements see what was committed before it got the lock; a reader's all see one moment.
        return f"BEGIN ISOLATION LEVEL {'READ COMMITTED' if write else 'REPEATABLE READ READ ONLY'}"

    def _retry_once(self, connection: Connection, exchange: Callable[[], T]) -> T:
        """The result of a connection's first exchange with the server.

        The server may end a session while its connection is idle in the pool, and the end may not have arrived when the
        connection is taken. The exchange then fails before anything was done in that session, so it is repeated once
        with a new connection.
        """
        try:
            return exchange()
        except DBAPIError as error:
            if not is_session_end(error):
                raise
        connection.rollback()  # SQLAlchemy reconnects only after the failed transaction is over
        try:
            return exchange()
        except DBAPIError:
            self._note_loss()
            raise

    # --- connections

    def dispose(self) -> None:
        """Close this process's connections."""
        with _fork_lock:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def before_fork(self) -> None:
        """Close the connections, unless one is in use, so that a child inherits none. Called with the fork lock."""
        if not self._in_use:
            self.dispose()

    def in_child(self) -> None:
        """Neither close nor collect connections that another thread of the parent was using."""
        self._probing, self._write_slots = threading.Lock(), self._new_write_slots()
        if self._in_use:
            self._parents_engine, self._engine, self._in_use = self._engine, None, 0

    @contextmanager
    def _connection(self, begin_statement: str | None) -> Iterator[Connection]:
        with _fork_lock:
            engine = self._current_engine()
            self._in_use += 1
        try:
            with self._connect(engine) as connection:
                yield connection.execution_options(**{_BEGIN: begin_statement})
        except DBAPIError as error:
            if error.connection_invalidated:
                self._note_loss()
            raise
        finally:
            with _fork_lock:
                self._in_use -= 1

    def _connect(self, engine: Engine) -> Connection:
        """A connection.

        While a server is unreachable one thread at a time tries to reach it, and the other calls fail at once: threads
        that serve the JWKS from memory must not be kept waiting by calls that need the registry.
        """
        since = self._unreachable_since
        if since is None or self.is_sqlite:
            try:
                return engine.connect()
            except (DBAPIError, errors.StoreUnavailable):
                self._note_loss()
                raise
        wait = _WAIT_FOR_PROBE if time.monotonic() - since < _JUST_NOW else 0.0
        if not self._probing.acquire(timeout=wait):
            raise errors.StoreUnavailable(
                "The registry's database cannot be reached: another call is trying to.",
                retry_after=1,
                fields={"cause": "lost"},
            )
        try:
            connection = engine.connect()
            self._unreachable_since = None
            return connection
        finally:
            self._probing.release()

    def _new_write_slots(self) -> threading.Semaphore:
        return threading.Semaphore(max(1, min(2, self._settings.pool_size - 1)))

    @contextmanager
    def _write_slot(self) -> Iterator[None]:
        """A server's writers queue for one row. Here they queue before they hold a connection: the poll needs one."""
        if not self._write_slots.acquire(timeout=self._settings.timeout):
            raise errors.StoreUnavailable(
                "Too many changes wait for the registry's database.", retry_after=1, fields={"cause": "writers_busy"}
            )
        try:
            yield
        finally:
            self._write_slots.release()

    def _note_loss(self) -> None:
        if self._unreachable_since is None:
            self._unreachable_since = time.monotonic()

    def _current_engine(self) -> Engine:
        """The engine, for the file that has the name now. A missing file is not created."""
        if self.file is not None:
            if self._parents_engine is not None:
                raise errors.InternalError("This process was forked while its parent was using the registry.")
            try:
                status = self.file.stat()
            except OSError as error:
                self.dispose()
                raise errors.StoreUnavailable(
                    f"The registry's file is not there: {error.strerror}.",
                    retry_after=1,
                    next_step=f"{HOW_TO_CREATE} If there was one, bring it back.",
                    fields={"cause": "no_file"},
                ) from error
            if self._opened_file != (status.st_dev, status.st_ino):
                # Another file has the name now. A connection to the old one would never see a change again.
                self.dispose()
                self._opened_file = (status.st_dev, status.st_ino)
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    def _make_engine(self) -> Engine:
        if self.is_sqlite:
            engine = sqlite.make_engine(self._url)
        else:
            try:
                from kms_jwks.store import postgresql
            except ImportError as error:
                raise errors.ConfigurationError(
                    f"database_url: PostgreSQL needs a package that is not usable here: {error}.",
                    next_step="Install kms-jwks with its extra: pip install 'kms-jwks[postgres]'.",
                ) from error
            settings = self._settings
            engine = postgresql.make_engine(self._url, settings.pool_size, settings.timeout, settings.application_name)
        event.listen(engine, "begin", _send_begin)
        return engine


def _parse_url(url: str) -> URL:
    """Raises ConfigurationError, which repeats nothing of the URL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise errors.ConfigurationError("database_url: not a URL of the form postgresql://… or sqlite:///….") from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql", "postgres"):
        raise errors.ConfigurationError("database_url: the registry is kept in PostgreSQL or SQLite, nowhere else.")
    return parsed


def _send_begin(connection: Connection) -> None:
    """Both drivers are in autocommit mode, so a transaction begins with a statement of ours: the first exchange."""
    statement = connection.get_execution_options().get(_BEGIN)
    if statement is not None:
        connection.exec_driver_sql(statement)


# --- forks ------------------------------------------------------------------------------------------------------------

_fork_lock = threading.RLock()
"""Held during a fork, and for the moment in which a connection is taken or given back."""
_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _before_fork() -> None:
    _fork_lock.acquire()
    for database in _databases:
        database.before_fork()


def _in_child() -> None:
    for database in _databases:
        database.in_child()
    _fork_lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_fork_lock.release, after_in_child=_in_child)
