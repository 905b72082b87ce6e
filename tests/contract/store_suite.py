"""The contract of every registry store. An adopter gives `url`: a database of its own, empty or just upgraded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from kms_jwks import errors, jose
from kms_jwks.model import (
    SECOND,
    Breach,
    Client,
    CustodianLease,
    Epoch,
    ExternalKey,
    Grant,
    Id,
    IdempotencyRecord,
    Instant,
    Intent,
    IntentKind,
    IntentState,
    KeyVersion,
    Origin,
    VersionState,
    Worker,
    new_id,
)
from kms_jwks.model import ApiToken as Token
from kms_jwks.store import Store, WriteTx, snapshot_view
from tests.contract.store_histories import History, Transaction, histories
from tests.unit.builders import T0, at, external, key, key_set, version

S = VersionState
NOW = T0


def fill(tx: WriteTx) -> None:
    """Add one entity of each kind, with the builders' ids."""
    tx.add(key_set())
    tx.add(key())
    tx.add(
        version(
            1,
            S.ACTIVE,
            breaches=(Breach("I1", at(1), "emergency", "alice"),),
            evidence={"attributes": {"CKA_LOCAL": True}},
        )
    )
    tx.add(external())
    tx.add(Client(Id("client-1"), "issuer", NOW))
    tx.add(Token(Id("token-1"), Id("client-1"), "ab" * 32, NOW, at(60)))
    tx.add(Grant(Id("grant-1"), Id("client-1"), "signer", NOW, Id("set-1"), Id("key-1")))
    tx.add(Worker(Id("worker-1"), "node", 7, 10, NOW, NOW))
    tx.add(Intent(Id("intent-1"), IntentKind.GENERATE, Id("version-1"), "softhsm", "kj-1", IntentState.DONE, NOW, NOW))


OTHER = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "another"}


def thumbprint(holder: KeyVersion | ExternalKey) -> str:
    assert holder.public_jwk is not None
    return jose.thumbprint(holder.public_jwk)


