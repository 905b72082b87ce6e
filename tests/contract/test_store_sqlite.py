"""SQLite adopts the store's contract, and keeps what only a file can break."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from kms_jwks import errors
from kms_jwks.store import Store
from kms_jwks.store.tables import metadata
from tests.contract.store_suite import StoreContract


class TestSqlite(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/registry.sqlite3"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite3"


def test_only_its_owner_reads_the_file(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    store.poll()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    store.dispose()


def test_it_is_durable(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    with store.read() as tx:
        pragmas = [
            tx._connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        ]
    assert pragmas == ["wal", 2]
    store.dispose()


def test_a_file_that_is_not_there_is_not_made_unasked(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    for use in (store.poll, store.check_schema):
        with pytest.raises(errors.StoreUnavailable):
            use()
    assert not file.exists()


def test_a_file_that_comes_back_is_used_again(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    before = store.poll()[0]
    store.dispose()
    file.rename(file.with_name("away"))
    with pytest.raises(errors.StoreUnavailable):
        store.poll()
    file.with_name("away").rename(file)
    assert store.poll()[0] == before
    store.dispose()


def test_a_file_that_is_no_database(file: Path) -> None:
    file.write_bytes(b"this is not a database, but it is long enough to be read as one" * 10)
    store = Store(f"sqlite:///{file}")
    with pytest.raises(errors.StoreUnavailable):
        store.poll()
    store.dispose()


def test_an_empty_or_newer_schema_is_refused_by_name(file: Path) -> None:
    file.touch()
    store = Store(f"sqlite:///{file}")
    with pytest.raises(errors.SchemaMismatch) as refusal:
        store.check_schema()
    assert "db upgrade" in refusal.value.next_step
    store.upgrade()
    store.check_schema()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    for use in (store.check_schema, store.upgrade):
        with pytest.raises(errors.SchemaMismatch) as refusal:
            use()
        assert "newer program" in refusal.value.next_step
    store.dispose()


def test_the_migrations_make_the_tables_of_the_code(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    store.dispose()
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_no_password_is_shown() -> None:
    assert "secret" not in Store("postgresql+psycopg://user:secret@localhost/registry").url
