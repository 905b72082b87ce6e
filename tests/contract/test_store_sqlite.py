"""SQLite adopts the store's contracts; tests of what only a file can do."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event

from kms_jwks import errors
from kms_jwks.model import Client, Epoch, Id, new_id
from kms_jwks.store import Store, schema, sqlite
from kms_jwks.store.tables import metadata
from tests.contract.schema_suite import MIGRATIONS, SchemaContract
from tests.contract.store_suite import StoreContract
from tests.unit.builders import T0


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry to copy: running every migration for every test takes longer than the tests."""
    made = tmp_path_factory.mktemp("template") / "registry.sqlite3"
    store = Store(f"sqlite:///{made}")
    store.upgrade()
    store.dispose()
    return made


class TestSqlite(StoreContract):
    @pytest.fixture
    def url(self, template: Path, tmp_path: Path) -> str:
        shutil.copy(template, tmp_path / "registry.sqlite3")
        return f"sqlite:///{tmp_path}/registry.sqlite3"


class TestSchema(SchemaContract):
    recreate = "always"

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        (tmp_path / "registry.sqlite3").touch()
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


def test_a_missing_file_is_created_only_by_an_upgrade(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    for use in (store.poll, store.check_schema):
        with pytest.raises(errors.StoreUnavailable) as refusal:
            use()
        assert "kms-jwks db upgrade" in refusal.value.next_step
        assert "kms-jwks init" in refusal.value.next_step
    assert not file.exists()


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreUnavailable):
        Store(f"sqlite:///{tmp_path}/nowhere/registry.sqlite3").upgrade()


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


def test_a_replaced_file_is_noticed(file: Path) -> None:
    """A worker that went on polling the old file would sign with a key that is revoked in the restored one."""
    store, other = Store(f"sqlite:///{file}"), Store(f"sqlite:///{file}.other")
    for each in (store, other):
        each.upgrade()
    expected = other.poll()[0]
    assert store.poll()[0] != expected
    other.dispose()
    Path(f"{file}.other").replace(file)
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    assert store.poll()[0] == expected
    store.dispose()


def test_a_file_that_is_not_a_database(file: Path) -> None:
    file.write_bytes(b"this is not a database, but it is long enough to be read as one" * 10)
    store = Store(f"sqlite:///{file}")
    with pytest.raises(errors.StoreUnavailable):
        store.poll()
    store.dispose()


def test_the_migrations_make_the_checks_of_the_code(file: Path) -> None:
    """Alembic compares no CHECK constraints and no partial indexes, so the SQL statements are compared."""

    def statements(path: Path) -> dict[str, list[str]]:
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        return {
            name: sorted(line.strip().strip(",") for line in _plain(sql).splitlines() if line.strip())
            for name, sql in rows
            if name != "alembic_version"
        }

    def _plain(sql: str) -> str:
        # A CHECK comes after its column or after all columns, and the name of a rebuilt table is quoted: the database
        # makes no difference.
        return sql.replace(" CONSTRAINT ck_", ",\n\tCONSTRAINT ck_").replace(", ,", ",").replace('"', "")

    store = Store(f"sqlite:///{file}")
    store.upgrade()
    store.dispose()
    made = file.with_name("made")
    database = create_engine(f"sqlite:///{made}")
    metadata.create_all(database)
    database.dispose()
    assert statements(file) == statements(made)


def test_the_names_of_the_migrations_are_their_revisions() -> None:
    """The schema is checked without Alembic, by the names of the files."""
    scripts = ScriptDirectory.from_config(schema.alembic_config())
    assert scripts.get_current_head() == schema.needed_revision()
    assert [script.revision for script in scripts.walk_revisions()] == schema._revisions()[::-1]