class StoreContract:
    """Adopt by subclassing with a fixture `url`."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        made = Store(url, wall=lambda: NOW)
        made.upgrade()
        yield made
        made.dispose()

    @pytest.fixture
    def filled(self, store: Store) -> Store:
        with store.write() as tx:
            fill(tx)
        return store

    # --- idempotency records

    def test_idempotency_records_are_found_until_they_expire_and_are_removed_then(self, filled: Store) -> None:
        def record(key: str, expires_at: Instant) -> IdempotencyRecord:
            return IdempotencyRecord(Id(f"r-{key}"), Id("client-1"), key, "cd" * 32, Id("set-1"), NOW, expires_at)

        kept = record("kept", at(60))
        with filled.write() as tx:
            tx.add(kept)
            tx.add(record("over", Instant(1)))
        assert tx.committed_epoch is None, "no snapshot holds them"
        with filled.write() as tx:
            assert tx.has_expired_idempotency_records()
            assert tx.idempotency_record(Id("client-1"), "over") is None
            assert tx.idempotency_record(Id("other"), "kept") is None
            tx.remove_expired_idempotency_records()
        with filled.read() as reading:
            assert not reading.has_expired_idempotency_records()
            assert reading.idempotency_record(Id("client-1"), "kept") == kept
        with pytest.raises(errors.Conflict), filled.write() as tx:
            tx.add(replace(kept, id=Id("r-2")))

    # --- values

    def test_every_entity_is_read_as_it_was_written(self, filled: Store) -> None:
        with filled.read() as tx:
            assert tx.key_set("main") == tx.key_set_by_id(Id("set-1")) == key_set()
            assert tx.key(Id("set-1"), "default") == tx.key_by_id(Id("key-1")) == key()
            found = tx.version(Id("version-1"))
            assert found == tx.version_by_kid(Id("set-1"), "kid-1") == tx.version_by_number(Id("key-1"), 1)
            assert found is not None
            assert found.breaches == (Breach("I1", at(1), "emergency", "alice"),)
            assert found.evidence == {"attributes": {"CKA_LOCAL": True}}
            assert tx.external_key(Id("set-1"), "old") == external()
            assert tx.client("issuer") == tx.client_by_id(Id("client-1"))
            assert tx.token(Id("token-1")) == tx.token_by_sha256("ab" * 32)
            assert tx.grants(Id("client-1")) == [tx.grant(Id("grant-1"))]
            assert [w.confirmed for w in tx.workers()] == [None]
            assert tx.intents(states={IntentState.DONE}) == [tx.intent(Id("intent-1"))]
            assert tx.kid_binding(Id("set-1"), "kid-1") == thumbprint(version(1, S.ACTIVE))
            assert tx.kid_binding(Id("set-1"), "old") == thumbprint(external())

    def test_finders_return_none_for_what_is_not_in_the_registry(self, store: Store) -> None:
        nobody = Id("nobody")
        with store.read() as tx:
            found: list[Any] = [tx.key_set("x"), tx.key_set_by_id(nobody), tx.key(nobody, "x"), tx.key_by_id(nobody)]
            found += [tx.version(nobody), tx.version_by_kid(nobody, "x"), tx.version_by_number(nobody, 1)]
            found += [
                tx.external_key(nobody, "x"),
                tx.kid_binding(nobody, "x"),
                tx.client("x"),
                tx.client_by_id(nobody),
            ]
            found += [tx.token(nobody), tx.token_by_sha256("x"), tx.grant(nobody), tx.worker(nobody), tx.intent(nobody)]
            found += [tx.custodian_lease()]
        assert found == [None] * len(found)

    def test_names_and_kids_are_compared_byte_by_byte(self, filled: Store) -> None:
        with filled.read() as tx:
            assert tx.key_set("MAIN") is None
            assert tx.version_by_kid(Id("set-1"), "KID-1") is None

    def test_lists_are_filtered_and_paged_in_the_order_of_creation(self, filled: Store) -> None:
        with filled.write() as tx:
            for number in (2, 3, 4):
                tx.add(version(number, S.PUBLISHED))
        with filled.read() as tx:
            assert [v.number for v in tx.versions(key_id=Id("key-1"))] == [1, 2, 3, 4]
            assert [v.number for v in tx.versions(states={S.ACTIVE})] == [1]
            assert tx.versions(states=set()) == []
            assert tx.versions(key_set_id=Id("other")) == []
            page = tx.versions(limit=2)
            assert [v.number for v in page] == [1, 2]
            assert [v.number for v in tx.versions(after=page[-1].id, limit=9)] == [3, 4]

    def test_a_worker_s_confirmation_is_kept(self, filled: Store) -> None:
        with filled.write() as tx:
            row = tx.worker(Id("worker-1"))
            assert row is not None
            tx.save(replace(row, confirmed=tx.epoch()))
        with filled.read() as tx:
            row = tx.worker(Id("worker-1"))
            assert row is not None
            assert row.confirmed == tx.epoch()

    def test_lists_leave_out_deleted_entities_unless_asked(self, filled: Store) -> None:
        with filled.write() as tx:
            tx.save(replace(external(), removed_at=NOW))
            for found in (tx.grant(Id("grant-1")), tx.client("issuer")):
                assert found is not None
                tx.save(replace(found, deleted_at=NOW))
            worker = tx.worker(Id("worker-1"))
            assert worker is not None
            tx.save(replace(worker, stopped_at=NOW, stop_reason="stopped"))
        with filled.read() as reading:
            assert reading.external_key(Id("set-1"), "old") is None
            assert reading.client("issuer") is None
            left: list[Any] = [reading.external_keys(), reading.grants(), reading.clients(), reading.workers()]
            assert left == [[], [], [], []]
            assert len(reading.external_keys(Id("set-1"), include_removed=True)) == 1
            assert [reading.count_removed_external_keys(Id(name)) for name in ("set-1", "set-2")] == [1, 0]
            assert len(reading.grants(include_deleted=True)) == len(reading.workers(include_stopped=True)) == 1
            assert reading.client_by_id(Id("client-1")) is not None
            assert reading.kid_binding(Id("set-1"), "old") == thumbprint(external())
            assert reading.contents().tokens == tuple(reading.tokens(Id("client-1")))

    def test_lists_are_filtered_by_owner(self, filled: Store) -> None:
        other = Id("other")
        with filled.read() as tx:
            assert len(tx.keys(Id("set-1"))) == len(tx.tokens(Id("client-1"))) == 1
            assert len(tx.intents(version_id=Id("version-1"))) == 1
            assert [tx.keys(other), tx.tokens(other), tx.intents(version_id=other), tx.external_keys(other)] == [[]] * 4
            assert tx.intents(states={IntentState.PENDING}) == []

    # --- refusals

    def test_names_are_taken_for_ever(self, filled: Store) -> None:
        with filled.write() as tx:
            client = tx.client("issuer")
            assert client is not None
            tx.save(replace(client, deleted_at=NOW))
        for thing in (
            key_set(id=Id("set-2"), issuer="https://other.example"),
            key(id=Id("key-2")),
            Client(Id("client-2"), "issuer", NOW),
        ):
            with pytest.raises(errors.NameTaken), filled.write() as tx:
                tx.add(thing)

    def test_a_deleted_key_or_key_set_leaves_a_tombstone_and_its_name(self, filled: Store) -> None:
        """A retired one keeps its name."""
        with filled.write() as tx:
            old_set, old_key = tx.key_set_by_id(Id("set-1")), tx.key_by_id(Id("key-1"))
            assert old_set is not None
            assert old_key is not None
            tx.save(replace(old_key, retired_at=NOW))
            tx.save(replace(old_set, retired_at=NOW))
        for thing in (key_set(id=Id("set-2"), issuer="https://other.example"), key(id=Id("key-2"))):
            with pytest.raises(errors.NameTaken), filled.write() as tx:
                tx.add(thing)
        with filled.write() as tx:
            tx.save(replace(old_key, deleted_at=NOW))
            tx.save(replace(old_set, deleted_at=NOW))
        with filled.read() as reading:
            assert (reading.key_set(old_set.name), reading.key(old_set.id, old_key.name)) == (None, None)
            assert (reading.key_sets(), reading.keys(), reading.keys(old_set.id)) == ([], [], [])
            assert (reading.contents().key_sets, reading.contents().keys) == ((), ())
            assert reading.key_set_by_id(old_set.id) == replace(old_set, deleted_at=NOW)
            assert reading.key_by_id(old_key.id) == replace(old_key, deleted_at=NOW)
        with filled.write() as tx:
            tx.add(key_set(id=Id("set-2")))
            tx.add(key(id=Id("key-2"), key_set_id=Id("set-2")))
            again = tx.key_set(old_set.name)
            assert again is not None
            assert again.id == "set-2"
        for same, error in (
            (key_set(id=Id("set-3")), errors.Conflict),
            (key(id=Id("key-3"), key_set_id=Id("set-2")), errors.NameTaken),
        ):
            with pytest.raises(error), filled.write() as tx:
                tx.add(same)

    def test_a_kid_is_never_bound_to_another_key_of_its_set(self, filled: Store) -> None:
        with filled.write() as tx:
            tx.save(replace(external(), removed_at=NOW))
        for thing in (
            version(2, S.PUBLISHED, kid="old"),
            external(id=Id("external-2"), kid="kid-1"),
            external(id=Id("external-2"), public_jwk=OTHER),
        ):
            with pytest.raises(errors.KidTaken), filled.write() as tx:
                tx.add(thing)
        with filled.write() as tx:
            tx.add(version(2, S.CREATING, kid=None, ref=None, public_jwk=None))
        with pytest.raises(errors.KidTaken), filled.write() as tx:
            tx.save(version(2, S.CREATING, kid="kid-1"))

    def test_an_identical_external_key_comes_back_once_it_was_removed(self, filled: Store) -> None:
        again = external(id=Id("external-2"), created_at=at(1))
        with pytest.raises(errors.KidTaken), filled.write() as tx:
            tx.add(again)
        with filled.write() as tx:
            tx.save(replace(external(), removed_at=NOW))
            tx.add(again)
        with filled.read() as reading:
            assert reading.external_keys() == [again]
            assert reading.external_key(Id("set-1"), "old") == again

    def test_another_set_may_have_the_same_foreign_kid_and_no_generated_one(self, filled: Store) -> None:
        adopted: dict[str, Any] = {"key_set_id": Id("set-2"), "key_id": Id("key-2"), "origin": Origin.ADOPTED}
        with filled.write() as tx:
            tx.add(key_set(id=Id("set-2"), name="other", issuer="https://other.example"))
            tx.add(key(id=Id("key-2"), key_set_id=Id("set-2")))
            tx.add(external(id=Id("external-2"), key_set_id=Id("set-2"), public_jwk=OTHER))
            tx.add(version(2, S.ACTIVE, kid="theirs", **adopted))
            tx.add(version(3, S.PUBLISHED, kid="theirs", origin=Origin.ADOPTED))
        for thing in (
            external(id=Id("external-3"), key_set_id=Id("set-2"), kid="kid-1"),
            version(4, S.PUBLISHED, kid="kid-1", **adopted),
            version(5, S.PUBLISHED, kid="theirs"),
            version(6, S.PUBLISHED, kid="old", key_set_id=Id("set-2"), key_id=Id("key-2")),
        ):
            with pytest.raises(errors.KidTaken), filled.write() as tx:
                tx.add(thing)
        with filled.read() as reading:
            kids = {s: reading.kid_binding(Id(s), "theirs") for s in ("set-1", "set-2")}
            assert kids == {n: thumbprint(version(i, S.ACTIVE)) for n, i in (("set-1", 3), ("set-2", 2))}
            numbers = [v.number for s in kids if (v := reading.version_by_kid(Id(s), "theirs"))]
            assert numbers == [3, 2]

    def test_holders_of_a_public_key_are_found_in_every_set(self, filled: Store) -> None:
        shared = version(1, S.ACTIVE).public_jwk
        assert shared is not None
        with filled.write() as tx:
            tx.add(key_set(id=Id("set-2"), name="other", issuer="https://other.example"))
            tx.add(external(id=Id("external-2"), key_set_id=Id("set-2"), kid="copy", public_jwk=shared))
        with filled.read() as reading:
            assert [v.number for v in reading.versions(public_jwk=shared)] == [1]
            assert [e.kid for e in reading.external_keys(public_jwk=shared)] == ["copy"]
            assert reading.external_keys(Id("set-1"), public_jwk=shared) == []
            assert reading.versions(public_jwk=OTHER) == []
            assert reading.shared_keys([shared, OTHER, external().public_jwk]) == {jose.thumbprint(shared)}

    def test_a_kid_that_a_version_gains_is_bound_to_it(self, filled: Store) -> None:
        with filled.write() as tx:
            tx.add(version(2, S.CREATING, kid=None, ref=None, public_jwk=None))
        with filled.write() as tx:
            tx.save(version(2, S.PUBLISHED))
            assert tx.kid_binding(Id("set-1"), "kid-2") == thumbprint(version(2, S.PUBLISHED))
        with pytest.raises(errors.KidTaken), filled.write() as tx:
            tx.add(external(id=Id("external-2"), kid="kid-2"))
        with filled.write() as tx:
            tx.save(version(2, S.DESTROYED))
        with pytest.raises(errors.KidTaken), filled.write() as tx:
            tx.add(external(id=Id("external-2"), kid="kid-2"))

    def test_a_bound_kid_stays_on_its_key(self, filled: Store) -> None:
        for kid in ("another", None):
            with pytest.raises(errors.InternalError), filled.write() as tx:
                tx.save(version(1, S.ACTIVE, kid=kid))
        with pytest.raises(errors.InternalError), filled.write() as tx:
            tx.save(version(1, S.ACTIVE, public_jwk=OTHER))
        with filled.read() as reading:
            assert reading.version_by_kid(Id("set-1"), "kid-1") == reading.version(Id("version-1"))

    def test_an_entity_that_was_not_added_cannot_be_saved(self, store: Store) -> None:
        with pytest.raises(errors.InternalError), store.write() as tx:
            tx.save(key_set())

    @pytest.mark.parametrize(
        ("refused", "error"),
        [
            (version(2, S.PUBLISHED, kid="kid-1"), errors.KidTaken),
            (version(2, S.ACTIVE, kid="free"), errors.TransitionRefused),
            (version(1, S.PUBLISHED, id=Id("version-2"), kid="free"), errors.Conflict),
            (external(id=Id("external-2"), kid="kid-1"), errors.KidTaken),
            (key_set(id=Id("set-2"), issuer="https://other.example"), errors.NameTaken),
            (key_set(id=Id("set-2"), name="other"), errors.IssuerTaken),
            (Token(Id("token-2"), Id("client-1"), "ab" * 32, NOW, NOW), errors.Conflict),
        ],
    )
    def test_a_transaction_continues_after_a_caught_refusal_which_writes_nothing(
        self, filled: Store, refused: Any, error: type[errors.Error]
    ) -> None:
        with filled.read() as reading:
            before = reading.contents()
        with filled.write() as tx:
            with pytest.raises(error):
                tx.add(refused)
            tx.add(Client(Id("client-9"), "after", NOW))
        with filled.read() as reading:
            after = reading.contents()
            assert reading.kid_binding(Id("set-1"), "free") is None
        assert after.epoch.counter == before.epoch.counter + 1
        assert {c.name for c in after.clients} == {"issuer", "after"}
        assert replace(after, epoch=before.epoch, now=before.now, clients=before.clients) == before

    def test_one_version_of_a_key_is_active(self, filled: Store) -> None:
        with pytest.raises(errors.TransitionRefused), filled.write() as tx:
            tx.add(version(2, S.ACTIVE))
        with filled.write() as tx:
            tx.add(version(2, S.PUBLISHED))
        with pytest.raises(errors.TransitionRefused), filled.write() as tx:
            tx.save(version(2, S.ACTIVE))

    def test_a_row_needs_what_it_refers_to(self, store: Store) -> None:
        with pytest.raises(errors.Conflict), store.write() as tx:
            tx.add(key())

    def test_a_refused_or_broken_transaction_leaves_nothing(self, store: Store) -> None:
        def broken(error: type[Exception]) -> None:
            with store.write() as tx:
                fill(tx)
                if error is ZeroDivisionError:
                    raise error
                tx.add(key_set(id=Id("set-2"), issuer="https://other.example"))

        for error in (ZeroDivisionError, errors.NameTaken):
            with pytest.raises(error):
                broken(error)
        with store.read() as tx:
            assert tx.contents().key_sets == ()
            assert tx.workers(include_stopped=True) == []
            assert tx.epoch().counter == 1

    # --- the epoch

    def test_the_epoch_grows_by_one_with_what_a_snapshot_holds(self, store: Store) -> None:
        with store.write() as tx:
            expected = tx.next_epoch()
            fill(tx)
        assert tx.committed_epoch == expected
        assert store.poll()[0] == expected

    @pytest.mark.parametrize(
        "change",
        [
            lambda tx: tx.save(replace(tx.token("token-1"), last_used_at=at(5))),
            lambda tx: tx.save(replace(tx.worker("worker-1"), heartbeat_at=at(5))),
            lambda tx: tx.save(replace(tx.intent("intent-1"), error="x")),
            lambda tx: tx.save(replace(tx.key_set("main"), revision=2, updated_at=at(5))),
            lambda tx: tx.save(replace(tx.version("version-1"), destroy_at=at(5), evidence={})),
            lambda tx: tx.save(tx.version("version-1")),
            lambda tx: tx.add(version(2, S.CREATING, kid=None, ref=None, public_jwk=None)),
            lambda tx: tx.set_custodian_lease(CustodianLease(1, "h", "n", NOW, NOW)),
        ],
    )
    def test_other_changes_do_not_move_the_epoch(self, filled: Store, change: Any) -> None:
        before, _ = filled.poll()
        with filled.write() as tx:
            change(tx)
        assert tx.committed_epoch is None
        assert filled.poll()[0] == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda tx: tx.save(replace(tx.token("token-1"), revoked_at=at(5))),
            lambda tx: tx.save(replace(tx.grant("grant-1"), deleted_at=at(5))),
            lambda tx: tx.save(replace(tx.client("issuer"), deleted_at=at(5))),
            lambda tx: tx.save(replace(tx.key_by_id("key-1"), disabled_at=at(5))),
            lambda tx: tx.save(replace(tx.key_set("main"), cache_lifetime=60)),
            lambda tx: tx.save(replace(tx.version("version-1"), state=S.REVOKED, revoked_at=at(5))),
            lambda tx: tx.save(replace(tx.version("version-1"), visible_since=at(5))),
            lambda tx: tx.save(replace(external(), removed_at=at(5))),
            lambda tx: tx.new_incarnation(),
        ],
    )
    def test_changes_of_what_a_snapshot_holds_move_the_epoch(self, filled: Store, change: Any) -> None:
        with filled.read() as reading:
            before = reading.contents()
        with filled.write() as tx:
            change(tx)
        with filled.read() as reading:
            after = reading.contents()
        assert after.epoch != before.epoch
        assert tx.committed_epoch == after.epoch

    def test_a_change_that_is_reverted_does_not_move_the_epoch(self, filled: Store) -> None:
        with filled.write() as tx:
            client = tx.client("issuer")
            assert client is not None
            tx.save(replace(client, deleted_at=NOW))
            tx.save(client)
        assert tx.committed_epoch is None
        assert filled.poll()[0].counter == 2

    def test_a_version_is_published_with_the_epoch_that_shows_it(self, filled: Store) -> None:
        with filled.write() as tx:
            tx.add(version(2, S.PUBLISHED, published_epoch=tx.next_epoch().counter))
        with filled.read() as reading:
            found = reading.version(Id("version-2"))
        assert found is not None
        assert tx.committed_epoch is not None
        assert found.published_epoch == tx.committed_epoch.counter == filled.poll()[0].counter

    def test_a_transaction_that_fails_has_no_epoch(self, filled: Store) -> None:
        with contextlib.suppress(ZeroDivisionError), filled.write() as tx:
            tx.add(Client(Id("client-9"), "never", NOW))
            raise ZeroDivisionError
        assert tx.committed_epoch is None

    def test_any_history_obeys_the_rule(self, store: Store) -> None:
        # Not shrunk: that takes minutes on a real database, and a history is short enough to read.
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(histories)
        def play(transactions: list[Transaction]) -> None:
            history = History(store)
            for transaction in transactions:
                history.play(transaction)

        play()

    def test_the_contents_are_what_a_snapshot_holds(self, filled: Store) -> None:
        with filled.write() as tx:
            for number, state in enumerate((S.CREATING, S.PUBLISHED, S.RETIRING, S.RETIRED, S.DESTROYED), 2):
                tx.add(version(number, state))
            tx.add(version(9, S.REVOKED, revoked_at=at(1)))
            tx.add(version(8, S.DESTROYED, revoked_at=at(1)))
            tx.add(version(7, S.CREATING, revoked_at=at(1)))
        with filled.read() as reading:
            contents = reading.contents()
            everything = reading.versions()
        assert [v.number for v in contents.versions] == [1, 3, 4, 8, 9]
        assert [v.id for v in contents.versions] == [v.id for v in everything if snapshot_view(v) is not None]

    # --- concurrency

    def test_writers_wait_for_each_other(self, store: Store) -> None:
        def write(number: int) -> None:
            with store.write() as tx:
                tx.add(Client(new_id(), f"client-{number}", NOW))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(40)))
        assert store.poll()[0].counter == 41

    def test_processes_wait_for_each_other_and_share_no_connection(self, store: Store) -> None:
        store.poll()
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_write_many, args=(store, number)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
        assert store.poll()[0].counter == 41

    def test_a_reader_sees_one_moment(self, filled: Store) -> None:
        with filled.read() as reading:
            before = reading.epoch()
            with filled.write() as tx:
                tx.add(Client(new_id(), "late", NOW))
            assert reading.epoch() == before
            assert reading.client("late") is None

    @pytest.mark.parametrize("grace", [0.0, 0.004, 0.02])
    def test_what_was_committed_survives_a_kill_and_what_was_not_leaves_no_half(
        self, store: Store, grace: float
    ) -> None:
        reader, writer = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(store, writer))
        process.start()
        os.close(writer)
        answered = len(os.read(reader, 1))
        process.join(grace)
        process.kill()
        process.join(30)
        while got := os.read(reader, 4096):
            answered += len(got)
        os.close(reader)
        with store.read() as reading:
            clients, grants = reading.clients(), reading.grants()
        assert len(clients) in (answered, answered + 1)
        assert {g.client_id for g in grants} == {c.id for c in clients}
        assert store.poll()[0].counter == 1 + len(clients)

    def test_a_writer_that_is_killed_leaves_nothing(self, store: Store) -> None:
        process = multiprocessing.get_context("fork").Process(target=_die_in_the_midst, args=(store,))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        with store.write() as tx:
            assert tx.client("half") is None
            tx.add(Client(new_id(), "whole", NOW))

    # --- the history

    @pytest.mark.parametrize(
        ("known", "refusal"),
        [
            (lambda past: None, None),
            (lambda past: past[6], None),
            (lambda past: past[5], None),
            (lambda past: past[2], None),
            (lambda past: Epoch("lost", 9, "aa"), None),
            (lambda past: Epoch("lost", 3, "aa"), None),
            (lambda past: Epoch("lost", 10, "aa"), "had confirmed epoch 9. This node had confirmed epoch 10"),
            (lambda past: Epoch("never-seen", 2, "aa"), "another one"),
            (lambda past: replace(past[6], link="aa"), "went back and was changed again"),
            (lambda past: replace(past[5], link="aa"), "went back and was changed again"),
            (lambda past: replace(past[3], link="aa"), "had confirmed no epoch of this node's incarnation"),
            (lambda past: Epoch(past[6].incarnation, 7, "aa"), "went back from epoch 7 to 6"),
            (lambda past: Epoch(past[2].incarnation, 7, past[2].link), "had confirmed no epoch of this node's"),
        ],
    )
    def test_a_registry_that_lacks_what_a_node_has_confirmed_is_refused(
        self, store: Store, known: Any, refusal: str | None
    ) -> None:
        """Epochs 1 to 4 are of the first incarnation; the second one superseded epoch 9 of another one."""
        for _ in range(3):
            change(store)
        with store.write() as tx:
            tx.new_incarnation(Epoch("lost", 9, "aa"))
        change(store)
        with store.read() as reading:
            past = {counter: reading.past_epoch(counter) for counter in range(1, 7)}
        now, _ = store.poll()
        assert now.is_same(past[6])
        assert len({epoch.link for epoch in past.values() if epoch is not None}) == 6
        store.known_epoch = lambda: known(past)

        def look() -> None:
            with store.read() as tx:
                tx.require_known_history()

        if refusal is None:
            look()
            change(store)
            return
        for use in (look, lambda: change(store)):
            with pytest.raises(errors.RegistryRolledBack, match=refusal) as refused:
                use()
            assert "db restored" in refused.value.next_step
        with store.read() as reading:
            assert reading.epoch().is_same(now), "a read that does not ask is let in, and nothing was changed"

    # --- the custodian's lease

    def test_a_term_never_decreases(self, store: Store) -> None:
        lease = CustodianLease(5, "holder", "node", NOW, Instant(NOW + SECOND))
        with store.write() as tx:
            tx.set_custodian_lease(lease)
        with store.read() as reading:
            assert reading.custodian_lease() == lease
        with pytest.raises(errors.InternalError), store.write() as tx:
            tx.set_custodian_lease(replace(lease, term=4))

    def test_two_registries_are_two_installations(self, store: Store) -> None:
        with store.read() as reading:
            assert len(reading.installation().id) == 8
            assert reading.epoch() == Epoch(reading.epoch().incarnation, 1)

    def test_an_upgrade_of_what_is_up_to_date_changes_nothing(self, filled: Store) -> None:
        with filled.read() as reading:
            before = (reading.installation(), replace(reading.contents(), now=NOW))
        filled.upgrade()
        filled.check_schema()
        with filled.read() as reading:
            assert (reading.installation(), replace(reading.contents(), now=NOW)) == before


def change(store: Store) -> None:
    """A change that moves the epoch."""
    with store.write() as tx:
        tx.add(Client(new_id(), new_id(), NOW))


def _write_many(store: Store, number: int) -> None:
    for step in range(10):
        with store.write() as tx:
            tx.add(Client(new_id(), f"client-{number}-{step}", NOW))
    store.dispose()


def _write_for_ever(store: Store, answers: int) -> None:
    while True:
        client = Client(new_id(), new_id(), NOW)
        with store.write() as tx:
            tx.add(client)
            tx.add(Grant(new_id(), client.id, "signer", NOW))
        os.write(answers, b".")


def _die_in_the_midst(store: Store) -> None:
    with store.write() as tx:
        tx.add(Client(new_id(), "half", NOW))
        os.kill(os.getpid(), signal.SIGKILL)
