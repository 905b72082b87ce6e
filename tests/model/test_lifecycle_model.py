"""Random histories of an installation: whatever people, modules, clocks and crashes do, the promises hold.

Two nodes, real use cases, workers and custodians in virtual time (`tests/simulation`), judged by an oracle that knows
the promises and not the code. 100 histories; 10,000 with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kms_jwks import errors, timeline, wire
from kms_jwks.custodian import transitions
from kms_jwks.custodian.loop import plan_of
from kms_jwks.doctor import find_orphans
from kms_jwks.model import DAY, SECOND, KeyVersion, VersionState
from kms_jwks.service.signing_job import SigningOperation
from kms_jwks.times import to_datetime
from tests.simulation.oracle import DRIFT, Broken, Oracle, hold
from tests.simulation.plant import Crash, Node, Plant, SimWorker, simulated

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
HISTORIES = 10_000 if LONG else 100
STEPS = 30
S = VersionState
HASTY = {
    "rotate_every": 40_000,
    "publish_lead": 7200,
    "max_token_ttl": 600,
    "clock_skew": 2 * DRIFT,
    "handover": 30,
    "destroy_after": 7 * DAY,
}
"""Everything as short as is safe, so that a short history sees several rotations."""
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"rotate_every": 20_000},
    {"publish_lead": 20_000, "rotate_every": 50_000},
    {"publish_lead": 300, "allow_unsafe_publish_lead": True},
    {"max_token_ttl": 20_000},
    {"max_token_ttl": 60},
    {"handover": 0},
    {"handover": 600},
    {"clock_skew": 600},
    {"rotate_window": "mon-thu 09:00-16:00"},
    {"rotate_jitter": 0},
)
numbers = st.integers(0, 9)
played: Counter[str] = Counter()
"""What the histories of this process came to."""


class Histories(RuleBasedStateMachine):
    """One installation with one key set, its operators and its callers."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.backup: Any = None
        self.retired: set[str] = set()
        """Names of keys whose retirement was answered."""
        self.before_last_change: Any = None
        self.rollbacks = 0
        self.destroyed_since: set[str] = set()
        """Pairs that a restored registry knows and the module does not: they were destroyed after the backup."""

    @initialize(
        keys=st.integers(1, 3), existing=st.booleans(), seed=st.integers(0, 999), lease=st.sampled_from([1, 10, 60])
    )
    def begin(self, keys: int, existing: bool, seed: int, lease: int) -> None:
        self.plant: Plant = self.stack.enter_context(simulated(seed, nodes=2, workers=1, lease=lease))
        self.oracle = Oracle(self.plant)
        self.plant.on_commit.append(self.remember)
        wanted = [{"name": f"k{n}", "alg": "EdDSA", "policy": HASTY} for n in range(keys)]
        self.plant.create(*wanted, existing_issuer=existing)

    def teardown(self) -> None:
        try:
            if hasattr(self, "oracle"):
                self.everything_heals_and_nothing_is_lost()
                played.update(
                    histories=1,
                    rotations=sum(1 for v in self.plant.versions() if v.deactivated_at is not None),
                    documents=self.oracle.documents,
                    signers=self.oracle.possible,
                    rollbacks=self.rollbacks,
                )
        finally:
            self.stack.close()

    # --- who acts

    def node(self, number: int) -> Node:
        return self.plant.nodes[number % len(self.plant.nodes)]

    def worker(self, number: int) -> SimWorker | None:
        workers = self.plant.workers
        return workers[number % len(workers)] if workers else None

    def ask(self, call: Callable[[SimWorker], object], *, bomb: int = 0) -> bool:
        """One call of the control plane; what is refused is refused. Whether it was answered with success."""
        worker = self.plant.api()
        if worker is None:
            return False
        worker.bomb.left = bomb
        try:
            call(worker)
        except errors.Error:
            return False
        except Crash:
            worker.die()
            return False
        finally:
            worker.bomb.left = 0
        return True

    def key_names(self) -> list[str]:
        with self.plant.view.registry_view() as tx:
            return [key.name for key in tx.keys(None)]

    def a_key(self, number: int) -> str:
        names = self.key_names()
        return names[number % len(names)]

    def a_version(self, number: int) -> tuple[str, KeyVersion] | None:
        versions = self.plant.versions()
        if not versions:
            return None
        version = versions[-1 - number % len(versions)]
        with self.plant.view.registry_view() as tx:
            key = tx.key_by_id(version.key_id)
        assert key is not None
        return key.name, version

    # --- time

    @rule(seconds=st.sampled_from([0.01, 0.3, 1, 4, 11, 59, 61]))
    def nobody_does_anything(self, seconds: float) -> None:
        self.plant.pass_(seconds)

    @rule(seconds=st.sampled_from([60, 700, 3700, 7300, 21_000, 41_000, 3 * DAY, 8 * DAY]))
    def time_passes(self, seconds: float) -> None:
        self.plant.advance(seconds)

    @rule(early=st.sampled_from([0, 0, 1]))
    def time_passes_until_something_is_due(self, early: int) -> None:
        """The sharpest moment: what a planner does too early, it does right then."""
        self.to_the_next_step(early)

    @rule(steps=st.integers(2, 8))
    def all_is_well_for_a_while(self, steps: int) -> None:
        self.heal()
        self.plant.settle()
        for _ in range(steps):
            self.to_the_next_step()

    def to_the_next_step(self, early: int = 0) -> None:
        with self.plant.view.registry_view() as tx:
            key_set, now = tx.key_set("main"), tx.now()
            assert key_set is not None
            due = [s.due for s in plan_of(tx, key_set, now) if s.due is not None and s.due > now]
        if due:
            self.plant.advance((min(due) - now) / SECOND - early)

    @rule(number=numbers)
    def a_worker_polls(self, number: int) -> None:
        worker = self.worker(number)
        if worker is not None:
            worker.poll()
            self.oracle.look()

    @rule(number=numbers)
    def a_custodian_ticks(self, number: int) -> None:
        self.plant.tick(self.node(number))
        self.oracle.look()

    @rule(step=st.integers(-DRIFT, DRIFT))
    def the_registrys_clock_steps(self, step: int) -> None:
        self.oracle.look()
        self.plant.step = step * SECOND

    # --- people

    @rule(number=numbers, bomb=st.integers(0, 6))
    def somebody_rotates(self, number: int, bomb: int) -> None:
        self.ask(lambda w: w.keys.rotate(self.plant.who, "main", self.a_key(number), wire.RotateRequest()), bomb=bomb)

    @rule(number=numbers, bomb=st.integers(0, 9))
    def somebody_revokes(self, number: int, bomb: int) -> None:
        found = self.a_version(number)
        if found is None:
            return
        key, version = found

        def revoke(worker: SimWorker) -> None:
            worker.revocation.revoke_version(self.plant.who, "main", key, str(version.number), wire.RevokeRequest())
            assert version.kid is not None
            self.oracle.revoked(version.kid)

        self.ask(revoke, bomb=bomb)
        self.oracle.look()

    @rule(number=numbers)
    def somebody_disables(self, number: int) -> None:
        key = self.a_key(number)
        if self.ask(lambda w: w.keys.disable(self.plant.who, "main", key)):
            self.oracle.disabled.add(key)

    @rule(number=numbers)
    def somebody_enables(self, number: int) -> None:
        key = self.a_key(number)
        self.oracle.disabled -= {key} - self.retired
        self.ask(lambda w: w.keys.enable(self.plant.who, "main", key))

    @rule(number=numbers, policy=st.sampled_from(POLICIES), hold=st.sampled_from([None, None, 30_000]))
    def somebody_edits_the_policy(self, number: int, policy: dict[str, Any], hold: int | None) -> None:
        until = None if hold is None else to_datetime(timeline.later(self.plant.wall(), hold))  # type: ignore[arg-type]
        fields = wire.convert(HASTY | policy, wire.PolicyFields)
        patch = wire.KeyPatch(policy=msgspec.structs.replace(fields, hold_until=until))

        def edit(worker: SimWorker) -> None:
            found = worker.keys.get(self.plant.who, "main", self.a_key(number))
            worker.keys.patch(self.plant.who, "main", found.name, patch, found.revision)

        self.ask(edit)

    @rule(number=numbers, redate=st.booleans())
    def somebody_redates_a_destruction(self, number: int, redate: bool) -> None:
        found = self.a_version(number)
        if found is None:
            return
        where = (self.plant.who, "main", found[0], str(found[1].number))
        if redate:
            self.ask(lambda w: w.versions.destroy(*where, wire.DestroyRequest()))
        else:
            self.ask(lambda w: w.versions.cancel_destroy(*where))

    @rule(number=numbers, bomb=st.integers(0, 4))
    def somebody_creates_a_key(self, number: int, bomb: int) -> None:
        request = wire.convert({"name": f"x{number}", "alg": "EdDSA", "policy": HASTY}, wire.KeyCreate)
        self.ask(lambda w: w.keys.create(self.plant.who, "main", request), bomb=bomb)

    @rule(number=numbers, bomb=st.integers(0, 6))
    def somebody_deletes_a_key(self, number: int, bomb: int) -> None:
        self.ask(lambda w: w.keys.delete(self.plant.who, "main", self.a_key(number)), bomb=bomb)

    @rule(number=numbers, bomb=st.integers(0, 6))
    def somebody_retires_a_key(self, number: int, bomb: int) -> None:
        key = self.a_key(number)
        if key != "k0" and self.ask(lambda w: w.keys.retire(self.plant.who, "main", key), bomb=bomb):
            self.retired.add(key)
            self.oracle.disabled.add(key)
        self.oracle.look()

    # --- what breaks

    @rule(number=numbers, bomb=st.integers(1, 25))
    def a_custodian_crashes_on_its_way(self, number: int, bomb: int) -> None:
        node = self.node(number)
        node.bomb.left = bomb
        for _ in range(3):
            self.plant.tick(node)
        node.bomb.left = 0
        self.oracle.look()

    @rule(number=numbers)
    def a_worker_dies(self, number: int) -> None:
        worker = self.worker(number)
        if worker is not None:
            worker.die()

    @rule(number=numbers)
    def a_node_goes_down_or_comes_back(self, number: int) -> None:
        node = self.node(number)
        node.down = not node.down
        for worker in node.workers:
            worker.die()
        if not node.down:
            node.custodian = node.new_custodian()

    @rule(number=numbers)
    def a_worker_starts(self, number: int) -> None:
        node = self.node(number)
        if not node.down and sum(w.alive for w in node.workers) < 3:
            node.add_worker().poll()
            self.oracle.look()

    @rule()
    def somebody_forgets_workers_that_are_gone(self) -> None:
        gone = [w for node in self.plant.nodes for w in node.workers if not w.alive and not w.forgotten]
        for worker in gone:
            found = worker.sync.worker_id
            if found is not None and self.ask(lambda w, i=found: w.operation.forget(self.plant.who, i)):  # type: ignore[misc]
                worker.forgotten = True

    @rule(number=numbers)
    def a_node_is_cut_off_or_not(self, number: int) -> None:
        node = self.node(number)
        node.cut = not node.cut

    @rule()
    def the_registry_goes_away_or_comes_back(self) -> None:
        self.plant.registry_down = not self.plant.registry_down

    @rule()
    def the_module_goes_away_or_comes_back(self) -> None:
        away = self.plant.backend.fail is None
        self.plant.backend.fail = errors.BackendUnavailable("away", retry_after=5) if away else None

    @rule()
    def the_module_declines_new_pairs_or_not(self) -> None:
        self.plant.backend.offered = frozenset() if self.plant.backend.offered else frozenset({"EdDSA"})

    @rule()
    def a_backup_is_made(self) -> None:
        self.backup = self.plant.registry.committed

    @precondition(lambda self: self.backup is not None)
    @rule()
    def the_backup_is_restored(self) -> None:
        # As the manual says: with every node stopped.
        for node in self.plant.nodes:
            for worker in node.workers:
                worker.die()
            node.custodian = node.new_custodian()
        self.plant.registry._committed = self.backup  # type: ignore[attr-defined]
        store = self.node(0).store()
        store.away = lambda: False
        with self.oracle.restored(), store.write() as tx:
            transitions.start_new_incarnation(tx, self.node(0).record.load())
        for node in self.plant.nodes:
            if not self.believes(node):
                node.record.replace(self.plant.registry.committed.epoch)
        with self.plant.view.registry_view() as reading:
            self.retired = {key.name for key in reading.keys(None) if key.retired_at is not None}
        known = {v.ref["id"] for v in self.plant.versions() if v.ref is not None}
        self.destroyed_since |= known - self.plant.backend.keys.keys()
        for node in self.plant.nodes:
            node.down = False
            node.add_worker()

    @precondition(lambda self: self.before_last_change is not None)
    @rule()
    def the_last_change_is_lost_for_a_while(self) -> None:
        """While everything runs, and without a word. A node that has not heard of the change may believe the copy."""
        self.oracle.look()
        newer, older = self.plant.registry.committed, self.before_last_change
        self.plant.registry._committed = older  # type: ignore[attr-defined]
        if not any(self.believes(node) for node in self.plant.nodes):
            # The oracle asks the registry what was revoked, and this one does not know it.
            self.plant.watch.remove(self.oracle.look)
            self.plant.settle(3)
            self.plant.watch.append(self.oracle.look)
            hold(self.plant.registry.committed is older, "a process wrote to a registry that had lost changes")
            for worker in self.plant.workers:
                reaches_it = not (worker.node.cut or self.plant.registry_down)
                hold(not (reaches_it and worker.sync.has_lease()), "it signs under a registry that has lost changes")
            self.rollbacks += 1
        self.plant.registry._committed = newer  # type: ignore[attr-defined]

    def remember(self, before: Any, after: Any) -> None:
        if not before.epoch.is_same(after.epoch):
            self.before_last_change = before

    def believes(self, node: Node) -> bool:
        store = node.store()
        store.away, store.known_epoch = lambda: False, node.record.load
        with store.read() as tx:
            try:
                tx.require_known_history()
            except errors.RegistryRolledBack:
                return False
        return True

    # --- signing

    @rule(number=numbers, key=numbers)
    def somebody_signs(self, number: int, key: int) -> None:
        worker = self.worker(number)
        if worker is None:
            return
        try:
            made = worker.signing.handle(
                SigningOperation.JWT,
                self.plant.who,
                "main",
                self.a_key(key),
                {"claims": {"sub": "a"}, "expires_in": 60},
            )
        except errors.Error:
            return
        assert isinstance(made, wire.SignedJwt)
        hold(made.kid not in self.oracle.stopped, "promise 5: it signed after its revocation", kid=made.kid)
        assert worker.snapshot is not None
        known = worker.snapshot.key_sets["main"].verify_keys[made.kid]
        hold(known.alg == made.alg and not known.revoked, "promise 3", kid=made.kid)

    # --- the end of every history

    def heal(self) -> None:
        """Everything that is away comes back, and what is gone for good is forgotten."""
        self.plant.registry_down, self.plant.backend.fail, self.plant.step = False, None, 0
        self.plant.backend.offered = frozenset({"EdDSA"})
        for number, node in enumerate(self.plant.nodes):
            node.cut = False
            if node.down:
                self.a_node_goes_down_or_comes_back(number)
            if not any(w.alive for w in node.workers):
                node.add_worker()
        self.plant.advance(130, rounds=4)
        self.somebody_forgets_workers_that_are_gone()

    def everything_heals_and_nothing_is_lost(self) -> None:
        plant = self.plant
        self.heal()
        for name in self.key_names():
            self.oracle.disabled -= {name} - self.retired
            self.ask(lambda w, n=name: w.keys.enable(plant.who, "main", n))  # type: ignore[misc]
        # Past the pause after a pair that the module declined to make.
        plant.advance(timeline.RETRY_AFTER_REFUSAL + 130, rounds=12)
        plant.settle(12)
        self.oracle.standby_everywhere()
        store = plant.nodes[0].store()
        listed = {orphan.ref for orphan in find_orphans(store, plant.backends())}
        held = [v for v in plant.versions() if v.ref is not None and v.state is not S.DESTROYED]
        refs = [str(v.ref["id"]) for v in held if v.ref is not None]
        hold(len(refs) == len(set(refs)), "two versions share a pair")
        hold(set(refs) - self.destroyed_since <= plant.backend.keys.keys(), "a pair is lost")
        surplus = plant.backend.keys.keys() - set(refs)
        hold(surplus == {ref["id"] for ref in listed}, "a surplus pair is not listed", surplus=len(surplus))


