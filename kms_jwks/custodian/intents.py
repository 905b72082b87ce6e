"""What the custodian does in modules: one intent at a time, written before the attempt, ended under the same term.

The mutation happens outside any transaction. What a crash leaves is abandoned by the successor, never resumed: a pair
in the module that nothing refers to is then surplus, and `doctor` lists it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import structlog

from kms_jwks import errors, jose, timeline
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Backend, Evidence, GeneratedKey, KeyRef, stuck_in
from kms_jwks.backends.calling import Backends
from kms_jwks.custodian import transitions
from kms_jwks.custodian.leader_lease import Fenced, LeaderLease
from kms_jwks.model import DAY, Instant, Intent, IntentKind, IntentState, KeyVersion, VersionState
from kms_jwks.store import ReadTx, Store, WriteTx

log = structlog.get_logger(__name__)

MAX_BACKOFF = 60
LONGEST_WAIT = (timeline.TELL_DAYS[1] + 1) * DAY
"""Seconds for which a module may put a destruction off; of other attempts `MAX_BACKOFF`."""

OPEN = frozenset({IntentState.PENDING, IntentState.STARTED})


class IntentRunner:
    """The intents of an installation, worked off by who holds the office."""

    def __init__(self, store: Store, backends: Backends, office: LeaderLease) -> None:
        self._store = store
        self._backends = backends
        self._leader_lease = office

    def abandon(self, tx: WriteTx) -> None:
        """Close what a predecessor had begun; what is still wanted gets a fresh attempt."""
        self._backends.bind(tx.versions())
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
            if version is not None and _may_go_on(intent, version):
                transitions.add_intent(tx, intent.kind, version, tx.now(), attempt=intent.attempt + 1)
            log.warning("intent_abandoned", intent=intent.id, kind=intent.kind.value, label=intent.label)

    def run_due(self) -> None:
        """Make the attempts that are due. Raises Fenced, StoreUnavailable; a module's failures are written down."""
        with self._store.read() as tx:
            now = tx.now()
            left_over = tx.intents(states={IntentState.STARTED})
            waiting = [i for i in tx.intents(states={IntentState.PENDING}) if i.not_before <= now and _wanted(tx, i)]
        if left_over:
            # One thread works them off, so none can be under way here: its end could not be written.
            with self._leader_lease.mutation() as tx:
                self.abandon(tx)
        for intent in waiting:
            if not self.begin(intent):
                continue
            self._attempt(intent)
            if not self._leader_lease.hold(self.abandon):
                return

    def begin(self, intent: Intent) -> bool:
        """Mark an attempt as begun; False, and no attempt, where its reason is gone."""
        with self._leader_lease.mutation() as tx:
            current = tx.intent(intent.id)
            if current is None or current.state is not IntentState.PENDING:
                return False
            version = tx.version(intent.version_id)
            if version is None or not _STILL_WANTED[intent.kind](version, tx.now()):
                tx.save(replace(current, state=IntentState.ABANDONED, finished_at=tx.now(), error="no longer wanted"))
                return False
            tx.save(replace(current, state=IntentState.STARTED, term=self._leader_lease.term))
            return True

    def _attempt(self, intent: Intent) -> None:
        does = {IntentKind.GENERATE: self._generate, IntentKind.DESTROY: self._destroy, IntentKind.TELL: self._tell}
        try:
            # A module may take longer than the office lasts.
            with self._leader_lease.kept():
                does[intent.kind](intent)
        except errors.Error as error:
            try:
                self._postpone(intent, error)
            finally:
                if isinstance(error, errors.BackendTimeout) and (stuck := stuck_in(self._backends.get(intent.backend))):
                    self._leader_lease.give_up(stuck)
        except Fenced:
            raise
        except Exception as error:
            log.exception("module_step_broke", intent=intent.id)
            self._postpone(
                intent, errors.BackendRefused(f"The backend failed in a way it must not ({type(error).__name__}).")
            )

    # --- a pair is made

    def _generate(self, intent: Intent) -> None:
        with self._store.read() as tx:
            version = tx.version(intent.version_id)
            assert version is not None
            purpose = _purpose(tx, version)
        backend, alg = self._backends.get(intent.backend), ALGORITHMS[version.alg]
        made = backend.generate(intent.label, alg, rsa_bits=version.rsa_bits, purpose=purpose)
        try:
            evidence = backend.attributes(made.ref)
            if not evidence.holds:
                raise errors.BackendRefused("The module made a key that is not sign-only and non-extractable.")
            self._record(intent, made, evidence)
        except errors.StoreUnavailable:
            # It may have been written, and only the answer was lost: then this pair is a version's. Surplus at worst.
            raise
        except Exception:
            # Nobody will ever use this pair: the next attempt makes another.
            with contextlib.suppress(errors.Error):
                backend.destroy(made.ref)
            raise

    def _record(self, intent: Intent, made: GeneratedKey, evidence: Evidence) -> None:
        with self._leader_lease.mutation() as tx:
            current, version = _current(tx, intent)
            if current.state is not IntentState.STARTED or version.state is not VersionState.CREATING:
                log.warning("pair_is_surplus", label=intent.label)
                return
            tx.save(
                replace(
                    version,
                    kid=jose.thumbprint(made.public_jwk),
                    ref=made.ref.as_dict(),
                    public_jwk=dict(made.public_jwk),
                    evidence=evidence.as_dict(),
                )
            )
            tx.save(replace(current, state=IntentState.DONE, finished_at=tx.now()))
            _publish(tx, version)
        log.info("key_pair_made", version=version.id, alg=version.alg, label=intent.label)

    # --- a pair goes

    def _destroy(self, intent: Intent) -> None:
        version = self._version(intent)
        assert version.ref is not None
        backend, ref = self._backends.get(intent.backend), KeyRef.of(**version.ref)
        backend.destroy(ref)
        answers = _absent(backend, ref)
        with self._leader_lease.mutation() as tx:
            current, version = _current(tx, intent)
            if current.state is not IntentState.STARTED or version.state is VersionState.DESTROYED:
                return
            now = tx.now()
            absence = {**answers, "recorded_at": now}
            tx.save(replace(version, state=VersionState.DESTROYED, destroyed_at=now, absence=absence))
            tx.save(replace(current, state=IntentState.DONE, finished_at=now))
        log.info("key_pair_destroyed", version=intent.version_id)

    def _tell(self, intent: Intent) -> None:
        told = self._say(intent)
        try:
            with self._leader_lease.mutation() as tx:
                current, version = _current(tx, intent)
                if current.state is IntentState.STARTED:
                    # What was told, even if another date was set meanwhile: then the plan tells that one.
                    tx.save(replace(version, destroy_told=told))
                    tx.save(replace(current, state=IntentState.DONE, finished_at=tx.now()))
        except Fenced:
            # The successor may have told the module before this word arrived there: the last word must be the truth.
            self._say(intent)
            raise
        log.info("module_told", version=intent.version_id, destroy_at=told)

    def _say(self, intent: Intent) -> Instant | None:
        """Tell the module the destruction date that the registry holds now. Returns it."""
        with self._store.read() as tx:
            version, now = tx.version(intent.version_id), tx.now()
        assert version is not None and version.ref is not None
        backend, ref = self._backends.get(intent.backend), KeyRef.of(**version.ref)
        gone = timeline.destructible_at(version)
        if gone is None:
            backend.cancel_destroy(ref)
        else:
            backend.schedule_destroy(ref, timeline.days_until(gone, now))
        return version.destroy_at

    # --- an attempt fails

    def _postpone(self, intent: Intent, error: errors.Error) -> None:
        """A failed attempt: another one later under a new label, or none where the module will never do it."""
        hopeless = isinstance(error, errors.UnsupportedAlgorithm)
        with self._leader_lease.mutation() as tx:
            current, version = _current(tx, intent)
            if current.state is not IntentState.STARTED:
                return
            now = tx.now()
            tx.save(replace(current, state=IntentState.FAILED, finished_at=now, error=error.detail))
            if hopeless and version.state is VersionState.CREATING:
                tx.save(replace(version, state=VersionState.DESTROYED, destroyed_at=now))
                _publish(tx, version)
            elif _may_go_on(intent, version):
                not_before = timeline.later(now, _patience(intent, error))
                transitions.add_intent(tx, intent.kind, version, not_before, attempt=intent.attempt + 1)
        log.warning("module_step_failed", kind=intent.kind.value, code=error.code, error=error.detail)

    def _version(self, intent: Intent) -> KeyVersion:
        with self._store.read() as tx:
            version = tx.version(intent.version_id)
        assert version is not None
        return version


