"""The custodian: the one process of an installation that makes and destroys keys in modules and takes planned steps.

One custodian acts, fenced by its term; those of other nodes stand by. This module has its round and the steps of
`timeline.plan` that change the registry only; `intents` has what it does in modules.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from kms_jwks import errors, timeline
from kms_jwks.backends.calling import Backends
from kms_jwks.custodian import transitions
from kms_jwks.custodian.expiry import list_ending
from kms_jwks.custodian.intents import OPEN, IntentRunner
from kms_jwks.custodian.leader_lease import Fenced, LeaderLease
from kms_jwks.model import DAY, IN_JWKS, SECOND, Epoch, Id, Instant, IntentKind, Key, KeySet, KeyVersion
from kms_jwks.store import ReadTx, Store, WriteTx
from kms_jwks.timeline import Step, StepKind
from kms_jwks.times import format_instant
from kms_jwks.worker.confirmation import Confirmation
from kms_jwks.worker.epoch_record import EpochRecord

log = structlog.get_logger(__name__)

PACE = 0.15
"""Seconds between two ticks."""
PLAN_INTERVAL = 1.0
"""Seconds between two plans while the epoch stays the same."""
DEAD_WORKERS_INTERVAL = 0.5
"""Seconds between two checks for dead workers."""
EXPIRY_INTERVAL = float(DAY)
"""Seconds between two reports of what ends soon."""
MAX_EXPIRY_LINES = 100
"""Log lines of one such report."""
SWEEP_INTERVAL = 600.0
"""Seconds between two removals of what has expired."""

_MODULE_STEPS = {StepKind.TELL: IntentKind.TELL, StepKind.DESTROY: IntentKind.DESTROY}
"""Steps that need a module: each becomes an intent, which `IntentRunner` executes."""


class Custodian:
    """Call `tick` repeatedly, or `run`. All its decisions follow from the registry and `timeline.plan`."""

    def __init__(
        self,
        store: Store,
        backends: Backends,
        confirmation: Confirmation,
        leader_lease: LeaderLease,
        *,
        record: EpochRecord,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._confirmation = confirmation
        self._leader_lease = leader_lease
        self._record = record
        self._intents = IntentRunner(store, backends, leader_lease)
        self._monotonic = monotonic
        self._boot = leader_lease.boot
        self._database_lost_at: int | None = None
        self._logged_code = ""
        self._rolled_back_at = 0
        self._planned_epoch: Epoch | None = None
        self._next_plan = self._next_dead_workers = self._next_expiry = self._next_sweep = monotonic()

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop`; a tick that fails is logged and the next one tries again."""
        while not stop.is_set():
            began = self._boot()
            try:
                self.tick()
            except Fenced:
                self._leader_lease.note_loss()
            except errors.Error as error:
                self._log_failure(error, began)
            except Exception as error:
                defect = type(error).__name__
                if defect != self._logged_code:
                    self._logged_code = defect
                    log.exception("custodian_tick_failed")
            else:
                self._log_recovery()
            stop.wait(PACE)
        self._leader_lease.release()

    def _log_failure(self, error: errors.Error, since: int) -> None:
        """Log a tick's error once, until a tick succeeds. `since`: when the tick began (boot clock)."""
        if isinstance(error, errors.RegistryRolledBack):
            self._log_recovery(self._logged_code)
            if error.code != self._logged_code:
                self._logged_code, self._rolled_back_at = error.code, since
                log.error("registry_rolled_back", process="custodian", detail=error.detail, next_step=error.next_step)
        elif isinstance(error, errors.StoreUnavailable):
            if self._database_lost_at is None:
                self._database_lost_at = since
                log.warning("database_lost", process="custodian", **error.explanation)
        elif error.code != self._logged_code:
            self._logged_code = error.code
            log.warning("custodian_tick_refused", code=error.code, detail=error.detail)

    def _log_recovery(self, still: str = "") -> None:
        """Log that the database answers; `still` is the code of an error that lasts."""
        if self._logged_code == errors.RegistryRolledBack.code != still:
            seconds = round((self._boot() - self._rolled_back_at) / SECOND, 3)
            log.info("registry_accepted", process="custodian", seconds=seconds)
        self._logged_code = still
        if self._database_lost_at is not None:
            seconds = round((self._boot() - self._database_lost_at) / SECOND, 3)
            log.info("database_recovered", process="custodian", seconds=seconds)
            self._database_lost_at = None

    def tick(self) -> None:
        """One round: acquire or renew the lease, finish intents, then take the steps that are due."""
        if not self._leader_lease.acquire_or_renew(self._intents.abandon_started):
            return
        if self._monotonic() >= self._next_dead_workers:
            self._next_dead_workers = self._monotonic() + DEAD_WORKERS_INTERVAL
            self._confirmation.deregister_dead_workers()
        self._intents.run_due()
        self._record_visibility()
        self._take_due_steps()
        self._report_expiry()
        if self._monotonic() >= self._next_sweep:
            self._next_sweep = self._monotonic() + SWEEP_INTERVAL
            self._sweep()

    def _report_expiry(self) -> None:
        """Log once a day which API tokens and external keys end soon."""
        if self._monotonic() < self._next_expiry:
            return
        with self._store.read() as tx:
            found = list_ending(tx)
        self._next_expiry = self._monotonic() + EXPIRY_INTERVAL
        for ending in found[:MAX_EXPIRY_LINES]:
            log.warning(
                "ends_soon",
                what=ending.words,
                subject=ending.subject,
                end=format_instant(ending.end),
                next_step=ending.next_step,
            )
        if more := len(found[MAX_EXPIRY_LINES:]):
            log.warning("more_end_soon", count=more, next_step="kms-jwks doctor")

    def _sweep(self) -> None:
        """Remove the Idempotency-Keys whose day is over."""
        with self._store.read() as tx:
            if not tx.has_expired_idempotency_records():
                return
        with self._leader_lease.fenced_write() as tx:
            tx.remove_expired_idempotency_records()

    # --- visibility

    def _record_visibility(self) -> None:
        """A published version is visible once every registered worker has confirmed an epoch that holds it (I1)."""
        with self._store.read() as tx:
            if not _newly_visible(tx):
                return
        with self._leader_lease.fenced_write() as tx:
            for version in _newly_visible(tx):
                tx.save(replace(version, visible_since=tx.now()))

    # --- planned steps

    def _take_due_steps(self) -> None:
        with self._store.read() as tx:
            tx.require_known_history()
            epoch, known = tx.epoch(), tx.known_epoch
            if epoch.is_same(self._planned_epoch) and self._monotonic() < self._next_plan:
                return
            due = _due_steps(tx)
        # A custodian may run on a node without workers. A disk that is full does not stop it: the record is kept in
        # memory then, and the workers of this node, which sign, say so.
        with contextlib.suppress(errors.StoreUnavailable):
            self._record.advance(known, epoch)
        for key_set, step in due:
            try:
                with self._leader_lease.fenced_write() as tx:
                    current = tx.key_set_by_id(key_set.id)
                    # Check the reason again in the transaction: the registry may have changed since the plan.
                    if current is not None and _still_due(tx, current, step):
                        self._take(tx, current, step)
            except errors.Conflict as error:
                log.warning("custodian_step_refused", step=step.kind.value, subject=step.subject, detail=error.detail)
        self._planned_epoch, self._next_plan = epoch, self._monotonic() + PLAN_INTERVAL

    def _take(self, tx: WriteTx, key_set: KeySet, step: Step) -> None:
        log.info("custodian_step", step=step.kind.value, subject=step.subject, reason=step.reason)
        match step.kind:
            case StepKind.REMOVE_EXTERNAL:
                external = next(e for e in tx.external_keys(key_set.id) if e.id == step.subject)
                transitions.withdraw_external(tx, external, "expired")
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
            case StepKind.RETIRE:
                version, key = _version(tx, step.subject)
                transitions.retire(tx, key, version)
            case StepKind.TELL | StepKind.DESTROY:
                version, _ = _version(tx, step.subject)
                transitions.add_intent(tx, _MODULE_STEPS[step.kind], version, tx.now())


