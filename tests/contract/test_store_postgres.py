"""PostgreSQL adopts the store's contracts; tests of what only a server does: restart, fall silent, serve others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import create_engine, event

from kms_jwks import errors
from kms_jwks.model import SECOND, Client, CustodianLease, new_id
from kms_jwks.store import ConnectionSettings, Store
from kms_jwks.store.tables import metadata
from tests import postgres as servers
from tests.contract.schema_suite import SchemaContract
from tests.contract.store_suite import StoreContract
from tests.postgres import Postgres
from tests.proxy import Proxy
from tests.unit.builders import T0

QUICK = ConnectionSettings(timeout=1.0)


@pytest.fixture(scope="module")
def template(postgres: Postgres) -> str:
    """An empty registry to copy: running every migration for every test takes longer than the tests."""
    name = postgres.create()
    store = Store(postgres.url(name))
    store.upgrade()
    store.dispose()
    return name


class TestPostgres(StoreContract):
    @pytest.fixture
    def url(self, postgres: Postgres, template: str) -> str:
        return postgres.url(postgres.copy(template))


class TestSchema(SchemaContract):
    @pytest.fixture
    def url(self, postgres: Postgres) -> str:
        return postgres.url(postgres.create())

    def test_the_migrations_make_the_checks_of_the_code(self, store: Store, url: str, postgres: Postgres) -> None:
        """Alembic compares no CHECK constraints, no collations and no partial indexes."""

        def made(database: str) -> set[tuple[Any, ...]]:
            with postgres.connect(database) as connection:
                constraints = connection.execute(
                    "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
                    " WHERE connamespace = 'public'::regnamespace"
                ).fetchall()
                indexes = connection.execute("SELECT tablename, indexname, indexdef FROM pg_indexes").fetchall()
                columns = connection.execute(
                    "SELECT table_name, column_name, data_type, is_nullable, collation_name, character_maximum_length"
                    " FROM information_schema.columns WHERE table_schema = 'public'"
                ).fetchall()
            return {row for row in [*constraints, *indexes, *columns] if "alembic_version" not in row}

        store.upgrade()
        other = postgres.create()
        engine = create_engine(postgres.url(other).replace("postgresql://", "postgresql+psycopg://"))
        metadata.create_all(engine)
        engine.dispose()
        assert made(url.rpartition("/")[2]) == made(other)


@pytest.fixture
def database(postgres: Postgres, template: str) -> str:
    return postgres.copy(template)


@pytest.fixture
def store(postgres: Postgres, database: str) -> Iterator[Store]:
    made = Store(postgres.url(database), connection_settings=ConnectionSettings(timeout=20.0))
    yield made
    made.dispose()


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[Proxy]:
    with Proxy(postgres.port) as made:
        yield made


def add(store: Store, name: str) -> None:
    with store.write() as tx:
        tx.add(Client(new_id(), name, T0))


def names(store: Store) -> set[str]:
    with store.read() as tx:
        return {client.name for client in tx.clients()}


# --- concurrent writers


def test_a_writer_reads_what_the_previous_writer_wrote(store: Store) -> None:
    """Read-modify-write of two nodes at once loses no update, whatever the database's default isolation is."""
    with store.write() as tx:
        tx.set_custodian_lease(CustodianLease(0, "holder", "node", T0, T0))

    def raise_term(_: int) -> None:
        with store.write() as tx:
            lease = tx.custodian_lease()
            assert lease is not None
            tx.set_custodian_lease(replace(lease, term=lease.term + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(raise_term, range(64)))
    with store.read() as reading:
        lease = reading.custodian_lease()
    assert lease is not None
    assert lease.term == 64


@pytest.mark.parametrize("default", ["serializable", "repeatable read"])
def test_another_default_isolation_changes_nothing(
    postgres: Postgres, database: str, store: Store, default: str
) -> None:
    with postgres.connect() as connection:
        connection.execute(f"ALTER DATABASE \"{database}\" SET default_transaction_isolation = '{default}'")
    test_a_writer_reads_what_the_previous_writer_wrote(store)


def test_a_reader_writes_nothing(store: Store) -> None:
    with pytest.raises(errors.StoreUnavailable), store.read() as tx:
        tx._connection.exec_driver_sql("UPDATE epoch SET counter = 7")
    assert store.poll()[0].counter == 1


def test_a_writer_that_waits_too_long_may_try_again(postgres: Postgres, database: str) -> None:
    store = Store(postgres.url(database), connection_settings=QUICK)
    with postgres.connect(database) as other, other.transaction():
        other.execute("SELECT counter FROM epoch FOR UPDATE")
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable) as refusal, store.write():
            pass
        assert time.monotonic() - began > 0.9
        assert "held up" in refusal.value.detail
        assert refusal.value.retry_after == 1
        store.poll()
    add(store, "after")
    store.dispose()


