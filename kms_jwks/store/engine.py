"""Connections to SQLite (WAL, synchronous=FULL) or PostgreSQL, never shared over a fork; transactions on them."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, create_engine, event, literal_column, text
from sqlalchemy.engine import make_url

from kms_jwks import errors
from kms_jwks.model import Instant
from kms_jwks.store.failures import HOW_TO_MAKE_ONE, translated
from kms_jwks.store.forks import GATE, tell

BUSY_TIMEOUT = 5.0
"""Seconds a writer waits for another one, and anybody for a connection."""

_MIGRATION_LOCK = 0x6B6D736A776B73
"""PostgreSQL's advisory lock under which one program at a time changes the schema."""

_POSTGRESQL_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


class Database:
    """One database. Opens nothing until it is used, and nothing of a parent's in a child."""

    def __init__(self, url: str, wall: Callable[[], int] | None) -> None:
        self._url = make_url(url)
        self._wall = wall or (lambda: time.time_ns() // 1000)
        self._engine: Engine | None = None
        self._opened: tuple[int, int] | None = None
        self._in_use = 0
        self._parents: Engine | None = None
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
        with translated(), self._connection("BEGIN IMMEDIATE" if write else "BEGIN") as connection, connection.begin():
            if not self.is_sqlite and not write:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
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
            with connection.begin():
                if not self.is_sqlite:
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
        if self._in_use:
            self._parents, self._engine, self._in_use = self._engine, None, 0

    @contextmanager
    def _connection(self, begin: str | None) -> Iterator[Connection]:
        with GATE:
            engine = self._ready()
            self._in_use += 1
        try:
            with engine.connect() as connection:
                connection.info["begin"] = begin
                yield connection
        finally:
            with GATE:
                self._in_use -= 1

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
            patience = {} if "connect_timeout" in self._url.query else {"connect_timeout": int(BUSY_TIMEOUT)}
            return create_engine(
                self._url,
                pool_pre_ping=True,
                pool_size=8,
                max_overflow=8,
                pool_timeout=BUSY_TIMEOUT,
                connect_args=patience,
            )
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
