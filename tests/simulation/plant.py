"""An installation of several nodes in virtual time: the real use cases, workers and custodians, one registry in memory,
one module in memory, and clocks, crashes and partitions that a test controls.

Nothing sleeps and nothing runs in a thread: a test lets time pass, lets a worker poll, lets a custodian tick.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import structlog

from kms_jwks import model, wire, wiring
from kms_jwks.access import Role
from kms_jwks.backends.base import Backend
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.config import Settings
from kms_jwks.custodian.leader_lease import Fenced, LeaderLease
from kms_jwks.custodian.loop import Custodian
from kms_jwks.errors import Error
from kms_jwks.model import SECOND, Epoch, Id, KeyVersion, Worker
from kms_jwks.service.clients import add_client, add_grant, add_token
from kms_jwks.service.control import CUSTODIAN_WAIT, Control
from kms_jwks.service.guard import RequestContext
from kms_jwks.worker.confirmation import Confirmation
from kms_jwks.worker.epoch_record import EpochRecord
from kms_jwks.worker.snapshot import Snapshot
from tests.memory_backend import MemoryBackend
from tests.simulation.store import MemoryStore, Registry
from tests.unit.builders import T0

T = TypeVar("T")
TICK = 0.25
"""Seconds between two rounds in which every live process gets its turn."""
URL = "https://keys.example"
NOWHERE = Path("/nowhere")


class Crash(BaseException):
    """Ends a process as kill -9 would."""


class InPlace(Backends):
    """Makes every call in the caller's thread: nothing here runs in another one."""

    def ask(
        self,
        name: str,
        what: str,
        question: Callable[[Backend], T],
        seconds: float = 0.0,
        *,
        undo: Callable[[Backend, T], object] | None = None,
    ) -> T:
        return question(self.get(name))


class Bomb:
    """Goes off at the `left`-th point at which a process can die; never while `left` is 0."""

    def __init__(self, at_point: Callable[[str], None] = lambda _: None) -> None:
        self.left = 0
        self.gone_off = False
        self._at_point = at_point
        """Hears of every point that is passed alive; it may raise Crash, or do something while the process stands."""

    def __call__(self, point: str) -> None:
        if self.gone_off:
            raise Crash  # a dead process does nothing more
        try:
            self._at_point(point)
        except Crash:
            self.gone_off = True
            raise
        if self.left:
            self.left -= 1
            if not self.left:
                self.gone_off = True
                raise Crash


class MemoryRecord(EpochRecord):
    """A node's record of the highest confirmed epoch, without a file: it outlives the node's processes."""

    def load(self) -> Epoch | None:
        return self._last

    def advance(self, known: Epoch | None, epoch: Epoch) -> bool:
        if self._last is not None and not self._last.is_same(known):
            return False
        self._last = epoch
        return True

    def replace(self, epoch: Epoch) -> None:
        self._last = epoch


class Node:
    """One machine: its boot clock, its way to the registry, its workers and its custodian."""

    def __init__(self, plant: Plant, name: str, boot_offset: int) -> None:
        self.plant = plant
        self.name = name
        self.boot_offset = boot_offset
        self.cut = False
        """Cut off from the registry."""
        self.down = False
        self.workers: list[SimWorker] = []
        self.record = MemoryRecord(NOWHERE)
        self.settings = Settings(
            public_url=URL,
            database_url="sqlite:///nowhere",
            state_dir=NOWHERE,
            node_name=name,
            signing_lease=plant.lease,
            poll_interval_ms=int(TICK * 1000),
        )
        self.custodian = self.new_custodian()

    def boot(self) -> int:
        return self.plant.now + self.boot_offset

    def store(self) -> MemoryStore:
        store = self.plant.make_store()
        store.away = lambda: self.cut or self.plant.registry_down
        return store

    def new_custodian(self) -> Custodian:
        self.bomb = Bomb(lambda point: self.plant.at_point(self, point))
        store = self.store()
        store.before = self.bomb
        made = wiring.assemble_custodian(
            self.settings,
            store=store,
            backends=self.plant.backends(),
            confirmation=SimConfirmation(self.plant, store, self),
            leader_lease=SimLeaderLease(store, node=self.name, boot=self.boot),
            monotonic=lambda: self.boot() / SECOND,
        )
        made._record, store.known_epoch = self.record, self.record.load
        return made

    def add_worker(self) -> SimWorker:
        worker = SimWorker(self)
        self.workers.append(worker)
        return worker


class SimLeaderLease(LeaderLease):
    """Without the thread that renews while a module works: here a module answers at once."""

    @contextlib.contextmanager
    def renew_during_step(self) -> Iterator[None]:
        yield