def test_waiting_writers_leave_connections_to_readers(postgres: Postgres, database: str) -> None:
    """A worker that cannot poll loses its lease and delays changes of all nodes."""
    store = Store(postgres.url(database), connection_settings=ConnectionSettings(pool_size=3, timeout=20.0))
    with postgres.connect(database) as other, ThreadPoolExecutor(12) as pool:
        with other.transaction():
            other.execute("SELECT counter FROM epoch FOR UPDATE")
            writers = [pool.submit(add, store, f"client-{number}") for number in range(12)]
            time.sleep(0.3)
            for _ in range(20):
                store.poll()
            assert not any(writer.done() for writer in writers)
        for writer in writers:
            writer.result()
    assert len(names(store)) == 12
    store.dispose()


def test_an_idle_transaction_is_ended_and_does_not_block_other_writers(postgres: Postgres, database: str) -> None:
    """A process that is stopped, or whose packets are lost, holds the lock that the writers of all nodes wait for."""
    idle, other = (
        Store(postgres.url(database), connection_settings=ConnectionSettings(timeout=t)) for t in (1.0, 10.0)
    )

    def write_and_idle() -> None:
        with idle.write() as tx:
            tx.add(Client(new_id(), "of-the-stopped", T0))
            add(other, "of-the-other")

    with pytest.raises(errors.StoreUnavailable):
        write_and_idle()
    assert names(idle) == {"of-the-other"}
    for store in (idle, other):
        store.dispose()


def test_times_are_the_server_s(postgres: Postgres, database: str) -> None:
    """A node whose clock is half a minute off reads and writes the same time as the others."""
    seen = []
    for wrong in (-30, 30):

        def wall(wrong: int = wrong) -> int:
            return (int(time.time()) + wrong) * SECOND

        store = Store(postgres.url(database), wall=wall)
        with store.write() as tx:
            seen.append(tx.now())
        seen.append(store.poll()[1])
        store.dispose()
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] < 20 * SECOND
    assert abs(seen[0] - time.time() * SECOND) < 20 * SECOND


def test_the_moment_of_a_transaction_is_read_once(store: Store) -> None:
    with store.read() as tx:
        now = tx.now()
        time.sleep(0.01)
        assert tx.now() == now == tx.contents().now
    assert store.poll()[1] > now


# --- durability


def test_commits_are_durable_even_if_the_server_is_configured_otherwise(postgres: Postgres, database: str) -> None:
    for setting, expected in (("off", "on"), ("remote_apply", "remote_apply")):
        with postgres.connect() as connection:
            connection.execute(f'ALTER DATABASE "{database}" SET synchronous_commit = {setting}')
        store = Store(postgres.url(database))
        with store.read() as tx:
            assert tx._connection.exec_driver_sql("SHOW synchronous_commit").scalar() == expected
        store.dispose()


def test_a_commit_that_fails_has_no_epoch(store: Store, postgres: Postgres, database: str) -> None:
    store.poll()
    opened = store._database._engine
    assert opened is not None

    def end(connection: Any) -> None:
        kill_sessions(postgres, database)

    event.listen(opened, "commit", end)
    with pytest.raises(errors.StoreUnavailable), store.write() as tx:
        tx.add(Client(new_id(), "never", T0))
    event.remove(opened, "commit", end)
    assert tx.committed_epoch is None
    assert names(store) == set()


