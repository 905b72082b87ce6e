"""Connections to SQLite (WAL, synchronous=FULL) or PostgreSQL, made anew after a fork; their errors translated."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from kms_jwks import errors
from kms_jwks.model import Instant

BUSY_TIMEOUT = 5.0
"""Seconds a writer waits for another one."""


class Database:
    """One database. Opens nothing until it is used, and nothing of a parent's in a child."""

    def __init__(self, url: str, wall: Callable[[], int] | None) -> None:
        self._url = make_url(url)
        self._wall = wall
        self._engine: Engine | None = None
        self._pid = 0
        self._lock = threading.Lock()

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

    def engine(self) -> Engine:
        """This process's engine. Raises StoreUnavailable for a SQLite file that is not there: none is made unasked."""
        if self._engine is None or self._pid != os.getpid():
            with self._lock:
                if self._engine is None or self._pid != os.getpid():
                    # A parent's connections are its own: the engine is left behind, not closed.
                    if self._engine is not None:
                        self._engine.dispose(close=False)
                    self._engine, self._pid = self._make(), os.getpid()
        file = self.file
        if file is not None and not file.exists():
            self._engine.dispose()
            raise errors.StoreUnavailable(
                "The registry's file is not there.", retry_after=1, next_step="Run `kms-jwks init`, or bring it back."
            )
        return self._engine

    def create_file(self) -> None:
        """Make SQLite's file with mode 0600 before anybody opens it."""
        if self.file is not None:
            try:
                os.close(os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise errors.StoreUnavailable(f"The registry's file cannot be made: {error.strerror}.") from error

    def now(self, connection: Connection) -> Instant:
        """The database's time."""
        if self.is_sqlite:
            return Instant(self._wall() if self._wall is not None else time.time_ns() // 1000)
        return Instant(connection.scalar(text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")))

    @contextmanager
    def begin(self, *, write: bool) -> Iterator[Connection]:
        """A transaction. On SQLite a writer takes the lock at once, so that it never has to be repeated."""
        with translated(), self.engine().connect() as connection:
            connection.info["write"] = write
            with connection.begin():
                if not self.is_sqlite and not write:
                    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
                yield connection

    def dispose(self) -> None:
        """Close this process's connections."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()

    def _make(self) -> Engine:
        if not self.is_sqlite:
            return create_engine(self._url, pool_pre_ping=True, pool_size=8, max_overflow=8)
        engine = create_engine(
            self._url,
            connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False, "isolation_level": None},
            pool_size=8,
            max_overflow=24,
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("write") else "BEGIN")


# Which of our conflicts a violated constraint means: by the constraint's name (PostgreSQL) or its columns (SQLite).
_CONFLICTS: tuple[tuple[tuple[str, ...], type[errors.Conflict]], ...] = (
    (("pk_kids", "kids.kid"), errors.KidTaken),
    (("uq_versions_active", "versions.key_id"), errors.TransitionRefused),
    (("uq_key_sets_name", "key_sets.name"), errors.NameTaken),
    (("uq_keys_key_set_id_name", "keys.key_set_id, keys.name"), errors.NameTaken),
    (("uq_clients_name", "clients.name"), errors.NameTaken),
)


@contextmanager
def translated() -> Iterator[None]:
    """The database's errors as ours; whatever else is raised inside passes."""
    try:
        yield
    except IntegrityError as error:
        said = str(error.orig)
        for marks, conflict in _CONFLICTS:
            if any(said.endswith(mark) or f'"{mark}"' in said for mark in marks):
                raise conflict from error
        raise errors.Conflict("The change contradicts what the registry holds.") from error
    except (DBAPIError, sqlite3.Error) as error:
        raise errors.StoreUnavailable("The registry's database did not answer as it should.", retry_after=1) from error
    except SQLAlchemyError as error:
        raise errors.StoreUnavailable("The registry's database cannot be used.", retry_after=1) from error
