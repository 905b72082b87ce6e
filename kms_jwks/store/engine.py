"""Connections to SQLite (WAL, synchronous=FULL) or PostgreSQL, never shared over a fork; transactions on them."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Row, Select, create_engine, event, literal_column, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from kms_jwks import errors
from kms_jwks.model import Instant
from kms_jwks.store.failures import HOW_TO_MAKE_ONE, translated
from kms_jwks.store.forks import GATE, tell

BUSY_TIMEOUT = 5.0
"""Seconds a writer waits for another one, and anybody for a connection."""

_PATIENCE_WITH_A_TRY = 0.25
"""Seconds that a caller waits for another one's attempt to reach a server that went away just now."""
_JUST_NOW = 1.0
"""Seconds for which an absence is likely to be one lost connection and nothing more."""

_MIGRATION_LOCK = 0x6B6D736A776B73
"""PostgreSQL's advisory lock under which one program at a time changes the schema."""

_POSTGRESQL_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


@dataclass(frozen=True, slots=True)
class Connecting:
    """How a server is connected to. `timeout` in seconds: for one statement, for a lock, for a new connection.

    `pool_size` bounds the connections of one process.
    """

    pool_size: int = 5
    timeout: float = 5.0
    application_name: str = "kms-jwks"


class Database:
    """One database. Opens nothing until it is used, and nothing of a parent's in a child."""

    def __init__(self, url: str, wall: Callable[[], int] | None, connecting: Connecting | None = None) -> None:
        self._url = _understood(url)
        self._connecting = connecting or Connecting()
        self._wall = wall or (lambda: time.time_ns() // 1000)
        self._engine: Engine | None = None
        self._opened: tuple[int, int] | None = None
        self._in_use = 0
        self._parents: Engine | None = None
        self._away_since: float | None = None
        self._trying = threading.Lock()
        self._turns = self._new_turns()
        tell(self)

    @property
    def shown_url(self) -> str:
        """The URL without a password."""
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
        """Make SQLite's file with mode 0600 before anybody opens it."""
        if self.file is not None:
            try:
                os.close(os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise errors.StoreUnavailable(f"The registry's file cannot be made: {error.strerror}.") from error

    # --- transactions

    def now(self, connection: Connection) -> Instant:
        """The database's time."""
        if self.is_sqlite:
            return Instant(self._wall())
        return Instant(connection.scalar(text(f"SELECT {_POSTGRESQL_NOW}")))

    @contextmanager
    def begin(self, *, write: bool) -> Iterator[Connection]:
        """A transaction. On SQLite a writer takes the lock at once, so that it never has to be repeated."""
        with (
            translated(),
            self._turn() if write and not self.is_sqlite else nullcontext(),
            self._connection("BEGIN IMMEDIATE" if write else "BEGIN") as connection,
        ):
            if not self.is_sqlite and not write:
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    def ask(self, query: Select[*tuple[Any, ...]]) -> tuple[Row[*tuple[Any, ...]], Instant] | None:
        """The first row of an answer, and the database's time, in one statement and no transaction."""
        with translated(), self._connection(None) as connection:
            if self.is_sqlite:
                row = connection.execute(query).first()
                return None if row is None else (row, self.now(connection))
            connection.execution_options(isolation_level="AUTOCOMMIT")
            row = connection.execute(query.add_columns(literal_column(_POSTGRESQL_NOW).label("now"))).first()
            return None if row is None else (row, Instant(row.now))

    @contextmanager
    def migrate(self) -> Iterator[Connection]:
        """A transaction that changes the schema, one program at a time.

        Batch mode rebuilds tables that others refer to, so SQLite looks at foreign keys before the commit, not after
        each statement.
        """
        with translated(), self._connection("BEGIN IMMEDIATE") as connection:
            connection.detach()
            if self.is_sqlite:
                _run(connection.connection.dbapi_connection, "PRAGMA foreign_keys=OFF")
            else:
                # Rewriting a table takes as long as it takes.
                connection.connection.dbapi_connection.patience = None  # type: ignore[union-attr]
            with connection.begin():
                if not self.is_sqlite:
                    for bound in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                        connection.execute(text(f"SET LOCAL {bound} = 0"))
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
                yield connection
                if self.is_sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
                    raise errors.InternalError(f"The migration would leave {len(broken)} rows that refer to nothing.")

    # --- connections

    def dispose(self) -> None:
        """Close this process's connections."""
        with GATE:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def before_fork(self) -> None:
        """Close what nobody uses, so that the child inherits nothing."""
        if not self._in_use:
            self.dispose()

    def in_child(self) -> None:
        """Leave alone, neither closed nor collected, what another thread of the parent was using."""
        self._trying, self._turns = threading.Lock(), self._new_turns()
        if self._in_use:
            self._parents, self._engine, self._in_use = self._engine, None, 0

    @contextmanager
    def _connection(self, begin: str | None) -> Iterator[Connection]:
        with GATE:
            engine = self._ready()
            self._in_use += 1
        try:
            with self._connect(engine) as connection:
                connection.info["begin"] = begin
                yield connection
        except DBAPIError as error:
            if error.connection_invalidated:
                self._note_away()
            raise
        finally:
            with GATE:
                self._in_use -= 1

    def _connect(self, engine: Engine) -> Connection:
        """A connection. While a server is away one thread at a time tries, and the others are told so: whoever serves
        the JWKS must not be held up by those who ask for the registry."""
        since = self._away_since
        if since is None or self.is_sqlite:
            try:
                return engine.connect()
            except DBAPIError:
                self._note_away()
                raise
        patience = _PATIENCE_WITH_A_TRY if time.monotonic() - since < _JUST_NOW else 0.0
        if not self._trying.acquire(timeout=patience):
            raise errors.StoreUnavailable("The registry's database is away.", retry_after=1)
        try:
            connection = engine.connect()
            self._away_since = None
            return connection
        finally:
            self._trying.release()

    def _new_turns(self) -> threading.Semaphore:
        return threading.Semaphore(max(1, min(2, self._connecting.pool_size - 1)))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A server's writers queue for one row. Here they queue before they hold a connection: the poll needs one."""
        if not self._turns.acquire(timeout=self._connecting.timeout):
            raise errors.StoreUnavailable("Too many changes wait for the registry's database.", retry_after=1)
        try:
            yield
        finally:
            self._turns.release()

    def _note_away(self) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()

    def _ready(self) -> Engine:
        """The engine, for the file that has the name now. None is made unasked."""
        if self.file is not None:
            if self._parents is not None:
                raise errors.InternalError("This process was forked while its parent was using the registry.")
            try:
                status = self.file.stat()
            except OSError as error:
                self.dispose()
                raise errors.StoreUnavailable(
                    f"The registry's file is not there: {error.strerror}.",
                    retry_after=1,
                    next_step=f"{HOW_TO_MAKE_ONE} If there was one, bring it back.",
                ) from error
            if self._opened != (status.st_dev, status.st_ino):
                # Somebody put another file there. Who kept the old one open would never see a change again.
                self.dispose()
                self._opened = (status.st_dev, status.st_ino)
        if self._engine is None:
            self._engine = self._make()
        return self._engine

    def _make(self) -> Engine:
        if not self.is_sqlite:
            try:
                from kms_jwks.store.postgresql import make_engine
            except ImportError as error:
                raise errors.ConfigurationError(
                    f"database_url: PostgreSQL needs a package that is not usable here: {error}.",
                    next_step="Install kms-jwks with its extra: pip install '.[postgres]' in its checkout.",
                ) from error
            return make_engine(self._url, self._connecting)
        engine = create_engine(
            self._url,
            connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False, "isolation_level": None},
            pool_size=8,
            max_overflow=24,
            pool_timeout=BUSY_TIMEOUT,
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine


def _understood(url: str) -> URL:
    """Raises ConfigurationError, which repeats nothing of the URL."""
    try:
        made = make_url(url)
    except ArgumentError:
        raise errors.ConfigurationError("database_url: not a URL of the form postgresql://… or sqlite:///….") from None
    if made.get_backend_name() not in ("sqlite", "postgresql", "postgres"):
        raise errors.ConfigurationError("database_url: the registry is kept in PostgreSQL or SQLite, nowhere else.")
    return made


def _run(connection: Any, statement: str) -> Any:
    cursor = connection.execute(statement)
    row = cursor.fetchone()
    cursor.close()
    return row[0] if row else None


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    try:
        if _run(connection, "PRAGMA journal_mode=WAL") != "wal":
            raise sqlite3.OperationalError("this file system cannot hold a write-ahead log")
        _run(connection, "PRAGMA synchronous=FULL")
        _run(connection, "PRAGMA foreign_keys=ON")
    except sqlite3.Error:
        connection.close()
        raise


def _begin_sqlite(connection: Connection) -> None:
    if connection.info["begin"] is not None:
        connection.exec_driver_sql(connection.info["begin"])