# --- loss and recovery of the server


def kill_sessions(postgres: Postgres, database: str) -> None:
    with postgres.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])


def fill_pool(store: Store) -> None:
    """Leave three idle connections in the pool."""
    with store.read(), store.read(), store.read():
        pass


def test_sessions_that_the_server_ended_are_replaced_without_an_error(
    store: Store, postgres: Postgres, database: str
) -> None:
    fill_pool(store)
    kill_sessions(postgres, database)
    add(store, "after")
    fill_pool(store)
    assert store.poll()[0].counter == 2


@pytest.mark.parametrize(
    "use", [Store.poll, names, lambda store: add(store, "after")], ids=["poll", "a read", "a change"]
)
def test_a_session_whose_end_has_not_arrived_is_replaced_without_an_error(
    store: Store, postgres: Postgres, database: str, use: Callable[[Store], object]
) -> None:
    """pg_terminate_backend returns before the session ends, and a connection may be taken in between."""
    fill_pool(store)
    with postgres.connect() as connection:
        found = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = %s", [database]).fetchall()
        processes = [process for (process,) in found]
        assert len(processes) == 3
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])

    def resume() -> None:
        for process in processes:
            os.kill(process, signal.SIGCONT)

    timer = threading.Timer(0.3, resume)
    timer.start()
    use(store)
    timer.join()
    fill_pool(store)
    store.poll()


def test_an_exchange_is_repeated_once_and_no_more(store: Store, postgres: Postgres, database: str) -> None:
    """A server that ends every session at once is unavailable, and is asked twice."""
    store.poll()
    opened = store._database._engine
    assert opened is not None
    ended = []

    def end(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        ended.append(statement)
        kill_sessions(postgres, database)
        time.sleep(0.3)

    event.listen(opened, "before_cursor_execute", end)
    for use in (store.poll, lambda: names(store), lambda: add(store, "never")):
        ended.clear()
        with pytest.raises(errors.StoreUnavailable):
            use()
        assert len(ended) == 2
    event.remove(opened, "before_cursor_execute", end)
    assert names(store) == set()


@pytest.fixture
def own() -> Iterator[Postgres]:
    with servers.running() as server:
        yield server


def test_a_server_that_is_restarted_or_killed_is_used_again(own: Postgres) -> None:
    name = own.create()
    store = Store(own.url(name), connection_settings=QUICK)
    store.upgrade()
    for number, end in enumerate((own.stop, own.kill)):
        fill_pool(store)
        add(store, f"before-{number}")
        end()
        for use in (store.poll, lambda: names(store), lambda: add(store, "never")):
            began = time.monotonic()
            with pytest.raises(errors.StoreUnavailable) as refusal:
                use()
            assert refusal.value.retry_after == 1
            assert time.monotonic() - began < 20
        own.start()
        add(store, f"after-{number}")
    assert names(store) == {"before-0", "after-0", "before-1", "after-1"}
    store.dispose()


def test_lost_packets_are_an_error_within_seconds_and_not_a_hang(
    postgres: Postgres, database: str, proxy: Proxy
) -> None:
    store = Store(postgres.url(database, port=proxy.port), connection_settings=QUICK)
    fill_pool(store)
    proxy.freeze()
    for use in (store.poll, lambda: names(store), lambda: add(store, "never")):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable):
            use()
        assert time.monotonic() - began < 20
    proxy.thaw()
    add(store, "after")
    assert names(store) - {"never"} == {"after"}
    store.dispose()


