"""What the custodian does in modules: one intent at a time, recorded before the attempt and ended under the same term.

The module call happens outside any transaction. The next term abandons an attempt that a crash interrupted and never
resumes it; a key pair that no version refers to is then surplus, and `doctor` lists it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog

from kms_jwks import errors, jose, timeline
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Backend, Evidence, GeneratedKey, KeyRef
from kms_jwks.backends.calling import Backends
from kms_jwks.custodian import transitions
from kms_jwks.custodian.leader_lease import Fenced, LeaderLease
from kms_jwks.model import DAY, Instant, Intent, IntentKind, IntentState, KeyVersion, VersionState
from kms_jwks.store import ReadTx, Store, WriteTx
from kms_jwks.times import format_instant

log = structlog.get_logger(__name__)

MAX_BACKOFF = 60
"""Seconds between two attempts at most."""
MAX_GENERATIONS = 100
"""Attempts to make the key pair of one version; about an hour and a half."""
MAX_DESTRUCTION_DELAY = (timeline.TELL_DAYS[1] + 1) * DAY
"""Seconds for which a module may postpone a destruction."""

OPEN = frozenset({IntentState.PENDING, IntentState.STARTED})


class IntentRunner:
    """Executes the intents of an installation, while its custodian holds the leader lease."""

    def __init__(self, store: Store, backends: Backends, leader_lease: LeaderLease) -> None:
        self._store = store
        self._backends = backends
        self._leader_lease = leader_lease

    def abandon_started(self, tx: WriteTx) -> None:
        """Abandon the attempts that an earlier term started; where one is still wanted, add a new attempt."""
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
            if version is not None and _may_retry(intent, version):
                transitions.add_intent(tx, intent.kind, version, tx.now(), attempt=intent.attempt + 1)
            log.warning("intent_abandoned", intent=intent.id, kind=intent.kind.value, label=intent.label)

    def run_due(self) -> None:
        """Make the attempts that are due. A module's errors are recorded. Raises Fenced, StoreUnavailable."""
        with self._store.read() as tx:
            now = tx.now()
            unfinished = tx.intents(states={IntentState.STARTED})
            due = [i for i in tx.intents(states={IntentState.PENDING}) if i.not_before <= now and _allowed(tx, i)]
        if unfinished:
            # Attempts run in this thread only, so none is under way now: the end of these could not be recorded.
            with self._leader_lease.fenced_write() as tx:
                self.abandon_started(tx)
        for intent in due:
            if not self.start(intent):
                continue
            self._attempt(intent)
            if not self._leader_lease.acquire_or_renew(self.abandon_started):
                return

    def start(self, intent: Intent) -> bool:
        """Mark an attempt as started; False, and no attempt is made, if its reason is gone."""
        with self._leader_lease.fenced_write() as tx:
            current = tx.intent(intent.id)
            if current is None or current.state is not IntentState.PENDING:
                return False
            version = tx.version(intent.version_id)
            if version is None or not _WANTED[intent.kind](version, tx.now()):
                tx.save(replace(current, state=IntentState.ABANDONED, finished_at=tx.now(), error="no longer wanted"))
                return False
            tx.save(replace(current, state=IntentState.STARTED, term=self._leader_lease.term))
            return True

    def _attempt(self, intent: Intent) -> None:
        steps = {IntentKind.GENERATE: self._generate, IntentKind.DESTROY: self._destroy, IntentKind.TELL: self._tell}
        try:
            # A module may take longer than the lease lasts.
            with self._leader_lease.renew_during_step():
                steps[intent.kind](intent)
        except errors.Error as error:
            try:
                self._record_failure(intent, error, self._is_final(intent, error))
            finally:
                is_late = isinstance(error, errors.BackendTimeout)
                if is_late and (stuck := self._backends.stuck_in(intent.backend)):
                    self._leader_lease.abandon_stuck_step(stuck)
        except Fenced:
            raise
        except Exception as error:
            log.exception("module_step_raised", intent=intent.id)
            defect = errors.BackendError(f"The backend failed in a way it must not ({type(error).__name__}).")
            self._record_failure(intent, defect)

    # --- generation

    def _generate(self, intent: Intent) -> None:
        with self._store.read() as tx:
            version = tx.version(intent.version_id)
            assert version is not None
            purpose = _purpose(tx, version)
        ask, seconds = partial(self._backends.ask, intent.backend), self._backends.timeouts(intent.backend)
        made: GeneratedKey = ask(
            "generate",
            lambda backend: backend.generate(
                intent.label, ALGORITHMS[version.alg], rsa_bits=version.rsa_bits, purpose=purpose
            ),
            seconds.change,
            undo=_undo_generation,
        )
        try:
            evidence: Evidence = ask("attributes", lambda backend: backend.attributes(made.ref), seconds.read)
            if not evidence.holds:
                raise errors.BackendRefused("The module made a key that is not sign-only and non-extractable.")
            is_wanted = self._record(intent, made, evidence)
        except errors.StoreUnavailable:
            # The record may be committed and only the answer lost: keep the pair. At worst it is surplus.
            raise
        except Exception:
            # This pair will never be used: the next attempt makes another.
            with contextlib.suppress(errors.Error):
                ask("destroy", lambda backend: backend.destroy(made.ref), seconds.change)
            raise
        if not is_wanted:
            with contextlib.suppress(errors.Error):
                ask("destroy", lambda backend: backend.destroy(made.ref), seconds.change)

    def _record(self, intent: Intent, made: GeneratedKey, evidence: Evidence) -> bool:
        """Record the pair on its version. False where the key was retired or deleted meanwhile: nothing refers to it.

        A pair of a module that was revoked meanwhile becomes surplus.
        """
        with self._leader_lease.fenced_write() as tx:
            current, version = _current(tx, intent)
            if current.state is IntentState.STARTED and version.failure is not None:
                tx.save(
                    replace(current, state=IntentState.ABANDONED, finished_at=tx.now(), error=version.failure["detail"])
                )
                return False
            if current.state is not IntentState.STARTED or version.state is not VersionState.CREATING:
                log.warning("key_pair_surplus", label=intent.label)
                return True
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
        log.info("key_pair_generated", version=version.id, alg=version.alg, label=intent.label)
        return True

    # --- destruction

    def _destroy(self, intent: Intent) -> None:
        version = self._version(intent)
        assert version.ref is not None
        ref, seconds = KeyRef.of(**version.ref), self._backends.timeouts(intent.backend)
        self._backends.ask(intent.backend, "destroy", lambda backend: backend.destroy(ref), seconds.change)
        answers = self._check_absence(intent.backend, ref)
        with self._leader_lease.fenced_write() as tx:
            current, version = _current(tx, intent)
            if current.state is not IntentState.STARTED or version.state is VersionState.DESTROYED:
                return
            now = tx.now()
            absence = {**answers, "recorded_at": now}
            tx.save(replace(version, state=VersionState.DESTROYED, destroyed_at=now, absence=absence))
            tx.save(replace(current, state=IntentState.DONE, finished_at=now))
        log.info("key_pair_destroyed", version=intent.version_id)

    def _tell(self, intent: Intent) -> None:
        told = self._tell_date(intent)
        try:
            with self._leader_lease.fenced_write() as tx:
                current, version = _current(tx, intent)
                if current.state is IntentState.STARTED:
                    # Record what the module was told, even if the date has changed: the plan then tells the new one.
                    tx.save(replace(version, destroy_told=told))
                    tx.save(replace(current, state=IntentState.DONE, finished_at=tx.now()))
        except Fenced:
            # The next custodian may have told the module before this call reached it, so tell the current date again:
            # the module's last word must be the registry's.
            self._tell_date(intent)
            raise
        log.info(
            "destruction_date_told",
            version=intent.version_id,
            destroy_at=None if told is None else format_instant(told),
        )

    def _tell_date(self, intent: Intent) -> Instant | None:
        """Tell the module the destruction date that the registry holds now, and return it."""
        with self._store.read() as tx:
            version, now = tx.version(intent.version_id), tx.now()
        assert version is not None and version.ref is not None
        ref, seconds = KeyRef.of(**version.ref), self._backends.timeouts(intent.backend)
        destroy_at = timeline.destructible_at(version)

        def tell(backend: Backend) -> None:
            if destroy_at is None:
                backend.cancel_destroy(ref)
            else:
                backend.schedule_destroy(ref, timeline.days_until(destroy_at, now))

        self._backends.ask(intent.backend, "schedule_destroy", tell, seconds.change)
        return version.destroy_at

    def _check_absence(self, name: str, ref: KeyRef) -> dict[str, object]:
        """The module's answers to queries for a key that was destroyed.

        Raises BackendError unless both halves are gone.
        """
        seconds = self._backends.timeouts(name).read
        answers: dict[str, object] = {}
        questions: dict[str, Callable[[Backend], object]] = {
            "public_key": lambda backend: backend.public_key(ref),
            "attributes": lambda backend: backend.attributes(ref),
        }
        for what, question in questions.items():
            try:
                self._backends.ask(name, what, question, seconds)
            except errors.BackendKeyNotFound as answer:
                answers[what] = answer.code
            else:
                raise errors.BackendUnavailable("The module still holds the key after its destruction.")
        # A module that does not answer must not count as one that does not hold the key.
        health = self._backends.ask(name, "ping", lambda backend: backend.ping(), seconds)
        return {**answers, "module": health.description}

    # --- failure

    def _is_final(self, intent: Intent, error: errors.Error) -> bool:
        """Whether the module declines to make this key pair, so that repeating the attempt changes nothing.

        A module that refuses everything, such as one with a wrong PIN, says nothing about the pair.
        """
        if intent.kind is not IntentKind.GENERATE or not isinstance(error, errors.BackendRefused):
            return isinstance(error, errors.UnsupportedAlgorithm)
        seconds = self._backends.timeouts(intent.backend).read
        try:
            with self._leader_lease.renew_during_step():
                self._backends.ask(intent.backend, "ping", lambda backend: backend.ping(), seconds)
        except errors.BackendError:
            return False
        return True

    def _record_failure(self, intent: Intent, error: errors.Error, is_final: bool = False) -> None:
        """Record a failed attempt, and add a later one under a new label.

        A version is given up where the failure `is_final`, or after `MAX_GENERATIONS` attempts.
        """
        is_final = is_final or intent.attempt >= MAX_GENERATIONS
        given_up: dict[str, str] = {}
        with self._leader_lease.fenced_write() as tx:
            current, version = _current(tx, intent)
            if current.state is not IntentState.STARTED:
                return
            now = tx.now()
            detail = error.detail.replace("\0", "?")  # PostgreSQL stores no U+0000
            tx.save(replace(current, state=IntentState.FAILED, finished_at=now, error=detail))
            if is_final and intent.kind is IntentKind.GENERATE and _generation_wanted(version, now):
                given_up = _purpose(tx, version)
                transitions.give_up(tx, version, error.code, detail)
                _publish(tx, version)
            elif _may_retry(intent, version):
                not_before = timeline.later(now, _retry_delay(intent, error))
                transitions.add_intent(tx, intent.kind, version, not_before, attempt=intent.attempt + 1)
        log.warning("module_step_failed", kind=intent.kind.value, code=error.code, error=error.detail)
        if given_up:
            names = {name.replace("-", "_"): value for name, value in given_up.items()}
            log.error("version_given_up", **names, attempts=intent.attempt, code=error.code, error=error.detail)

    def _version(self, intent: Intent) -> KeyVersion:
        with self._store.read() as tx:
            version = tx.version(intent.version_id)
        assert version is not None
        return version