def test_every_promise_holds_in_every_history(figure: Callable[[str], None]) -> None:
    played.clear()
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    figure(
        f"model: {played['histories']} histories of up to {STEPS} steps, {played['rotations']} versions deactivated, "
        f"{played['rollbacks']} times a registry that had lost a change was refused, "
        f"{played['documents']} documents and {played['signers']} possible signers judged, every promise held"
    )


# --- and the machine can fail


@pytest.mark.parametrize(
    "mutation",
    ["no publish lead", "retired without the skew", "a revocation that does not wait", "a standby that is forgotten"],
)
def test_a_planner_with_a_mistake_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(mutation, monkeypatch)
    with pytest.raises(Broken):
        run_state_machine_as_test(
            Histories,
            settings=settings(
                max_examples=2000,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )


def break_it(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:

    def everywhere(name: str, wrong: Any) -> None:
        for place in ("steps", "rotation", "plan"):
            module = importlib.import_module(f"kms_jwks.timeline.{place}")
            monkeypatch.setattr(module, name, wrong, raising=False)
        monkeypatch.setattr(timeline, name, wrong, raising=False)

    if mutation == "no publish lead":
        everywhere("usable_at", lambda version, policy: version.visible_since)
    elif mutation == "retired without the skew":
        right = timeline.retirable_at

        def hasty(version: KeyVersion) -> Any:
            at = right(version)
            return None if at is None else at - (version.bounds.clock_skew + version.bounds.lease) * SECOND

        everywhere("retirable_at", hasty)
    elif mutation == "a revocation that does not wait":
        monkeypatch.setattr("tests.simulation.plant.SimConfirmation.wait_until_confirmed", lambda *_: [])
    else:
        monkeypatch.setattr(transitions, "ensure_standby", lambda *_: None)
        everywhere("creation", lambda *_: [])