def test_a_connection_that_was_lost_while_idle_is_not_used(
    postgres: Postgres, database: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer vanished without closing it and is back under the same address: the first call succeeds."""
    monkeypatch.setattr("kms_jwks.store.postgresql._PING_AFTER", 0.0)
    monkeypatch.setattr("kms_jwks.store.postgresql._PING_TIMEOUT", 0.2)
    store = Store(postgres.url(database, port=proxy.port), connection_settings=QUICK)
    fill_pool(store)
    proxy.freeze()
    proxy.thaw(old_ones=False)
    add(store, "after")
    store.dispose()


def test_while_the_server_is_unreachable_one_call_tries_and_the_others_fail_at_once(
    postgres: Postgres, database: str, proxy: Proxy
) -> None:
    """Threads that wait for a connection cannot serve the JWKS meanwhile."""
    store = Store(postgres.url(database, port=proxy.port), connection_settings=ConnectionSettings(timeout=2.0))
    store.poll()
    proxy.freeze()
    with pytest.raises(errors.StoreUnavailable):
        store.poll()
    took = []

    def poll(_: int) -> None:
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable):
            store.poll()
        took.append(time.monotonic() - began)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(poll, range(8)))
    assert sum(seconds > 1.8 for seconds in took) == 1, took
    proxy.thaw()
    store.poll()
    store.dispose()


def test_a_poll_is_one_exchange(postgres: Postgres, database: str, proxy: Proxy) -> None:
    """Every worker polls four times a second, without a test of the connection and without a transaction."""
    store = Store(postgres.url(database, port=proxy.port))
    for _ in range(10):
        store.poll()
    before = proxy.requests
    for _ in range(10):
        store.poll()
    assert proxy.requests - before == 10
    store.dispose()


# --- messages and settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda url: url.replace("kms-jwks:", "kms-jwks:x"), "refuses this user or its password"),
        (lambda url: url + "-not", "does not exist"),
        (lambda url: url.replace("127.0.0.1", "nowhere.invalid"), "whose name is not known"),
        (
            lambda url: url.replace(url.rpartition(":")[2].partition("/")[0], str(servers.free_port())),
            "nothing listens",
        ),
    ],
)
def test_the_cause_of_a_failed_connection_names_no_user_host_or_database(
    postgres: Postgres, database: str, change: Any, said: str
) -> None:
    store = Store(change(postgres.url(database)))
    with pytest.raises(errors.StoreUnavailable) as refusal:
        store.poll()
    assert said in refusal.value.detail
    for secret in (database, "127.0.0.1", "nowhere", "kms-jwks"):
        assert secret not in refusal.value.detail
    store.dispose()


def test_sessions_carry_the_program_s_name_and_bounds_and_the_url_wins(postgres: Postgres, database: str) -> None:
    shown = ("application_name", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    asked = "?application_name=mine&options=-c%20statement_timeout%3D7s"
    for query, expected in (("", ["kms-jwks n1", "3s", "3s", "1500ms"]), (asked, ["mine", "7s", "3s", "1500ms"])):
        store = Store(
            postgres.url(database) + query,
            connection_settings=ConnectionSettings(timeout=3.0, application_name="kms-jwks n1"),
        )
        with store.read() as tx:
            found = [tx._connection.exec_driver_sql(f"SHOW {name}").scalar() for name in shown]
        assert found == expected
        store.dispose()


def test_a_process_opens_no_more_connections_than_its_pool(postgres: Postgres, database: str) -> None:
    store = Store(postgres.url(database), connection_settings=ConnectionSettings(pool_size=3))
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: names(store), range(60)))
    with postgres.connect() as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [database]).fetchone()
    assert row is not None
    assert 1 <= row[0] <= 3
    store.dispose()


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/d", "hunter2", "://hunter2"])
def test_another_kind_of_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(errors.ConfigurationError) as refusal:
        Store(url)
    assert "hunter2" not in str(refusal.value) + refusal.value.detail


# --- forking


def test_a_child_works_on_connections_of_its_own(store: Store, postgres: Postgres) -> None:
    """Also while another thread of the parent has an open transaction."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with store.read() as tx:
            held.set()
            assert go.wait(30)
            tx.clients()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    child = multiprocessing.get_context("fork").Process(target=add, args=(store, "of-the-child"))
    child.start()
    child.join(30)
    go.set()
    thread.join()
    assert child.exitcode == 0
    assert names(store) == {"of-the-child"}
