"""The custodian: the one process of an installation that makes and destroys keys in modules and keeps the calendar.

One acts, fenced by its term; others stand by. Before each module mutation an intent stands in the registry, the
mutation happens outside any transaction, and its result is written only under the same term. What a crash leaves is
abandoned by the successor, never resumed: the pair in the module is then surplus, and `doctor` lists it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace

import structlog

from kms_jwks import errors, jose, timeline
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Evidence, GeneratedKey, KeyRef
from kms_jwks.model import (
    IN_JWKS,
    Epoch,
    Instant,
    Intent,
    IntentKind,
    IntentState,
    KeySet,
    KeyVersion,
    VersionState,
)
from kms_jwks.service import lifecycle
from kms_jwks.service.confirmation import Confirmation
from kms_jwks.service.modules import Modules
from kms_jwks.service.office import Fenced, Office
from kms_jwks.store import ReadTx, Store, WriteTx
from kms_jwks.timeline import Step, StepKind

log = structlog.get_logger(__name__)

PACE = 0.15
"""Seconds between two ticks."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the calendar while the epoch stays the same."""
REAP_EVERY = 0.5
MAX_BACKOFF = 60


class Custodian:
    """Call `tick` again and again, or `run`. Everything it decides comes from the registry and `timeline.plan`."""

    def __init__(self, store: Store, modules: Modules, confirmation: Confirmation, office: Office) -> None:
        self._store = store
        self._modules = modules
        self._confirmation = confirmation
        self._office = office
        self._planned_under: Epoch | None = None
        self._next_look = 0.0
        self._next_reap = 0.0

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop`; a tick that fails is logged and the next one tries again."""
        trouble = ""
        while not stop.is_set():
            try:
                self.tick()
                trouble = ""
            except Fenced:
                log.info("custodian_fenced", term=self._office.term)
                self._office.term = 0
            except errors.Error as error:
                if error.code != trouble:
                    log.warning("custodian_held_up", error=error.detail, code=error.code)
                trouble = error.code
            except Exception:
                log.exception("custodian_tick_failed")
            stop.wait(PACE)
        self._office.resign()

    def tick(self) -> None:
        """One round: stay in office, finish what was begun, then do what is due."""
        if not self._office.hold(self._abandon):
            return
        if time.monotonic() >= self._next_reap:
            self._next_reap = time.monotonic() + REAP_EVERY
            self._confirmation.reap()
        self._work_off_intents()
        self._note_visibility()
        self._take_due_steps()

    # --- what a predecessor left

    def _abandon(self, tx: WriteTx) -> None:
        """Close what a predecessor had begun; a version that still waits for its pair gets a fresh attempt."""
        self._modules.bind(tx.versions())
        for intent in tx.intents(states={IntentState.STARTED}):
            tx.save(
                replace(
                    intent,
                    state=IntentState.ABANDONED,
                    finished_at=tx.now(),
                    error="the custodian ended before the attempt did",
                )
            )
            version = tx.version(intent.version_id)
            if version is None:
                continue
            unfinished = intent.kind is IntentKind.DESTROY or version.state is VersionState.CREATING
            if unfinished and version.state is not VersionState.DESTROYED:
                lifecycle.add_intent(tx, intent.kind, version, tx.now(), attempt=intent.attempt + 1)
            log.warning("intent_abandoned", intent=intent.id, kind=intent.kind.value, label=intent.label)

    # --- intents

    def _work_off_intents(self) -> None:
        with self._store.read() as tx:
            now = tx.now()
            left_over = tx.intents(states={IntentState.STARTED})
            waiting = [i for i in tx.intents(states={IntentState.PENDING}) if i.not_before <= now and _wanted(tx, i)]
        if left_over:
            # One thread works them off, so none can be under way here: its end could not be written.
            with self._office.mutation() as tx:
                self._abandon(tx)
        for intent in waiting:
            if not self._begin(intent):
                continue
            try:
                # A module may take longer than the office lasts.
                with self._office.kept():
                    if intent.kind is IntentKind.GENERATE:
                        self._generate(intent)
                    else:
                        self._destroy(intent)
            except errors.Error as error:
                self._postpone(intent, error)
            except Fenced:
                raise
            except Exception as error:
                log.exception("module_step_broke", intent=intent.id)
                self._postpone(
                    intent, errors.BackendRefused(f"The backend failed in a way it must not ({type(error).__name__}).")
                )
            if not self._office.hold(self._abandon):
                return

    def _begin(self, intent: Intent) -> bool:
        with self._office.mutation() as tx:
            current = tx.intent(intent.id)
            if current is None or current.state is not IntentState.PENDING:
                return False
            version = tx.version(intent.version_id)
            wanted = version is not None and (
                version.state is VersionState.CREATING
                if intent.kind is IntentKind.GENERATE
                else version.state in (VersionState.RETIRED, VersionState.REVOKED)
                # It may have been put off or taken back while the module was away.
                and version.destroy_at is not None
                and version.destroy_at <= tx.now()
            )
            if not wanted:
                tx.save(replace(current, state=IntentState.ABANDONED, finished_at=tx.now(), error="no longer wanted"))
                return False
            tx.save(replace(current, state=IntentState.STARTED, term=self._office.term))
            return True

    def _generate(self, intent: Intent) -> None:
        with self._store.read() as tx:
            version = tx.version(intent.version_id)
            purpose = _purpose(tx, version) if version is not None else {}
        assert version is not None
        backend = self._modules.get(intent.backend)
        alg = ALGORITHMS[version.alg]
        made = backend.generate(intent.label, alg, rsa_bits=version.rsa_bits, purpose=purpose)
        try:
            evidence = backend.attributes(made.ref)
            if not evidence.holds:
                raise errors.BackendRefused("The module made a key that is not sign-only and non-extractable.")
            self._record(intent, made, evidence)
        except Exception:
            # Nobody will ever use this pair: the next attempt makes another.
            with contextlib.suppress(errors.Error):
                backend.destroy(made.ref)
            raise

    def _record(self, intent: Intent, made: GeneratedKey, evidence: Evidence) -> None:
        with self._office.mutation() as tx:
            current, version = tx.intent(intent.id), tx.version(intent.version_id)
            assert current is not None and version is not None
            if current.state is not IntentState.STARTED or version.state is not VersionState.CREATING:
                log.warning("pair_is_surplus", label=intent.label)
                return
            tx.save(
                replace(
                    version,
                    kid=jose.thumbprint(made.public_jwk),
                    ref=made.ref.as_dict(),
                    public_jwk=dict(made.public_jwk),
                    evidence={
                        "attributes": dict(evidence.attributes),
                        "generated_in_module": evidence.generated_in_module,
                        "non_extractable": evidence.non_extractable,
                        "sign_only": evidence.sign_only,
                    },
                )
            )
            tx.save(replace(current, state=IntentState.DONE, finished_at=tx.now()))
            key_set = tx.key_set_by_id(version.key_set_id)
            assert key_set is not None
            lifecycle.publish_ready(tx, key_set)
        log.info("key_pair_made", version=version.id, alg=version.alg, label=intent.label)

    def _destroy(self, intent: Intent) -> None:
        with self._store.read() as tx:
            version = tx.version(intent.version_id)
        assert version is not None and version.ref is not None
        backend, ref = self._modules.get(intent.backend), KeyRef.of(**version.ref)
        backend.destroy(ref)
        try:
            backend.public_key(ref)
        except errors.KeyNotFound:
            pass
        else:
            raise errors.BackendUnavailable("The module still holds the key after its destruction.")
        with self._office.mutation() as tx:
            current, version = tx.intent(intent.id), tx.version(intent.version_id)
            assert current is not None and version is not None
            now = tx.now()
            tx.save(replace(version, state=VersionState.DESTROYED, destroyed_at=now))
            tx.save(replace(current, state=IntentState.DONE, finished_at=now))
        log.info("key_pair_destroyed", version=intent.version_id)

    def _postpone(self, intent: Intent, error: errors.Error) -> None:
        """A failed attempt: another one later under a new label, or none where the module will never do it."""
        hopeless = isinstance(error, errors.UnsupportedAlgorithm)
        with self._office.mutation() as tx:
            current, version = tx.intent(intent.id), tx.version(intent.version_id)
            assert current is not None and version is not None
            if current.state is not IntentState.STARTED:
                return
            now = tx.now()
            tx.save(replace(current, state=IntentState.FAILED, finished_at=now, error=error.detail))
            if hopeless and version.state is VersionState.CREATING:
                tx.save(replace(version, state=VersionState.DESTROYED, destroyed_at=now))
                key_set = tx.key_set_by_id(version.key_set_id)
                assert key_set is not None
                lifecycle.publish_ready(tx, key_set)
            else:
                wait = min(2 ** min(intent.attempt, 6), MAX_BACKOFF)
                lifecycle.add_intent(tx, intent.kind, version, timeline.later(now, wait), attempt=intent.attempt + 1)
        log.warning("module_step_failed", kind=intent.kind.value, code=error.code, error=error.detail)

    # --- visibility

    def _note_visibility(self) -> None:
        """A published version is visible once every registered worker has confirmed an epoch that holds it (I1)."""
        with self._store.read() as tx:
            if not _newly_visible(tx):
                return
        with self._office.mutation() as tx:
            for version in _newly_visible(tx):
                tx.save(replace(version, visible_since=tx.now()))

    # --- the calendar

    def _take_due_steps(self) -> None:
        with self._store.read() as tx:
            epoch = tx.epoch()
            if epoch == self._planned_under and time.monotonic() < self._next_look:
                return
            due = _due_everywhere(tx)
        for key_set, step in due:
            try:
                with self._office.mutation() as tx:
                    current = tx.key_set_by_id(key_set.id)
                    # The reason is looked at again under the lock: somebody may have acted meanwhile.
                    if current is not None and _still_due(tx, current, step):
                        self._take(tx, current, step)
            except errors.Conflict as error:
                log.warning("step_refused", step=step.kind.value, error=error.detail)
        self._planned_under, self._next_look = epoch, time.monotonic() + LOOK_EVERY

    def _take(self, tx: WriteTx, key_set: KeySet, step: Step) -> None:
        log.info("custodian_step", step=step.kind.value, subject=step.subject, reason=step.reason)
        if step.kind is StepKind.REMOVE_EXTERNAL:
            external = next(e for e in tx.external_keys(key_set.id) if e.id == step.subject)
            tx.save(replace(external, removed_at=tx.now()))
            return
        if step.kind is StepKind.CREATE:
            key = tx.key_by_id(step.subject)
            assert key is not None
            lifecycle.ensure_standby(tx, key)
            return
        version = tx.version(step.subject)
        key = tx.key_by_id(version.key_id) if version is not None else None
        assert version is not None and key is not None
        if step.kind is StepKind.ACTIVATE:
            lifecycle.activate(
                tx,
                key_set,
                key,
                version,
                lease=self._confirmation.lease(tx),
                breach=step.reason if step.breach is not None else None,
            )
        elif step.kind is StepKind.WITHDRAW:
            lifecycle.withdraw(tx, key, version)
        else:
            pending = {IntentState.PENDING, IntentState.STARTED}
            if not any(i.kind is IntentKind.DESTROY for i in tx.intents(states=pending, version_id=version.id)):
                lifecycle.add_intent(tx, IntentKind.DESTROY, version, tx.now())


def _purpose(tx: ReadTx, version: KeyVersion) -> dict[str, str]:
    """What a key pair is for, by names, for modules that keep tags."""
    key_set, key = tx.key_set_by_id(version.key_set_id), tx.key_by_id(version.key_id)
    assert key_set is not None and key is not None
    return {"key-set": key_set.name, "key": key.name, "version": str(version.number)}


def _due_everywhere(tx: ReadTx) -> list[tuple[KeySet, Step]]:
    """What is due in every key set, from one read of each table."""
    now = tx.now()
    keys, versions, externals = tx.keys(), tx.versions(), tx.external_keys()
    found = []
    for key_set in tx.key_sets():
        steps = timeline.plan(
            [k for k in keys if k.key_set_id == key_set.id],
            [v for v in versions if v.key_set_id == key_set.id],
            [e for e in externals if e.key_set_id == key_set.id],
            now,
        )
        found += [(key_set, step) for step in steps if step.due <= now]
    return found


def _plan(tx: ReadTx, key_set: KeySet, now: Instant) -> list[Step]:
    return timeline.plan(tx.keys(key_set.id), tx.versions(key_set_id=key_set.id), tx.external_keys(key_set.id), now)


def _still_due(tx: ReadTx, key_set: KeySet, step: Step) -> bool:
    now = tx.now()
    return any((s.kind, s.subject) == (step.kind, step.subject) and s.due <= now for s in _plan(tx, key_set, now))


def _wanted(tx: ReadTx, intent: Intent) -> bool:
    """A disabled key is only withdrawn from and destroyed in: its pairs wait until it is enabled."""
    if intent.kind is IntentKind.DESTROY:
        return True
    version = tx.version(intent.version_id)
    key = tx.key_by_id(version.key_id) if version is not None else None
    return key is None or key.disabled_at is None


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
