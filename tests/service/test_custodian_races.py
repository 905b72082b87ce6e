"""Two custodians with a lease of 0.2 s on PostgreSQL, the acting one stopped (SIGSTOP) past its lease and resumed, at a
random moment of a key's making: every step is recorded exactly once, and no pair that is in use is lost.

10 races; 1,000 with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from cryptography.hazmat.primitives import serialization

from kms_jwks import jose, wire
from kms_jwks.backends.base import KeyRef
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.custodian import loop as custodians
from kms_jwks.custodian.leader_lease import LeaderLease
from kms_jwks.custodian.loop import Custodian
from kms_jwks.model import IntentKind, IntentState, VersionState
from kms_jwks.service.definitions import add_key_set
from kms_jwks.store import ConnectionSettings, Store
from kms_jwks.worker.confirmation import Confirmation
from kms_jwks.worker.epoch_record import EpochRecord
from tests.children import FRESH
from tests.memory_backend import MemoryBackend, PrivateKey
from tests.postgres import Postgres
from tests.service.world import World

RACES = 1000 if os.environ.get("KMS_JWKS_TEST_LONG") == "1" else 10
IN_ONE_REGISTRY = 50
"""Races until another registry: a custodian reads everything in a registry."""
LEASE = 0.2
S = VersionState


class Disk(MutableMapping[str, tuple[str, PrivateKey]]):
    """A module's keys as files, so that several processes share the module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, key: str) -> tuple[str, PrivateKey]:
        try:
            label, pem = (self._folder / key).read_bytes().split(b"\n", 1)
        except FileNotFoundError:
            raise KeyError(key) from None
        return label.decode(), serialization.load_pem_private_key(pem, None)  # type: ignore[return-value]

    def __setitem__(self, key: str, value: tuple[str, PrivateKey]) -> None:
        pem = value[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        part = self._folder / f".{key}"
        part.write_bytes(value[0].encode() + b"\n" + pem)
        part.rename(self._folder / key)

    def __delitem__(self, key: str) -> None:
        try:
            (self._folder / key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir() if not path.name.startswith("."))

    def __len__(self) -> int:
        return len(list(iter(self)))


def module(folder: Path) -> MemoryBackend:
    backend = MemoryBackend()
    backend.keys = Disk(folder)  # type: ignore[assignment]
    return backend


def act(url: str, state: Path, keys: Path, name: str, seed: int) -> None:
    """A custodian's process, until TERM."""
    stop, chance = threading.Event(), random.Random(seed)

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, end)
    custodians.PACE = 0.02
    backend = module(keys)
    backend.before = lambda call: time.sleep(chance.random() * 0.2 if call in ("generate", "generated") else 0.0)
    store = Store(url, connection_settings=ConnectionSettings(timeout=5.0))
    confirmation = Confirmation(store, node=name, state_dir=state, lease=10, kick=lambda: None)
    backends = Backends({"memory": backend}, default="memory", limits={"memory": CallLimits(timeout=0.5)})
    lease = LeaderLease(store, node=name, lease=LEASE)
    Custodian(store, backends, confirmation, lease, record=EpochRecord(state)).run(stop)
    store.dispose()


@contextlib.contextmanager
def two(url: str, state: Path, keys: Path, seed: int) -> Iterator[dict[str, BaseProcess]]:
    names = ("first", "second")
    processes: dict[str, BaseProcess] = {
        name: FRESH.Process(target=act, args=(url, state / name, keys, name, seed + i)) for i, name in enumerate(names)
    }
    for process in processes.values():
        process.start()
    try:
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join(30)
            process.kill()
    assert {process.exitcode for process in processes.values()} == {0}


def ask(world: World, name: str) -> None:
    with world.registry.write() as tx:
        request = wire.KeySetCreate(name=name, keys=[wire.KeyCreate(name="default", alg="ES256")])
        add_key_set(tx, world.service.key_sets._control, request)


def settled(world: World, name: str) -> bool:
    with world.registry.read() as tx:
        key_set = tx.key_set(name)
        assert key_set is not None
        versions = tx.versions(key_set_id=key_set.id)
    return [v.state for v in versions] == [S.ACTIVE, S.PUBLISHED] and versions[1].visible_since is not None


def stop_and_resume(world: World, processes: dict[str, BaseProcess], chance: random.Random) -> None:
    """Stop the acting custodian (SIGSTOP) at a random moment, for longer than its lease."""
    time.sleep(chance.random() * 0.3)
    with world.registry.read() as tx:
        lease = tx.custodian_lease()
    acting = processes[lease.node if lease is not None else "first"]
    assert acting.pid is not None
    os.kill(acting.pid, signal.SIGSTOP)
    time.sleep(LEASE + chance.random() * 0.3)
    os.kill(acting.pid, signal.SIGCONT)


def test_every_step_is_recorded_once(tmp_path: Path, postgres: Postgres, figure: Callable[[str], None]) -> None:
    surplus = terms = 0
    chance = random.Random(11)
    for first in range(0, RACES, IN_ONE_REGISTRY):
        folder = tmp_path / str(first)
        keys = folder / "keys"
        keys.mkdir(parents=True)
        url = postgres.url(postgres.create())
        world = World(folder, backend=module(keys), url=url).start(custodian=False)
        try:
            with two(url, folder, keys, first) as processes:
                ask(world, "undisturbed")
                world.until(partial(settled, world, "undisturbed"), 60)
                before = world.registry.poll()[0].counter
                ask(world, "counted")
                world.until(partial(settled, world, "counted"), 60)
                changes = world.registry.poll()[0].counter - before
                for number in range(first, min(first + IN_ONE_REGISTRY, RACES)):
                    name = f"set-{number}"
                    before = world.registry.poll()[0].counter
                    ask(world, name)
                    stop_and_resume(world, processes, chance)
                    world.until(partial(settled, world, name), 60)
                    # A step that is recorded twice changes the epoch twice.
                    assert world.registry.poll()[0].counter - before == changes
            surplus += check(world, keys)
            with world.registry.read() as tx:
                lease = tx.custodian_lease()
            assert lease is not None
            terms += lease.term
        finally:
            world.close()
    assert terms > RACES / 2, "the leader lease changed hands"
    figure(f"{RACES} races, {terms} terms, {surplus} surplus pairs, each of an abandoned attempt")


def check(world: World, keys: Path) -> int:
    """One finished attempt for each version, whose pair is there; every other pair is of one that was abandoned."""
    backend = module(keys)
    with world.registry.read() as tx:
        versions, intents = tx.versions(), tx.intents()
    ends = (IntentState.DONE, IntentState.ABANDONED, IntentState.FAILED)
    assert {i.state for i in intents} <= set(ends)
    done = [i for i in intents if i.state is IntentState.DONE]
    assert sorted(i.version_id for i in done) == sorted(v.id for v in versions)
    assert {i.kind for i in done} == {IntentKind.GENERATE}
    used = set()
    for version in versions:
        assert version.ref is not None
        pair = backend.public_key(KeyRef.of(**version.ref))
        assert jose.thumbprint(pair) == version.kid
        used.add(version.ref["label"])
    assert used == {i.label for i in done}
    surplus = {stored.label for stored in backend.list_keys("kj-")} - used
    assert surplus <= {i.label for i in intents if i.state is not IntentState.DONE}
    return len(surplus)