class SimConfirmation(Confirmation):
    """Waits in virtual time."""

    def __init__(self, plant: Plant, store: MemoryStore, node: Node) -> None:
        super().__init__(store, node=node.name, state_dir=NOWHERE, lease=plant.lease, kick=lambda: None)
        self._plant = plant

    def _wait(self, epoch: Epoch, seconds: float, *, only_live: bool) -> list[Worker]:
        end = self._plant.now + seconds * SECOND
        while True:
            with self._store.read() as tx:
                waiting, now = self.unconfirmed(tx, epoch), tx.now()
            if only_live:
                waiting = [w for w in waiting if not self.silent(w, now)]
            if not waiting or self._plant.now >= end:
                return waiting
            self.deregister_dead_workers()
            self._plant.round(custodians=False)


class SimControl(Control):
    """Waits in virtual time."""

    def wait_for_custodian(self, ids: list[Id]) -> bool:
        plant = self.confirmation._plant  # type: ignore[attr-defined]
        end = plant.now + CUSTODIAN_WAIT * SECOND
        while plant.now < end:
            if self._read_settled_epoch(ids) is not None:
                return True
            plant.round()
        return False


class SimWorker:
    """One worker process with everything it serves."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.alive = True
        self.forgotten = False
        self.bomb = Bomb()
        store = node.store()
        store.before = self.bomb
        plant = node.plant
        service = wiring.assemble(
            node.settings,
            store=store,
            backends=plant.backends(),
            boot=node.boot,
            confirmation=SimConfirmation(plant, store, node),
            control=SimControl,
        )
        self.store = store
        self.sync = service.sync
        # A worker's files are not part of the simulation.
        self.sync._jwks_cache = SimpleNamespace(store=lambda _: None, snapshot=lambda: None)  # type: ignore[assignment]
        self.sync._record, store.known_epoch = node.record, node.record.load
        self.signing = service.signing
        self.key_sets, self.keys, self.versions = service.key_sets, service.keys, service.versions
        self.external_keys = service.external_keys
        self.operation = service.operation
        self.revocation = service.revocation

    @property
    def snapshot(self) -> Snapshot | None:
        return self.sync._current.snapshot

    @property
    def lease_until(self) -> int:
        """In true time."""
        return self.sync._lease_until - self.node.boot_offset

    def poll(self) -> None:
        if not self.alive:
            return
        try:
            self.sync.poll()
        except Crash:
            self.die()

    def die(self) -> None:
        self.alive = False
        lock = self.sync._registration._lock
        if lock is not None:
            lock.release()


class Plant:
    """`now` is true time in microseconds; the registry's clock is `step` away from it."""

    def __init__(
        self,
        *,
        nodes: int = 2,
        workers: int = 1,
        lease: int = 10,
        seed: int = 0,
        make_store: Callable[[Plant], MemoryStore] | None = None,
    ) -> None:
        self.now: int = T0
        self.step = 0
        self.lease = lease
        self.random = random.Random(seed)
        self.registry_down = False
        self.backend = MemoryBackend("memory")
        self.living: set[Id] = set()
        """Workers that hold their liveness lock."""
        self.ended: list[Id] = []
        self.watch: list[Callable[[], None]] = []
        """Called before time passes: what was possible until now is over then."""
        self.on_commit: list[Callable[[Any, Any], None]] = []
        self.at_point: Callable[[Node, str], None] = lambda *_: None
        """Called at every point of every custodian."""
        self.registry: Registry = _Watched(self)
        self.acting: Node | None = None
        """Whose custodian is at work."""
        self.stores: list[MemoryStore] = []
        self._make_store = make_store
        self.view = store = self.make_store()
        with store.write() as tx:
            owner = add_client(tx, "admin")
            for role in (Role.ADMIN, Role.SIGNER):
                add_grant(tx, owner, role, None, None, accept_combined_duties=True)
            made, _ = add_token(tx, owner, 300 * 366 * model.DAY)
            token = made.token
        self.who = RequestContext(f"Bearer {token}")
        self.nodes = [Node(self, f"node-{n}", (n + 1) * 1_000_000 * SECOND) for n in range(nodes)]
        for node in self.nodes:
            for _ in range(workers):
                node.add_worker()
        self.round()

    def backends(self) -> Backends:
        return InPlace({"memory": self.backend}, default="memory", limits={"memory": CallLimits(timeout=5.0)})

    def make_store(self) -> MemoryStore:
        """One process's way to the registry."""
        self.stores.append(MemoryStore(self.registry) if self._make_store is None else self._make_store(self))
        return self.stores[-1]

    # --- what there is

    @property
    def workers(self) -> list[SimWorker]:
        return [w for node in self.nodes for w in node.workers if w.alive and not node.down]

    def api(self) -> SimWorker | None:
        """A worker that can answer the control plane."""
        return next((w for w in self.workers if not w.node.cut and not w.forgotten), None)

    def versions(self) -> list[KeyVersion]:
        with self.view.registry_view() as tx:
            return tx.versions()

    # --- time

    def wall(self) -> int:
        return self.now + self.step

    def pass_(self, seconds: float) -> None:
        """Let time pass without a poll or a tick."""
        for look in self.watch:
            look()
        self.now += round(seconds * SECOND)
        for look in self.watch:
            look()

    def round(self, *, seconds: float = TICK, custodians: bool = True) -> None:
        """Let time go by, and give every live process its turn."""
        self.pass_(seconds)
        for worker in self.workers:
            worker.poll()
        if custodians:
            for node in self.nodes:
                self.tick(node)
        for look in self.watch:
            look()

    def tick(self, node: Node) -> None:
        """One round of a node's custodian; one that crashes is replaced."""
        if node.down:
            return
        before, self.backend.before = self.backend.before, node.bomb
        others, self.acting = self.acting, node
        try:
            node.custodian.tick()
        except Crash:
            node.custodian = node.new_custodian()
        except Exception as error:
            # What `run` does: another term has begun, or the registry is away. The next tick tries again.
            if isinstance(error, Fenced):
                node.custodian._leader_lease.term = 0
            elif not isinstance(error, Error):
                raise
        finally:
            self.backend.before, self.acting = before, others

    def settle(self, rounds: int = 8) -> None:
        """Let everything that can happen now happen."""
        for _ in range(rounds):
            self.round()

    def advance(self, seconds: float, rounds: int = 3) -> None:
        """Let much time go by at once, and everything that has become due happen."""
        self.pass_(seconds)
        self.settle(rounds)

    def until(self, condition: Callable[[], object], rounds: int = 200) -> None:
        for _ in range(rounds):
            if condition():
                return
            self.round()
        raise AssertionError("it did not happen in time")

    # --- shorthands

    def create(self, *keys: dict[str, Any], name: str = "main", **fields: Any) -> None:
        api = self.api()
        assert api is not None
        wanted = list(keys) or [{"name": "default", "alg": "EdDSA"}]
        request = wire.convert({"name": name, "keys": wanted, **fields}, wire.KeySetCreate)
        api.key_sets.create(self.who, request)