def _purpose(tx: ReadTx, version: KeyVersion) -> dict[str, str]:
    """What a key pair is for, by names, for modules that keep tags."""
    key_set, key = tx.key_set_by_id(version.key_set_id), tx.key_by_id(version.key_id)
    assert key_set is not None and key is not None
    return {"key-set": key_set.name, "key": key.name, "version": str(version.number)}


def _patience(intent: Intent, error: errors.Error) -> int:
    """Seconds until the next attempt: the module's own word, within bounds, or twice as long each time."""
    backoff = min(1 << min(intent.attempt, 6), MAX_BACKOFF)
    longest = LONGEST_WAIT if intent.kind is IntentKind.DESTROY else MAX_BACKOFF
    return max(backoff, min(error.retry_after or 0, longest))


def _absent(backend: Backend, ref: KeyRef) -> dict[str, object]:
    """What the module says when it is asked for a key that was destroyed. Raises unless both halves are gone."""
    answers: dict[str, object] = {}
    questions: dict[str, Callable[[KeyRef], object]] = {
        "public_key": backend.public_key,
        "attributes": backend.attributes,
    }
    for name, question in questions.items():
        try:
            question(ref)
        except errors.BackendKeyNotFound as answer:
            answers[name] = answer.code
        else:
            raise errors.BackendUnavailable("The module still holds the key after its destruction.")
    # A module that is away must not pass for one that has no such key.
    return {**answers, "module": backend.ping().description}


