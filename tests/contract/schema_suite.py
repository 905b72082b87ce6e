"""The contract of every registry store about its schema. An adopter gives `url`: an existing, empty database."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, Table, create_engine, inspect, text

from kms_jwks import errors, jose
from kms_jwks.model import ApiToken, Client, Epoch, Grant, Id, Intent, IntentKind, IntentState, VersionState, Worker
from kms_jwks.store import Store, schema
from kms_jwks.store.mapping import MAPPERS
from kms_jwks.store.tables import metadata
from tests.unit.builders import T0, external, key, key_set, version

MIGRATIONS = schema.MIGRATIONS
NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{head}"


def upgrade() -> None:
    with op.batch_alter_table("clients", recreate="{recreate}") as batch:
        batch.add_column(sa.Column("note", sa.Text()))
"""


_WORKER = Worker(Id("worker-1"), "node", 7, 10, T0, T0)
_CLIENT = Client(Id("client-1"), "issuer", T0)
_TOKEN = ApiToken(Id("token-1"), Id("client-1"), "ab" * 32, T0, T0)
_GRANT = Grant(Id("grant-1"), Id("client-1"), "signer", T0, Id("set-1"), Id("key-1"))
_INTENT = Intent(Id("intent-1"), IntentKind.GENERATE, Id("version-1"), "softhsm", "kj-1", IntentState.DONE, T0, T0)


class SchemaContract:
    """Adopt by subclassing with a fixture `url`."""

    recreate = "auto"
    """How a migration adds a column: "always" rebuilds the table."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        made = Store(url)
        yield made
        made.dispose()

    def test_an_empty_database_is_a_schema_mismatch_and_not_unavailable(self, store: Store) -> None:
        """Waiting does not help, so it is not StoreUnavailable."""

        def read() -> None:
            with store.read() as tx:
                tx.key_set("main")

        def write() -> None:
            with store.write():
                pass

        for use in (store.poll, read, write, store.check_schema):
            with pytest.raises(errors.SchemaMismatch) as refusal:
                use()
            assert "kms-jwks db upgrade" in refusal.value.next_step

    def test_a_newer_schema_is_refused_by_name(self, store: Store, url: str) -> None:
        store.upgrade()
        store.check_schema()
        with connected(url) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        for use in (store.check_schema, store.upgrade):
            with pytest.raises(errors.SchemaMismatch) as refusal:
                use()
            assert "newer program" in refusal.value.next_step

    def test_the_migrations_make_the_tables_of_the_code(self, store: Store, url: str) -> None:
        store.upgrade()
        with connected(url) as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []

    def test_an_unknown_state_is_not_stored(self, store: Store) -> None:
        store.upgrade()
        with pytest.raises(errors.Conflict), store.write() as tx:
            tx.add(replace(key_set(), access=_Unknown.ODD))  # type: ignore[arg-type]

    def test_an_older_schema_is_refused_and_brought_up_to_date(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next migration may rebuild a table that others refer to, and must not lose a row."""
        store.upgrade()
        head = schema.needed_revision()
        with store.write() as tx:
            tx.add(Client(Id("client-1"), "issuer", T0))
            tx.add(Grant(Id("grant-1"), Id("client-1"), "signer", T0))
        self._add_migration(tmp_path, monkeypatch)

        with pytest.raises(errors.SchemaMismatch) as refusal:
            store.check_schema()
        assert refusal.value.fields == {"found": head, "needed": "next"}
        assert "kms-jwks db upgrade" in refusal.value.next_step

        store.upgrade()
        store.check_schema()
        with store.read() as reading:
            assert [g.client_id for g in reading.grants()] == [Id("client-1")]
            assert reading.client("issuer") is not None
        with pytest.raises(errors.Conflict), store.write() as tx:
            tx.add(Grant(Id("grant-2"), Id("nobody"), "signer", T0))

    def test_every_earlier_schema_is_brought_up_to_date(
        self, store: Store, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Revision after revision; entities that were written under the first are read under the last."""
        revisions = sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("0*.py"))
        assert revisions[-1] == schema.needed_revision()
        # A kid that no longer can be given: what has it must be found, to be removed.
        active, old = version(1, VersionState.ACTIVE), external(kid="old-2024\n")
        upgrade = command.upgrade
        things = (key_set(), key(), active, _WORKER, _INTENT, old, _CLIENT, _TOKEN, _GRANT)
        for revision in revisions:
            with monkeypatch.context() as patched:
                patched.setattr(command, "upgrade", lambda config, _, to=revision: upgrade(config, to))
                if revision != revisions[-1]:
                    patched.setattr(schema, "_write_first_rows", lambda *_: None)  # they fit the last schema alone
                store.upgrade()
            if revision == revisions[0]:
                with connected(url) as connection:
                    for thing in things:
                        mapper = MAPPERS[type(thing)]
                        then = Table(mapper.table.name, MetaData(), autoload_with=connection)
                        row = {name: value for name, value in mapper.to_row(thing).items() if name in then.c}
                        connection.execute(then.insert().values(row))
                    connection.execute(text("INSERT INTO epoch (single, incarnation, counter) VALUES (1, 'old', 41)"))
        store.check_schema()
        with store.read() as tx:
            epoch = tx.epoch()
            assert epoch == Epoch("old", 41)
            assert epoch.is_same(tx.past_epoch(41))
            assert len(epoch.link) == 64
            found = (*tx.key_sets(), *tx.keys(), *tx.versions(), *tx.workers(), *tx.intents())
            more = (*tx.external_keys(), *tx.clients(), *tx.tokens(), *tx.grants())
            bound = {holder.kid: tx.kid_binding(holder.key_set_id, str(holder.kid)) for holder in (active, old)}
            assert tx.external_key(old.key_set_id, old.kid) == old
        assert (*found, *more) == things
        assert bound == {holder.kid: jose.thumbprint(holder.public_jwk or {}) for holder in (active, old)}
        with pytest.raises(errors.KidTaken), store.write() as writing:
            writing.add(external(id=Id("external-2"), kid="kid-1", public_jwk={**old.public_jwk, "y": "other"}))

    def test_a_migration_that_fails_changes_nothing(
        self, store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.upgrade()
        with monkeypatch.context() as patched:
            self._add_migration(tmp_path, patched, "    raise ZeroDivisionError\n")
            with pytest.raises(ZeroDivisionError):
                store.upgrade()
        store.check_schema()
        with connected(url) as connection:
            assert "note" not in {column["name"] for column in inspect(connection).get_columns("clients")}

    def test_simultaneous_first_starts_create_one_registry(self, store: Store) -> None:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=store.upgrade) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert store.poll()[0].counter == 1

    def _add_migration(self, folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
        shutil.copytree(MIGRATIONS, folder / "migrations")
        written = NEXT.format(head=schema.needed_revision(), recreate=self.recreate) + more
        (folder / "migrations" / "versions" / "next.py").write_text(written)
        monkeypatch.setattr(schema, "MIGRATIONS", folder / "migrations")


class _Unknown(StrEnum):
    ODD = "odd"


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A connection of the test's own, committed at the end of the block."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()
