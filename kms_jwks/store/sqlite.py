"""How this program opens SQLite's file: write-ahead log, synchronous=FULL, foreign keys checked."""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event

BUSY_TIMEOUT = 5.0
"""Seconds that a writer waits for another one, and that a call waits for a connection."""


def make_engine(url: URL) -> Engine:
    """An engine for SQLite's file, in autocommit mode."""
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False, "isolation_level": None},
        pool_size=8,
        max_overflow=24,
        pool_timeout=BUSY_TIMEOUT,
    )
    event.listen(engine, "connect", _prepare)
    return engine


def run(connection: Any, statement: str) -> Any:
    """Run a statement on a driver's connection. The first value of its first row; None where it has none."""
    cursor = connection.execute(statement)
    row = cursor.fetchone()
    cursor.close()
    return row[0] if row else None


def _prepare(connection: sqlite3.Connection, _: Any) -> None:
    try:
        if run(connection, "PRAGMA journal_mode=WAL") != "wal":
            raise sqlite3.OperationalError("this file system cannot hold a write-ahead log")
        run(connection, "PRAGMA synchronous=FULL")
        run(connection, "PRAGMA foreign_keys=ON")
    except sqlite3.Error:
        connection.close()
        raise