def _undo_generation(backend: Backend, late: GeneratedKey) -> None:
    """Destroy a pair that was made after its deadline, or have the module do so after its waiting period."""
    if not backend.schedule_destroy(late.ref, timeline.TELL_DAYS[0]):
        backend.destroy(late.ref)


def _purpose(tx: ReadTx, version: KeyVersion) -> dict[str, str]:
    """The key set, key and version of a key pair, by name, for modules that store tags."""
    key_set, key = tx.key_set_by_id(version.key_set_id), tx.key_by_id(version.key_id)
    assert key_set is not None and key is not None
    return {"key-set": key_set.name, "key": key.name, "version": str(version.number)}


def _retry_delay(intent: Intent, error: errors.Error) -> int:
    """Seconds until the next attempt: the module's retry_after within limits, or twice as long each time."""
    backoff = min(1 << min(intent.attempt, 6), MAX_BACKOFF)
    longest = MAX_DESTRUCTION_DELAY if intent.kind is IntentKind.DESTROY else MAX_BACKOFF
    return max(backoff, min(error.retry_after or 0, longest))


def _current(tx: WriteTx, intent: Intent) -> tuple[Intent, KeyVersion]:
    current, version = tx.intent(intent.id), tx.version(intent.version_id)
    assert current is not None and version is not None
    return current, version