class _Watched(Registry):
    """Tells the plant's listeners of every commit."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._committed: Any = None
        super().__init__(plant.wall, lambda: f"{plant.random.getrandbits(128):032x}")

    @property
    def committed(self) -> Any:
        return self._committed

    @committed.setter
    def committed(self, contents: Any) -> None:
        before, self._committed = self._committed, contents
        if before is not None:
            for tell in self._plant.on_commit:
                tell(before, contents)


class _Lock:
    """A liveness lock without a file."""

    plant: Plant

    def __init__(self, folder: Path, worker: Id) -> None:
        self._worker = worker
        self.plant.living.add(worker)

    def release(self, *, keep_file: bool = False) -> None:
        self.plant.living.discard(self._worker)
        self.plant.ended.append(self._worker)


@contextlib.contextmanager
def simulated(seed: int = 0, **options: Any) -> Iterator[Plant]:
    """A plant whose every choice follows from `seed`; quiet, and nothing of it outside this process."""
    rng = random.Random(seed)
    clock = SimpleNamespace(time_ns=lambda: T0 * 1000)
    lock = type("Lock", (_Lock,), {})
    before = structlog.get_config()
    structlog.configure(
        logger_factory=structlog.ReturnLoggerFactory(), processors=[lambda *_: ""], cache_logger_on_first_use=False
    )
    known: list[Plant] = []
    liveness: dict[str, Any] = {
        "LivenessLock": lock,
        "is_dead": lambda _, worker: worker not in known[0].living,
        "dead_workers": lambda _: list(known[0].ended),
        "lock_age": lambda *_: 0.0,
        "remove_lock": lambda _, worker: known[0].ended.remove(worker),
    }
    with (
        patch.object(model, "os", SimpleNamespace(urandom=rng.randbytes)),
        patch.object(model, "time", clock),
        patch.multiple("kms_jwks.worker.registration", **liveness),
    ):
        plant = Plant.__new__(Plant)
        known.append(plant)
        lock.plant = plant  # type: ignore[attr-defined]
        clock.time_ns = lambda: getattr(plant, "now", T0) * 1000
        plant.__init__(seed=seed, **options)  # type: ignore[misc]
        try:
            yield plant
        finally:
            structlog.configure(**before)
            for store in plant.stores:
                store.dispose()
