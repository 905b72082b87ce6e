"""A custodian that ends, or stands still past its lease, at any point of a key's life: nothing is lost or doubled.

The life is played once to count the points at which a custodian writes or calls a module, and then once for each point,
where it crashes there or is overtaken. In virtual time, on the registry in memory; on SQLite at every 30th point, at
every one with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kms_jwks import wire
from kms_jwks.custodian.leader_lease import LeaderLease
from kms_jwks.doctor import find_orphans
from kms_jwks.model import DAY, Intent, IntentKind, IntentState, VersionState
from kms_jwks.store import Store, WriteTx
from tests.simulation.files import FileStore
from tests.simulation.oracle import Broken, Oracle
from tests.simulation.plant import Crash, Node, Plant, simulated

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
S = VersionState
POLICY = {"rotate_every": 20_000, "publish_lead": 7200, "max_token_ttl": 600, "clock_skew": 60, "rotate_jitter": 0}
IDLE = {"read", "poll"}
"""Points at which a crash changes nothing that a crash at the next write would not."""


def a_life(plant: Plant) -> None:
    """Made, rotated by schedule, retired, told, revoked, rotated again after the emergency, destroyed."""

    def state(number: int, *wanted: S) -> bool:
        return any(v.number == number and v.state in wanted for v in plant.versions())

    plant.create({"name": "default", "alg": "EdDSA", "policy": POLICY | {"destroy_after": 7 * DAY}})
    plant.until(lambda: state(1, S.ACTIVE) and any(v.number == 2 and v.visible_since for v in plant.versions()))
    plant.advance(20_000)
    plant.until(lambda: state(2, S.ACTIVE) and state(3, S.PUBLISHED))
    plant.advance(740)
    plant.until(lambda: state(1, S.RETIRED) and any(v.number == 1 and v.destroy_told for v in plant.versions()))
    api = plant.api()
    assert api is not None
    api.revocation.revoke_version(plant.who, "main", "default", "2", wire.RevokeRequest(reason="leaked"))
    plant.until(lambda: state(3, S.ACTIVE) and any(v.number == 4 and v.visible_since for v in plant.versions()))
    plant.advance(7200)
    plant.until(lambda: state(4, S.ACTIVE) and state(5, S.PUBLISHED))
    plant.advance(7 * DAY)
    plant.until(lambda: state(1, S.DESTROYED) and state(2, S.DESTROYED))
    # Past a dead custodian's lease, so that the next one has abandoned its attempts.
    plant.settle(60)


def nothing_is_lost(plant: Plant) -> int:
    """Holds the registry against the module. Returns how many pairs are surplus."""
    versions = plant.versions()
    store = plant.view
    held = [v for v in versions if v.state is not S.DESTROYED]
    refs = [v.ref["id"] for v in held if v.ref is not None]
    assert len(refs) == len(held) == len(set(refs)), "one pair per version"
    assert set(refs) <= plant.backend.keys.keys()
    surplus = plant.backend.keys.keys() - set(refs)
    assert {orphan.ref["id"] for orphan in find_orphans(store, plant.backends())} == surplus
    with store.registry_view() as tx:
        attempts = tx.intents()
    assert not [i for i in attempts if i.state is IntentState.STARTED]
    for version in versions:
        assert len(done(attempts, IntentKind.GENERATE, version.id)) == 1, "each pair is recorded once"
        assert len(done(attempts, IntentKind.DESTROY, version.id)) == (version.state is S.DESTROYED)
        assert (version.absence is not None) == (version.state is S.DESTROYED)
    return len(surplus)


def done(intents: list[Intent], kind: IntentKind, version: str) -> list[Intent]:
    return [i for i in intents if (i.kind, i.version_id, i.state) == (kind, version, IntentState.DONE)]


class Points:
    """Counts the points that matter, and acts at one of them."""

    def __init__(self, at: int, act: Callable[[Node, str], None]) -> None:
        self.seen: list[str] = []
        self._at = at
        self._act = act

    def __call__(self, node: Node, point: str) -> None:
        if point in IDLE:
            return
        self.seen.append(point)
        if len(self.seen) == self._at:
            self._act(node, point)


def crash(node: Node, point: str) -> None:
    raise Crash


def overtake(node: Node, point: str) -> None:
    """The process stands still past its lease, another node acts, and then it goes on where it stood."""
    if point == "commit":
        return  # it holds the registry's lock: no other custodian can act until it has ended
    plant = node.plant
    others = [n for n in plant.nodes if n is not node]
    node.down = True
    workers, node.workers = node.workers, []
    plant.pass_(11)
    others[0].workers += workers  # served on by others, so that the epoch is confirmed meanwhile
    for _ in range(12):
        plant.pass_(1)
        for worker in plant.workers:
            worker.poll()
        plant.tick(others[0])
    others[0].workers = [w for w in others[0].workers if w not in workers]
    node.workers = workers
    node.down = False


def play(
    at: int,
    act: Callable[[Node, str], None],
    make_store: Callable[[Plant], FileStore] | None = None,
    *,
    life: Callable[[Plant], None] = a_life,
    judge: Callable[[Plant], int] = nothing_is_lost,
) -> Points:
    with simulated(seed=at, nodes=2, make_store=make_store) as plant:
        if make_store is None:
            Oracle(plant)
        plant.at_point = points = Points(at, act)
        life(plant)
        surplus = judge(plant)
        if not at:
            assert surplus == 0
    return points


def test_a_crash_at_every_point_loses_nothing(figure: Callable[[str], None]) -> None:
    points = play(0, crash).seen
    assert {"write", "commit", "committed", "generate", "generated", "schedule_destroy", "destroy"} <= set(points)
    for at in range(1, len(points) + 1):
        play(at, crash)
    figure(f"crashes: a custodian ended at each of {len(points)} points of a key's life, nothing lost or doubled")


def test_a_custodian_overtaken_at_every_point_changes_nothing_more(figure: Callable[[str], None]) -> None:
    points = play(0, overtake).seen
    for at in range(1, len(points) + 1):
        play(at, overtake)
    figure(
        f"overtaken: a custodian stood still past its lease at each of {len(points)} points, nothing lost or doubled"
    )


def usurp(node: Node, point: str) -> None:
    """Another node acquires the leader lease and does nothing with it yet."""
    node.plant.pass_(11)
    other = next(n for n in node.plant.nodes if n is not node)
    before, node.plant.acting = node.plant.acting, other
    assert other.custodian._leader_lease.acquire_or_renew(other.custodian._intents.abandon_started)
    node.plant.acting = before


def writes(points: list[str]) -> list[int]:
    return [at for at, point in enumerate(points, 1) if point == "write"]


def test_a_custodian_that_lost_its_lease_writes_nothing() -> None:
    for at in writes(play(0, usurp).seen)[3::6]:
        play(at, usurp)


def test_without_fencing_it_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def unfenced(leader_lease: LeaderLease) -> Iterator[WriteTx]:
        with leader_lease._store.write() as tx:
            yield tx

    places = writes(play(0, usurp).seen)
    monkeypatch.setattr(LeaderLease, "fenced_write", unfenced)
    found = 0
    for at in places[3::6]:
        try:
            play(at, usurp)
        except Broken as broken:
            found += "without the leader lease" in str(broken)
    assert found > 0


def test_the_last_date_that_a_module_is_told_is_the_registry_s() -> None:
    """A custodian stands still while it tells a module a destruction date; meanwhile the destruction is cancelled."""
    with simulated(nodes=2) as plant:
        plant.backend.puts_off = 7 * DAY
        cancelled = 0

        def act(node: Node, point: str) -> None:
            nonlocal cancelled
            if point != "schedule_destroy" or cancelled:
                return
            cancelled += 1
            overtake(node, point)
            api = plant.api()
            assert api is not None
            api.versions.cancel_destroy(plant.who, "main", "default", "1")
            overtake(node, point)
            assert plant.backend.told == {}

        plant.create({"name": "default", "alg": "EdDSA", "policy": POLICY})
        plant.settle()
        plant.advance(20_000, rounds=6)
        plant.at_point = act
        plant.advance(740, rounds=6)
        plant.settle(60)
        version = plant.versions()[0]
        assert cancelled == 1
        assert (version.state, version.destroy_at, version.destroy_told) == (S.RETIRED, None, None)
        assert plant.backend.told == {}


# --- the real store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry without contents: migrating one for each life would take longer than the lives."""
    made = tmp_path_factory.mktemp("template") / "registry.sqlite3"
    store = Store(f"sqlite:///{made}")
    store.upgrade()
    store.dispose()
    return made


@pytest.mark.parametrize("act", [crash, overtake])
def test_the_same_on_sqlite(act: Callable[[Node, str], None], template: Path, tmp_path: Path) -> None:
    def live(at: int) -> Points:
        file = tmp_path / f"{at}.sqlite3"
        shutil.copy(template, file)
        try:
            return play(at, act, lambda plant: FileStore(f"sqlite:///{file}", plant.wall))
        finally:
            for left in tmp_path.glob(f"{at}.sqlite3*"):
                left.unlink()

    points = live(0).seen
    for at in range(1, len(points) + 1, 1 if LONG else 30):
        live(at)