def _publish(tx: WriteTx, version: KeyVersion) -> None:
    key_set = tx.key_set_by_id(version.key_set_id)
    assert key_set is not None
    transitions.publish_ready(tx, key_set)


# --- whether an attempt is still wanted -------------------------------------------------------------------------------


def _generation_wanted(version: KeyVersion, _: Instant) -> bool:
    return timeline.is_to_be_published(version) and version.kid is None


def _destruction_wanted(version: KeyVersion, now: Instant) -> bool:
    """The destruction may have been postponed or cancelled while the module was away."""
    at = timeline.destructible_at(version)
    given_up = version.state is VersionState.CREATING and version.failure is not None
    may_go = given_up or version.state in (VersionState.RETIRED, VersionState.REVOKED)
    return may_go and at is not None and at <= now


def _telling_wanted(version: KeyVersion, _: Instant) -> bool:
    leaving = version.state in (VersionState.RETIRED, VersionState.REVOKED)
    return leaving and version.ref is not None and version.destroy_told != version.destroy_at


_WANTED: dict[IntentKind, Callable[[KeyVersion, Instant], bool]] = {
    IntentKind.GENERATE: _generation_wanted,
    IntentKind.DESTROY: _destruction_wanted,
    IntentKind.TELL: _telling_wanted,
}


def _may_retry(intent: Intent, version: KeyVersion) -> bool:
    """Whether another attempt can make sense."""
    if intent.kind is IntentKind.GENERATE:
        return timeline.is_to_be_published(version)
    return version.state is not VersionState.DESTROYED


def _allowed(tx: ReadTx, intent: Intent) -> bool:
    """Whether an intent may be executed now: key pairs of a disabled key are generated once it is enabled."""
    if intent.kind is not IntentKind.GENERATE:
        return True
    version = tx.version(intent.version_id)
    key = tx.key_by_id(version.key_id) if version is not None else None
    return key is None or key.disabled_at is None