def _version(tx: ReadTx, version_id: Id) -> tuple[KeyVersion, Key]:
    version = tx.version(version_id)
    key = tx.key_by_id(version.key_id) if version is not None else None
    assert version is not None and key is not None
    return version, key


def _due_steps(tx: ReadTx) -> list[tuple[KeySet, Step]]:
    """The steps that are due in every key set, from one read of each table."""
    now = tx.now()
    keys, versions, externals = tx.keys(), tx.versions(), tx.external_keys()
    open_intents = _open_intents(tx)
    found = []
    for key_set in tx.key_sets():
        steps = timeline.plan(
            key_set,
            [k for k in keys if k.key_set_id == key_set.id],
            [v for v in versions if v.key_set_id == key_set.id],
            now,
            [e for e in externals if e.key_set_id == key_set.id],
        )
        found += [(key_set, step) for step in steps if step.is_due(now) and not _has_intent(step, open_intents)]
    return found


def _open_intents(tx: ReadTx) -> set[tuple[IntentKind, Id]]:
    return {(intent.kind, intent.version_id) for intent in tx.intents(states=OPEN)}


def _has_intent(step: Step, open_intents: set[tuple[IntentKind, Id]]) -> bool:
    kind = _MODULE_STEPS.get(step.kind)
    return kind is not None and (kind, step.subject) in open_intents


def plan_of(tx: ReadTx, key_set: KeySet, now: Instant) -> list[Step]:
    """The plan of one key set."""
    versions = tx.versions(key_set_id=key_set.id)
    return timeline.plan(key_set, tx.keys(key_set.id), versions, now, tx.external_keys(key_set.id))


def _still_due(tx: ReadTx, key_set: KeySet, step: Step) -> bool:
    now = tx.now()
    same = [s for s in plan_of(tx, key_set, now) if (s.kind, s.subject) == (step.kind, step.subject)]
    return any(s.is_due(now) for s in same) and not _has_intent(step, _open_intents(tx))


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