def _current(tx: WriteTx, intent: Intent) -> tuple[Intent, KeyVersion]:
    current, version = tx.intent(intent.id), tx.version(intent.version_id)
    assert current is not None and version is not None
    return current, version


def _publish(tx: WriteTx, version: KeyVersion) -> None:
    key_set = tx.key_set_by_id(version.key_set_id)
    assert key_set is not None
    transitions.publish_ready(tx, key_set)


# --- is it still wanted? ----------------------------------------------------------------------------------------------


def _pair_wanted(version: KeyVersion, _: Instant) -> bool:
    return version.state is VersionState.CREATING


def _destruction_wanted(version: KeyVersion, now: Instant) -> bool:
    """It may have been put off or taken back while the module was away."""
    gone = timeline.destructible_at(version)
    return version.state in (VersionState.RETIRED, VersionState.REVOKED) and gone is not None and gone <= now


def _telling_wanted(version: KeyVersion, _: Instant) -> bool:
    leaving = version.state in (VersionState.RETIRED, VersionState.REVOKED)
    return leaving and version.ref is not None and version.destroy_told != version.destroy_at


_STILL_WANTED: dict[IntentKind, Callable[[KeyVersion, Instant], bool]] = {
    IntentKind.GENERATE: _pair_wanted,
    IntentKind.DESTROY: _destruction_wanted,
    IntentKind.TELL: _telling_wanted,
}


def _may_go_on(intent: Intent, version: KeyVersion) -> bool:
    """Whether another attempt has a point."""
    if intent.kind is IntentKind.GENERATE:
        return version.state is VersionState.CREATING
    return version.state is not VersionState.DESTROYED


def _wanted(tx: ReadTx, intent: Intent) -> bool:
    """A disabled key is only withdrawn from and destroyed in: its pairs wait until it is enabled."""
    if intent.kind is not IntentKind.GENERATE:
        return True
    version = tx.version(intent.version_id)
    key = tx.key_by_id(version.key_id) if version is not None else None
    return key is None or key.disabled_at is None
