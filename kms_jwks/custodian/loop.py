"""The custodian: the one process of an installation that makes and destroys keys in modules and keeps the calendar.

One acts, fenced by its term; others stand by. What it does in modules is `attempts`'s business; here is its round, and
the steps of `timeline.plan` that change the registry alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from kms_jwks import errors, timeline
from kms_jwks.backends.calling import Backends
from kms_jwks.custodian import transitions
from kms_jwks.custodian.intents import OPEN, IntentRunner
from kms_jwks.custodian.leader_lease import Fenced, LeaderLease
from kms_jwks.model import (
    IN_JWKS,
    Epoch,
    Id,
    Instant,
    IntentKind,
    Key,
    KeySet,
    KeyVersion,
)
from kms_jwks.store import ReadTx, Store, WriteTx
from kms_jwks.timeline import Step, StepKind
from kms_jwks.worker.confirmation import Confirmation

log = structlog.get_logger(__name__)

PACE = 0.15
"""Seconds between two ticks."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the calendar while the epoch stays the same."""
REAP_EVERY = 0.5

_MODULE_STEPS = {StepKind.TELL: IntentKind.TELL, StepKind.DESTROY: IntentKind.DESTROY}
"""Steps that are a module's work: an intent, which `IntentRunner` takes from there."""


class Custodian:
    """Call `tick` again and again, or `run`. Everything it decides comes from the registry and `timeline.plan`."""

    def __init__(
        self,
        store: Store,
        backends: Backends,
        confirmation: Confirmation,
        office: LeaderLease,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._confirmation = confirmation
        self._leader_lease = office
        self._intents = IntentRunner(store, backends, office)
        self._monotonic = monotonic
        self._planned_under: Epoch | None = None
        self._next_look = self._next_reap = monotonic()

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop`; a tick that fails is logged and the next one tries again."""
        trouble = ""
        while not stop.is_set():
            try:
                self.tick()
                trouble = ""
            except Fenced:
                log.info("custodian_fenced", term=self._leader_lease.term)
                self._leader_lease.term = 0
            except errors.Error as error:
                if error.code != trouble:
                    log.warning("custodian_held_up", error=error.detail, code=error.code)
                trouble = error.code
            except Exception:
                log.exception("custodian_tick_failed")
            stop.wait(PACE)
        self._leader_lease.resign()

    def tick(self) -> None:
        """One round: stay in office, finish what was begun, then do what is due."""
        if not self._leader_lease.hold(self._intents.abandon):
            return
        if self._monotonic() >= self._next_reap:
            self._next_reap = self._monotonic() + REAP_EVERY
            self._confirmation.reap()
        self._intents.run_due()
        self._note_visibility()
        self._take_due_steps()

    # --- visibility

    def _note_visibility(self) -> None:
        """A published version is visible once every registered worker has confirmed an epoch that holds it (I1)."""
        with self._store.read() as tx:
            if not _newly_visible(tx):
                return
        with self._leader_lease.mutation() as tx:
            for version in _newly_visible(tx):
                tx.save(replace(version, visible_since=tx.now()))

    # --- the calendar

    def _take_due_steps(self) -> None:
        with self._store.read() as tx:
            epoch = tx.epoch()
            if epoch == self._planned_under and self._monotonic() < self._next_look:
                return
            due = _due_everywhere(tx)
        for key_set, step in due:
            try:
                with self._leader_lease.mutation() as tx:
                    current = tx.key_set_by_id(key_set.id)
                    # The reason is looked at again under the lock: somebody may have acted meanwhile.
                    if current is not None and _still_due(tx, current, step):
                        self._take(tx, current, step)
            except errors.Conflict as error:
                log.warning("step_refused", step=step.kind.value, error=error.detail)
        self._planned_under, self._next_look = epoch, self._monotonic() + LOOK_EVERY

    def _take(self, tx: WriteTx, key_set: KeySet, step: Step) -> None:
        log.info("custodian_step", step=step.kind.value, subject=step.subject, reason=step.reason)
        match step.kind:
            case StepKind.REMOVE_EXTERNAL:
                external = next(e for e in tx.external_keys(key_set.id) if e.id == step.subject)
                tx.save(replace(external, removed_at=tx.now()))
            case StepKind.PUBLISH:
                transitions.publish_ready(tx, key_set)
            case StepKind.CREATE:
                key = tx.key_by_id(step.subject)
                assert key is not None
                transitions.ensure_standby(tx, key)
            case StepKind.ACTIVATE:
                version, key = _version(tx, step.subject)
                breach = step.reason if step.breach is not None else None
                lease = self._confirmation.lease(tx)
                transitions.activate(tx, key_set, key, version, lease=lease, breach=breach)
            case StepKind.WITHDRAW:
                version, key = _version(tx, step.subject)
                transitions.withdraw(tx, key, version)
            case StepKind.TELL | StepKind.DESTROY:
                version, _ = _version(tx, step.subject)
                transitions.add_intent(tx, _MODULE_STEPS[step.kind], version, tx.now())


def _version(tx: ReadTx, version_id: Id) -> tuple[KeyVersion, Key]:
    version = tx.version(version_id)
    key = tx.key_by_id(version.key_id) if version is not None else None
    assert version is not None and key is not None
    return version, key


def _due_everywhere(tx: ReadTx) -> list[tuple[KeySet, Step]]:
    """What is due in every key set, from one read of each table."""
    now = tx.now()
    keys, versions, externals = tx.keys(), tx.versions(), tx.external_keys()
    under_way = _under_way(tx)
    found = []
    for key_set in tx.key_sets():
        steps = timeline.plan(
            key_set,
            [k for k in keys if k.key_set_id == key_set.id],
            [v for v in versions if v.key_set_id == key_set.id],
            now,
            [e for e in externals if e.key_set_id == key_set.id],
        )
        found += [(key_set, step) for step in steps if step.is_due(now) and not _begun(step, under_way)]
    return found


def _under_way(tx: ReadTx) -> set[tuple[IntentKind, Id]]:
    return {(intent.kind, intent.version_id) for intent in tx.intents(states=OPEN)}


def _begun(step: Step, under_way: set[tuple[IntentKind, Id]]) -> bool:
    kind = _MODULE_STEPS.get(step.kind)
    return kind is not None and (kind, step.subject) in under_way


def plan_of(tx: ReadTx, key_set: KeySet, now: Instant) -> list[Step]:
    """The plan of one key set."""
    versions = tx.versions(key_set_id=key_set.id)
    return timeline.plan(key_set, tx.keys(key_set.id), versions, now, tx.external_keys(key_set.id))


def _still_due(tx: ReadTx, key_set: KeySet, step: Step) -> bool:
    now = tx.now()
    same = [s for s in plan_of(tx, key_set, now) if (s.kind, s.subject) == (step.kind, step.subject)]
    return any(s.is_due(now) for s in same) and not _begun(step, _under_way(tx))


def _newly_visible(tx: ReadTx) -> list[KeyVersion]:
    workers, incarnation = tx.workers(), tx.epoch().incarnation
    if not workers:
        return []
    return [
        version
        for version in tx.versions(states=IN_JWKS, unseen=True)
        if version.published_epoch is not None
        and all(
            w.confirmed is not None and w.confirmed.reaches(Epoch(incarnation, version.published_epoch))
            for w in workers
        )
    ]