def test_a_schema_is_checked_and_used_without_alembic(file: Path) -> None:
    """A process that serves, signs or runs the custodian does not import it."""
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    store.dispose()
    code = (
        "import sys; sys.modules['alembic'] = None\n"
        "from kms_jwks.store import Store\n"
        f"store = Store('sqlite:///{file}')\n"
        "store.check_schema(); print(store.poll()[0].counter)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def test_no_migration_can_be_undone() -> None:
    for script in MIGRATIONS.rglob("*.*"):
        if script.suffix in {".py", ".mako"}:
            assert "def downgrade" not in script.read_text()


# --- waiting, failures, forks


def test_a_writer_that_waits_too_long_may_try_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.05)
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    with store.write():
        with pytest.raises(errors.StoreUnavailable) as refusal, store.write():
            pass
        assert refusal.value.retry_after == 1
        store.poll()
    with store.write():
        pass
    store.dispose()


def test_the_moment_of_a_transaction_is_read_once(file: Path) -> None:
    ticks = itertools.count(1)
    store = Store(f"sqlite:///{file}", wall=lambda: next(ticks))
    store.upgrade()
    with store.read() as tx:
        assert tx.now() == tx.now() == tx.contents().now
    assert store.poll()[1] > tx.now()
    store.dispose()


def test_a_commit_that_fails_has_no_epoch(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    store.poll()
    opened = store._database._engine
    assert opened is not None

    def full(_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    event.listen(opened, "commit", full)
    with pytest.raises(errors.StoreUnavailable), store.write() as tx:
        tx.add(Client(Id("client-1"), "issuer", T0))
    assert tx.committed_epoch is None
    event.remove(opened, "commit", full)
    assert store.poll()[0].counter == 1
    store.dispose()


def test_the_history_is_forgotten_after_many_changes_but_for_announcements(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was away for so long cannot tell a registry from an older one: an operator does."""
    monkeypatch.setattr("kms_jwks.store.transactions.HISTORY_KEPT", 3)
    monkeypatch.setattr("kms_jwks.store.transactions._FORGET_EVERY", 1)
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    known, _ = store.poll()
    with store.write() as tx:
        tx.new_incarnation(Epoch("lost", 9, "aa"))
    second, _ = store.poll()
    for number in range(3):
        with store.write() as tx:
            tx.add(Client(new_id(), f"client-{number}", T0))
    with store.read() as reading:
        assert [reading.past_epoch(n) is not None for n in range(1, 6)] == [False, True, True, True, True]
        assert reading.superseded("lost") == 9
    for old, refusal in ((known, "another one"), (replace(known, incarnation=second.incarnation), "not remember")):
        store.known_epoch = lambda old=old: old  # type: ignore[misc]
        with pytest.raises(errors.RegistryRolledBack, match=refusal) as refused, store.write():
            pass
    assert "--accept" in refused.value.next_step
    store.dispose()


def test_commits_of_a_child_survive_when_the_parent_closes(file: Path) -> None:
    """A child holds none of its parent's locks: on an inherited connection this commit was lost silently."""
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    store.poll()
    go, started = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.get_context("fork").Process(target=_write_when_told, args=(store, started, go))
    child.start()
    assert started.wait(30)
    store.dispose()
    assert Path(f"{file}-wal").exists()
    other = Store(f"sqlite:///{file}")
    with other.write() as tx:
        tx.add(Client(Id("client-2"), "another", T0))
    other.dispose()
    go.set()
    child.join(30)
    assert child.exitcode == 0
    with store.read() as reading:
        assert {client.name for client in reading.clients()} == {"another", "of-the-child"}
    store.dispose()


def test_a_child_forked_during_a_transaction_is_refused(file: Path) -> None:
    store = Store(f"sqlite:///{file}")
    store.upgrade()
    with store.read() as tx:
        child = multiprocessing.get_context("fork").Process(target=_expect_refusal, args=(store,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert tx.epoch().counter == 1
    assert store.poll()[0].counter == 1
    store.dispose()


def _write_when_told(store: Store, started: Any, go: Any) -> None:
    store.poll()
    started.set()
    go.wait(30)
    with store.write() as tx:
        tx.add(Client(Id("client-1"), "of-the-child", T0))
    store.dispose()


def _expect_refusal(store: Store) -> None:
    with pytest.raises(errors.InternalError):
        store.poll()


def test_no_password_is_shown() -> None:
    assert "secret" not in Store("postgresql+psycopg://user:secret@localhost/registry").url
