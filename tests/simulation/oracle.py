"""What the promises mean, told from outside: who served which kids when, and until when who could have signed.

It looks at what workers serve and hold, and at what was committed, and computes everything from the definitions: none
of `kms_jwks.timeline` is used here, so a mistake there cannot excuse itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from kms_jwks.model import SECOND, Key, KeySet, KeyVersion, Worker
from tests.simulation.plant import Plant, SimWorker

DRIFT = 30
"""Seconds that the registry's clock, and each verifier's, may be off the true time."""
NEXT = {
    "creating": {"published", "destroyed"},
    "published": {"active", "retired", "revoked"},
    "active": {"retiring", "revoked"},
    "retiring": {"retired", "revoked"},
    "retired": {"revoked", "destroyed"},
    "revoked": {"destroyed"},
    "destroyed": set(),
}
ONCE = (
    *("created_at", "published_at", "visible_since", "activated_at", "deactivated_at", "retired_at"),
    *("revoked_at", "destroyed_at", "kid", "number", "alg"),
)
"""What is written on a version once and never again."""


class Broken(AssertionError):
    """A promise that was not kept."""


def hold(condition: object, promise: str, **facts: object) -> None:
    """Raise Broken unless `condition`."""
    if not condition:
        raise Broken(f"{promise}: " + ", ".join(f"{name}={value}" for name, value in facts.items()))


class Oracle:
    """Watches one key set of a plant. Instants are true time in microseconds."""

    def __init__(self, plant: Plant, key_set: str = "main") -> None:
        self.plant = plant
        self.key_set = key_set
        self.absent: dict[str, int] = {}
        """By kid: when a live worker last served a document without it."""
        self.alive_until: dict[str, int] = {}
        """By kid: when the last token it can have signed has ended for every verifier."""
        self.stopped: set[str] = set()
        """Kids that no worker may sign with: their revocation was answered."""
        self.disabled: set[str] = set()
        """Names of keys whose disabling was answered."""
        self.served: dict[int, frozenset[str]] = {}
        self.excused: set[str] = set()
        """Kids that an emergency or a lost registry excuses from staying published."""
        self.possible = self.documents = 0
        self._signed_before: set[str] = set()
        plant.watch.append(self.look)
        plant.on_commit.append(self.committed)

    # --- promises 2, 5: who can sign, who shows what

    def look(self) -> None:
        """Called whenever something may have changed, and before and after time passes."""
        for worker in self.plant.workers:
            if not worker.forgotten:
                self._look_at_document(worker)
        for worker in self.plant.workers:
            self._look_at_signers(worker)

    def _look_at_document(self, worker: SimWorker) -> None:
        snapshot = worker.snapshot
        found = snapshot.key_sets.get(self.key_set) if snapshot is not None else None
        if found is None or found.jwks is None:
            return
        self.documents += 1
        kids = _kids(found.jwks.body)
        hold(len(kids) <= 10, "I5", kids=len(kids))
        hold(len(found.jwks.body) <= 50 * 1024, "I5", bytes=len(found.jwks.body))
        for kid in self.alive_until.keys() | self._known():
            if kid not in kids:
                self.absent[kid] = self.plant.now
        for kid in self.served.get(id(worker), frozenset()) - kids:
            if kid not in self.excused and kid not in self._revoked():
                ends = self.alive_until.get(kid, 0)
                hold(
                    self.plant.now >= ends,
                    "I2: a kid left while its tokens can be alive",
                    kid=kid,
                    early=_s(ends - self.plant.now),
                )
        self.served[id(worker)] = kids

    def _look_at_signers(self, worker: SimWorker) -> None:
        """Until now this worker could sign under its snapshot, as far as its lease went."""
        snapshot, until = worker.snapshot, min(self.plant.now, worker.lease_until)
        found = snapshot.key_sets.get(self.key_set) if snapshot is not None else None
        if found is None or worker.lease_until <= 0:
            return
        # What the worker takes for the registry's time when its lease ends, or now.
        at = worker.sync.clock.now() - (self.plant.now - until)
        for key in found.keys.values():
            if not key.enabled or key.active is None:
                continue
            pinned = [s for s in key.pinned.values() if s.until is not None and at < s.until]
            for signer in (key.active, *pinned):
                self.possible += 1
                if until >= self.plant.now:
                    hold(signer.kid not in self.stopped, "promise 5: it can sign after its revocation", kid=signer.kid)
                    hold(key.name not in self.disabled, "it can sign with a disabled key", key=key.name)
                stays = at + (key.rules.max_token_ttl + DRIFT) * SECOND
                self.alive_until[signer.kid] = max(self.alive_until.get(signer.kid, 0), stays)

    # --- what is committed

    def committed(self, before: Any, after: Any) -> None:
        """Every transition is one of the table, every instant is written once, and I1 holds when a version starts."""
        acting = self.plant.acting
        if acting is not None and any(
            before.tables[t] is not after.tables[t] for t in before.tables if t is not Worker
        ):
            holder = acting.custodian._leader_lease._holder
            hold(after.lease.holder == holder, "a custodian wrote without the leader lease", node=acting.name)
        old: Mapping[str, KeyVersion] = before.tables[KeyVersion]
        new: Mapping[str, KeyVersion] = after.tables[KeyVersion]
        if old is new:
            return
        hold(old.keys() <= new.keys(), "a version was lost")
        for version_id, version in new.items():
            was = old.get(version_id)
            if was is version:
                continue
            if was is None:
                hold(version.state.value == "creating", "a version begins somewhere else", state=version.state)
                continue
            if was.state is not version.state:
                hold(
                    version.state.value in NEXT[was.state.value], "no such transition", was=was.state, now=version.state
                )
                watched = after.tables[KeySet][version.key_set_id].name == self.key_set
                if version.state.value == "active" and watched:
                    self._started(version, after.tables[Key][version.key_id])
            for name in ONCE:
                earlier = getattr(was, name)
                hold(earlier is None or earlier == getattr(version, name), "it was written twice", field=name)
        active = [v.key_id for v in new.values() if v.state.value == "active"]
        hold(len(active) == len(set(active)), "two versions of a key sign")

    def _started(self, version: KeyVersion, key: Key) -> None:
        assert version.kid is not None
        if any(breach.invariant == "I1" for breach in version.breaches):
            return
        for worker in self.plant.workers:
            if not worker.forgotten and id(worker) in self.served:
                shown = version.kid in self.served[id(worker)]
                hold(shown, "I1: a live worker does not show it", kid=version.kid, worker=worker.node.name)
        if not version.first_fill:
            shown_for = self.plant.now - self.absent.get(version.kid, 0)
            need = (key.policy.publish_lead - 2 * DRIFT) * SECOND
            hold(shown_for >= need, "I1: verifiers could not have fetched it", shown_for=_s(shown_for), need=_s(need))

    # --- told by the test

    def revoked(self, kid: str) -> None:
        """A revocation was answered: from now on no worker signs with it, and it may be missing from documents."""
        self.stopped.add(kid)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The registry was replaced by an older one: what was written since is lost, and with it what it promised."""
        self.plant.on_commit.remove(self.committed)
        yield
        self.plant.on_commit.append(self.committed)
        known = {v.kid for v in self.plant.versions()}
        self.excused |= {kid for kid in self.alive_until if kid not in known}
        self.alive_until.clear()
        self.stopped &= self._revoked()
        self.disabled.clear()

    def standby_everywhere(self) -> None:
        """I4, once everything that can happen now has happened."""
        for key in self.plant.registry.committed.tables[Key].values():
            states = {v.state.value for v in self.plant.versions() if v.key_id == key.id}
            if key.disabled_at is None and "active" in states:
                hold("published" in states, "I4: no standby", key=key.name, states=sorted(states))

    def _known(self) -> set[str]:
        return {v.kid for v in self.plant.versions() if v.kid is not None and v.activated_at is None}

    def _revoked(self) -> set[str]:
        return {v.kid for v in self.plant.versions() if v.kid is not None and v.revoked_at is not None}


_DOCUMENTS: dict[bytes, frozenset[str]] = {}


def _kids(body: bytes) -> frozenset[str]:
    found = _DOCUMENTS.get(body)
    if found is None:
        if len(_DOCUMENTS) > 1000:
            _DOCUMENTS.clear()
        found = _DOCUMENTS[body] = frozenset(jwk["kid"] for jwk in msgspec.json.decode(body)["keys"])
    return found


def _s(microseconds: int) -> str:
    return f"{microseconds / SECOND:.3f}s"
