"""Why the registry's database cannot be used: each cause produced for real and named, with what to do about it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import event

from kms_jwks import errors
from kms_jwks.cli.app import cli
from kms_jwks.model import Client, new_id
from kms_jwks.store import ConnectionSettings, Store, sqlite
from kms_jwks.store.error_map import unavailable
from tests.postgres import Postgres, pooler
from tests.unit.builders import T0


def add(store: Store, name: str = "issuer") -> None:
    with store.write() as tx:
        tx.add(Client(new_id(), name, T0))


@contextmanager
def opened(url: str, **settings: Any) -> Iterator[Store]:
    store = Store(url, connection_settings=ConnectionSettings(**settings))
    try:
        yield store
    finally:
        store.dispose()


def cause(use: Callable[[], object]) -> str:
    """The cause that the refusal names, after a look at what every refusal must say."""
    with pytest.raises(errors.StoreUnavailable) as refusal:
        use()
    error = refusal.value
    assert error.retry_after == 1 or isinstance(error, errors.PoolerUnsuitable)
    assert error.next_step != errors.StoreUnavailable.next_step, "it says what to do"
    return str(error.fields["cause"])


# --- SQLite -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "registry.sqlite3"
    with opened(f"sqlite:///{made}") as store:
        store.upgrade()
    return made


def pragma(store: Store, statement: str) -> None:
    """Run a PRAGMA on every connection that the store makes."""
    store.poll()
    engine = store._database._engine
    assert engine is not None
    event.listen(engine, "checkout", lambda connection, *_: connection.execute(statement))


def test_a_file_that_another_process_has_locked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.05)
    with opened(f"sqlite:///{file}") as store, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert cause(lambda: add(store)) == "locked"
        store.poll()
        other.execute("ROLLBACK")
        add(store)
        store.dispose()
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("DELETE FROM clients")
        assert cause(store.poll) == "locked"


def test_a_full_disk(file: Path) -> None:
    with opened(f"sqlite:///{file}") as store:
        pragma(store, "PRAGMA max_page_count = 1")

        def fill() -> None:
            for number in range(1000):
                add(store, f"issuer-{number}")

        assert cause(fill) == "disk_full"
        store.poll()


def test_a_file_that_cannot_be_written(file: Path) -> None:
    with opened(f"sqlite:///{file}") as store:
        pragma(store, "PRAGMA query_only = ON")
        assert cause(lambda: add(store)) == "read_only"


def test_a_file_that_is_none(tmp_path: Path) -> None:
    damaged = tmp_path / "registry.sqlite3"
    damaged.write_bytes(b"this is not a database, but it is long enough to be read as one" * 10)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, expected in ((damaged, "damaged"), (folder, "cannot_open"), (tmp_path / "nowhere", "no_file")):
        with opened(f"sqlite:///{path}") as store:
            assert cause(store.poll) == expected


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> str:
    name = postgres.create()
    with opened(postgres.url(name)) as store:
        store.upgrade()
    return name


def test_every_refusal_of_the_server(postgres: Postgres, database: str) -> None:
    expected = {
        "25006": "read_only",
        "25P03": "idle_transaction",
        "25P04": "idle_transaction",
        "28000": "login_refused",
        "3D000": "no_database",
        "40001": "serialization",
        "42501": "no_permission",
        "53100": "disk_full",
        "53200": "out_of_memory",
        "53300": "no_connection_left",
        "55P03": "lock_timeout",
        "57014": "statement_timeout",
        "57P01": "stopping",
        "57P02": "stopping",
        "57P03": "stopping",
        "57P04": "no_database",
        "57P05": "idle_session",
        "58030": "disk_failing",
        "XX001": "damaged",
    }
    with opened(postgres.url(database)) as store:

        def refuse(state: str) -> None:
            with store.read() as tx:
                tx._connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$")

        assert {state: cause(lambda state=state: refuse(state)) for state in expected} == expected  # type: ignore[misc]
        with pytest.raises(errors.StoreUnavailable, match=r"did not answer as it should \(58P02\)"):
            refuse("58P02")


def test_a_statement_that_takes_too_long(postgres: Postgres, database: str) -> None:
    with opened(postgres.url(database), timeout=0.2) as store, store.read() as tx:
        with pytest.raises(psycopg.errors.QueryCanceled) as ended:
            tx._connection.connection.dbapi_connection.execute("SELECT pg_sleep(5)")  # type: ignore[union-attr]
        assert unavailable(ended.value).fields["cause"] == "statement_timeout"
        tx._connection.exec_driver_sql("ROLLBACK")
        tx._connection.exec_driver_sql("BEGIN")


def test_a_database_that_cannot_be_reached(postgres: Postgres, database: str) -> None:
    url = postgres.url(database)
    password = f":{postgres.password}@"
    for changed, expected in (
        (url.replace(password, ":wrong@"), "login_refused"),
        (f"{url}-not", "no_database"),
        (url.replace("127.0.0.1", "nowhere.invalid"), "unknown_host"),
        (f"{url}?sslmode=require", "tls"),
        (f"{url}?sslmode=verify-full&sslrootcert=/nowhere", "tls"),
        (f"{url}?options=-c%20statement_timeout%3Dx", "parameter"),
    ):
        with opened(changed) as store:
            assert cause(store.poll) == expected, expected


def test_sessions_that_end_while_they_are_idle_are_replaced_without_an_error(postgres: Postgres, database: str) -> None:
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE \"{database}\" SET idle_session_timeout = '100ms'")
    try:
        with opened(postgres.url(database)) as store:
            for _ in range(2):
                store.poll()
                with store.read(), store.read():
                    pass
                time.sleep(0.3)
            add(store, "after")
    finally:
        with postgres.connect() as connection:
            connection.execute(f'ALTER DATABASE "{database}" RESET idle_session_timeout')


def test_a_character_that_the_database_cannot_store_is_the_sender_s_fault(postgres: Postgres, file: Path) -> None:
    """NUL in a database in UTF-8, and what an encoding of one octet lacks."""
    with postgres.connect() as connection:
        name = f"{postgres.create()}_latin1"
        connection.execute(f"CREATE DATABASE {name} ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    for text in ("nul \0", "kanji 漢"):
        with opened(postgres.url(name)) as store:
            store.upgrade()
            with pytest.raises(errors.InvalidField):
                add(store, text)
            store.poll()


# --- a pooler ---------------------------------------------------------------------------------------------------------

BOUNDS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


def test_a_pooler_in_session_mode_is_as_good_as_the_server(postgres: Postgres) -> None:
    with pooler(postgres, "session") as port:
        name = postgres.create()
        with opened(postgres.url(name, port=port), timeout=3.0, pool_size=3) as store:
            store.upgrade()
            for number in range(10):  # psycopg prepares what it has sent five times
                add(store, f"client-{number}")
            with store.read() as tx, store.read():
                found = [tx._connection.exec_driver_sql(f"SHOW {bound}").scalar() for bound in BOUNDS]
                assert len(tx.clients()) == 10
            assert found == ["3s", "3s", "1500ms"]
        with opened(f"{postgres.url(name, port=port)}?options=-c%20statement_timeout%3D7s") as store:
            assert cause(store.poll) == "pooler_parameter"


@pytest.mark.parametrize("settings", [{}, {"server_round_robin": 1}, {"default_pool_size": 1}])
def test_a_pooler_in_transaction_mode_is_refused(postgres: Postgres, database: str, settings: dict[str, Any]) -> None:
    with pooler(postgres, "transaction", **settings) as port:
        url = postgres.url(database, port=port)
        for _ in range(3):
            with opened(url) as store:
                assert cause(store.poll) == "pooler_mode"
                assert cause(lambda: add(store)) == "pooler_mode"
        with pooler(postgres, "statement") as other, opened(postgres.url(database, port=other)) as store:
            assert cause(store.poll) == "pooler_mode"


def test_the_mode_is_found_while_other_clients_use_the_pooler(postgres: Postgres, database: str) -> None:
    stop = threading.Event()

    def work(url: str) -> None:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
            while not stop.is_set():
                connection.execute("SELECT 1")

    with pooler(postgres, "transaction", server_round_robin=1) as port:
        url = postgres.url(database, port=port)
        others = [threading.Thread(target=work, args=(url,)) for _ in range(3)]
        for other in others:
            other.start()
        try:
            for _ in range(5):
                with opened(url) as store:
                    assert cause(store.poll) == "pooler_mode"
        finally:
            stop.set()
            for other in others:
                other.join()


def test_serve_does_not_start_behind_a_pooler_in_transaction_mode(
    postgres: Postgres, database: str, tmp_path: Path
) -> None:
    with pooler(postgres, "transaction") as port:
        settings = {
            "KMS_JWKS_DATABASE_URL": postgres.url(database, port=port),
            "KMS_JWKS_STATE_DIR": str(tmp_path),
            "KMS_JWKS_ROUTES": "public",
        }
        for command in ("serve", "custodian", "doctor"):
            answer = CliRunner().invoke(cli, [command], env=settings)
            assert answer.exit_code == 1 if command == "doctor" else 4, answer.output
            assert "A pooler in transaction mode is before the registry's database" in answer.output
            assert "pool_mode = session" in answer.output
            assert postgres.password not in answer.output
