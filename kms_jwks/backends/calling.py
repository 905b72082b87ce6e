"""The configured backends of a process, and the one way to call them: by a deadline, in bounded pools, and checked.

A call that hangs occupies its thread for ever. In the pool that costs a place there; in place it costs the thread of
the request. `worn_out` says when a process has lost enough threads to be replaced by a fresh one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Generic, TypeVar

import structlog

from kms_jwks import errors
from kms_jwks.backends.base import (
    MAX_ABANDONED_CALLS,
    Backend,
    CallTimeouts,
    Digest,
    KeyRef,
    Message,
    ModuleKey,
    stuck_in,
    timeouts_of,
)
from kms_jwks.backends.pool import CallPool, PendingCall
from kms_jwks.backends.released import SignatureChecker
from kms_jwks.model import KeyVersion, VersionState

T = TypeVar("T")
log = structlog.get_logger(__name__)

_OK: Final = "ok"
PATIENCE: Final = 1.0
"""Seconds past its deadline after which a call in the pool counts as one that will not return."""
PATIENCE_ASKING: Final = 11.0
"""The same for a single call that is no signature: a backend may take about 10 s for one (`CallTimeouts`)."""
PATIENCE_IN_PLACE: Final = 3.0
"""The same for a signature in place, which holds its caller: a single one is enough to replace the process."""
_ASKING: Final = 4
"""Threads that may ask a backend for something other than a signature, beside those that sign."""
_SAME_QUESTION: Final = 2
"""Unanswered calls of one question after which it is not asked again, and the process is replaced."""
_ASKING_SECONDS: Final = 10.0
_QUIET: Final = 1.0
"""Seconds without a failure after which a call that works ends an outage: one key's failures are not logged in turns
with another key's successes."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The bounds of a backend's calls. `timeout` is in seconds.

    `waiting` bounds the calls under way in the pool. `parallel` is the number of calls that the module works on at once
    (None: as many as may wait), `callers` the number of threads of this process that ask for signatures.
    """

    timeout: float = 2.0
    waiting: int = 32
    stuck_limit: int = 8
    check_signatures: float = 0.05
    parallel: int | None = None
    callers: int = 8

    @property
    def most_stuck(self) -> int:
        """Calls that did not return after which the process is replaced: before half of the module's room is lost."""
        room = min(self.waiting, self.parallel or self.waiting)
        return min(self.stuck_limit, max(1, room // 2))


@dataclass(frozen=True, slots=True)
class PendingSignature:
    """A signature under way: a thread waits with `wait`, an event loop with `on_done`; then `result` is taken once."""

    _entry: _Entry
    _call: PendingCall[bytes]

    @property
    def deadline(self) -> float:
        """An instant of `time.monotonic()`; an event loop that waits has to keep it by itself."""
        return self._call.deadline

    def wait(self) -> None:
        """Block until the signature is made, refused, or late."""
        self._call.wait()

    def on_done(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when there is a result, from another thread or at once; it must not block."""
        self._call.on_done(callback)

    def give_up(self) -> None:
        """Stop waiting without taking the result."""
        self._call.give_up()

    def result(self) -> bytes:
        """The signature in JOSE form. Raises BackendError."""
        try:
            signature = self._call.result()
        except errors.BackendError as error:
            if isinstance(error, errors.BackendTimeout):
                self._entry.checker.be_wary()
            self._entry.failed(error)
            raise
        self._entry.worked()
        return signature


@dataclass(eq=False, slots=True)
class _Entry:
    """A backend and what this process keeps about it."""

    name: str
    backend: Backend
    limits: CallLimits
    checker: SignatureChecker
    pool: CallPool
    asking: CallPool
    in_place: dict[int, float] = field(default_factory=dict)
    """Calls in place by thread: their deadlines."""
    abandoned: int = 0
    """What `stuck_in` said at the last look."""
    state: str | None = None
    """What the last call showed: `ok`, or the code of its error; None before the first one."""
    lost_at: float | None = None
    """Since when its calls have been failing; None while they work."""
    failed_at: float = 0.0
    works_since: float = 0.0
    """The first success after the last failure, while `lost_at` is set."""
    transition: threading.Lock = field(default_factory=threading.Lock)

    def lost_threads(self, now: float) -> frozenset[int]:
        """The threads of requests that have been in the module for longer than any caller waits."""
        deadlines = list(self.in_place.items())
        return frozenset(thread for thread, deadline in deadlines if now - deadline > PATIENCE_IN_PLACE)

    def worked(self) -> None:
        """A call has shown that the backend works. Its recovery is logged once, with the length of the outage."""
        if self.state != _OK:
            self.state = _OK
        lost_at = self.lost_at
        if lost_at is None:
            return
        with self.transition:
            now = time.monotonic()
            if self.works_since < self.failed_at:
                self.works_since = now
            if self.lost_at == lost_at and now - self.failed_at > _QUIET:
                self.lost_at = None
                log.info("backend_recovered", backend=self.name, seconds=round(self.works_since - lost_at, 3))

    def failed(self, error: errors.BackendError, *, signing: bool = True) -> None:
        """A call has failed. The loss of the module is logged once.

        A key that is missing, a call that is throttled and a signature that is refused say nothing about the module.
        """
        if isinstance(error, errors.BackendKeyNotFound | errors.UnsupportedAlgorithm):
            return
        with self.transition:
            self.state, self.failed_at = error.code, time.monotonic()
            is_throttled = isinstance(error, errors.BackendThrottled)
            if self.lost_at is not None or is_throttled or (signing and isinstance(error, errors.BackendRefused)):
                return
            self.lost_at = self.failed_at
            log.warning("backend_lost", backend=self.name, code=error.code, detail=error.detail)

    def stuck(self) -> int:
        """Threads that are in the module past their deadline, the backend's own among them."""
        lost = len(self.lost_threads(time.monotonic()))
        return self.pool.stuck() + self.asking.stuck() + lost + stuck_in(self.backend)


class _UndoableCall(Generic[T]):
    """A call whose effect is undone, by the thread that made it, where it succeeds after it was abandoned."""

    def __init__(self, entry: _Entry, question: Callable[[Backend], T], undo: Callable[[Backend, T], object]) -> None:
        self._entry = entry
        self._question = question
        self._undo = undo
        self._lock = threading.Lock()
        self._answers: list[T] = []
        self._is_abandoned = False

    def run(self) -> T:
        answer = self._question(self._entry.backend)
        with self._lock:
            self._answers.append(answer)
            if not self._is_abandoned:
                return answer
        try:
            self._undo(self._entry.backend, answer)
        except errors.Error as error:
            log.warning("late_call_not_undone", backend=self._entry.name, code=error.code, detail=error.detail)
        else:
            log.info("late_call_undone", backend=self._entry.name)
        return answer

    def abandon(self) -> list[T]:
        """Undo the call when it succeeds; the answer, where it has succeeded already and is not undone."""
        with self._lock:
            self._is_abandoned = not self._answers
            return self._answers


class Backends:
    """Backends by name, each with its limits. Opens nothing itself."""

    def __init__(
        self, backends: Mapping[str, Backend], *, default: str | None, limits: Mapping[str, CallLimits] | None = None
    ) -> None:
        self.by_name = dict(backends)
        self.default = default
        self._entries = {
            name: _entry(name, backend, (limits or {}).get(name, CallLimits()))
            for name, backend in self.by_name.items()
        }
        self._late_before: frozenset[object] = frozenset()

    @property
    def states(self) -> dict[str, str]:
        """What this process saw of each backend last: `ok`, or the code of the error. Absent until it was called."""
        return {name: entry.state for name, entry in self._entries.items() if entry.state is not None}

    def get(self, name: str) -> Backend:
        """The backend of that name. Raises BackendUnknown."""
        return self._entry(name).backend

    def bind(self, versions: Iterable[KeyVersion]) -> None:
        """Tell the backends in which modules the registry's keys are; versions in the order of their making."""
        for version in versions:
            backend = self.by_name.get(version.backend)
            if backend is not None and version.ref is not None and version.state is not VersionState.DESTROYED:
                backend.bind(KeyRef.of(**version.ref))

    def submit(self, key: ModuleKey, what: Message | Digest) -> PendingSignature | bytes:
        """Have `what` signed within the backend's deadline, and the signature checked.

        A backend that signs in place gives the signature itself, in JOSE form; its caller cannot be answered before the
        module. Every other backend works in a bounded pool: a call that hangs there ends in BackendTimeout, and its
        thread stays behind. Raises BackendError, BackendUnknown; so does `result` of a pending signature.
        """
        entry = self._entries.get(key.backend) or self._entry(key.backend)
        deadline = time.monotonic() + entry.limits.timeout
        signed = entry.checker.signed
        try:
            if not entry.backend.sign_in_place:
                return PendingSignature(
                    entry, entry.pool.submit(key.ref, partial(signed, key, what, deadline), deadline)
                )
            thread = threading.get_ident()
            entry.in_place[thread] = deadline
            try:
                signature = signed(key, what, deadline)
            finally:
                del entry.in_place[thread]
        except errors.BackendError as error:
            entry.failed(error)
            raise
        if entry.state != _OK or entry.lost_at is not None:
            entry.worked()
        return signature

    def sign(self, key: ModuleKey, what: Message | Digest) -> bytes:
        """Submit and wait: the signature in JOSE form. Raises BackendError, BackendUnknown."""
        pending = self.submit(key, what)
        if isinstance(pending, bytes):
            return pending
        pending.wait()
        return pending.result()

    def probe(self, name: str, question: Callable[[Backend], T], seconds: float) -> T:
        """Ask a backend for a sign of life; its answer or failure counts as its state. Raises BackendError."""
        entry = self._entry(name)
        try:
            answer = self.ask(name, "ping", question, seconds)
        except errors.BackendError as error:
            entry.failed(error, signing=False)
            raise
        entry.worked()
        return answer

    def ask(
        self,
        name: str,
        what: str,
        question: Callable[[Backend], T],
        seconds: float = _ASKING_SECONDS,
        *,
        undo: Callable[[Backend, T], object] | None = None,
    ) -> T:
        """Make any call of a backend but `sign`, within `seconds`. Raises BackendError, BackendUnknown.

        `what` names the question: while it stays unanswered, the same one is not asked by every thread. `undo` reverts
        the effect of a call that succeeds after its caller was answered BackendTimeout.
        """
        entry = self._entry(name)
        deadline = time.monotonic() + seconds
        if undo is None:
            return entry.asking.run(what, partial(question, entry.backend), deadline)
        call = _UndoableCall(entry, question, undo)
        try:
            return entry.asking.run(what, call.run, deadline)
        except BaseException as error:
            answers = call.abandon()
            if answers and isinstance(error, errors.BackendTimeout):
                return answers[0]  # it succeeded in the moment of its deadline
            raise

    def timeouts(self, name: str) -> CallTimeouts:
        """The seconds to give to calls for which no client waits. Raises BackendUnknown."""
        return timeouts_of(self._entry(name).backend)

    def stuck_in(self, name: str) -> int:
        """How many calls of a backend are in its module past their deadlines. Raises BackendUnknown."""
        return self._entry(name).stuck()

    def names(self) -> Sequence[str]:
        """The names of the configured backends."""
        return sorted(self.by_name)

    # --- what was lost

    def counters(self, name: str) -> dict[str, int]:
        """What this process has seen of a backend since it started; `stuck` is the present number."""
        entry = self._entry(name)
        return {
            "checked": entry.checker.checked,
            "bad": entry.checker.bad,
            "timeouts": entry.pool.timeouts + entry.asking.timeouts,
            "refused": entry.pool.refused + entry.asking.refused,
            "stuck": entry.stuck(),
        }

    def stuck(self) -> int:
        """How many threads of this process are held by modules past their deadlines."""
        return sum(entry.stuck() for entry in self._entries.values())

    def lost_threads(self) -> frozenset[int]:
        """The threads of requests that sign in place and do not come back, by `threading.get_ident()`."""
        now = time.monotonic()
        return frozenset().union(*(entry.lost_threads(now) for entry in self._entries.values()))

    def worn_out(self) -> str | None:
        """Why this process should be replaced, in words; None while it need not be. To be asked about once a second.

        Only calls that were overdue at the previous check as well count: a process that was itself stopped for a while
        has lost nothing.
        """
        now = time.monotonic()
        seen, reason = set[object](), None
        for name, entry in self._entries.items():
            lost = {(name, thread, entry.in_place.get(thread)) for thread in entry.lost_threads(now)}
            late = {(name, call) for call in entry.pool.overdue(now, PATIENCE)}
            unanswered = {(name, call) for call in entry.asking.overdue(now, PATIENCE)}
            hung = {(name, call) for call in entry.asking.overdue(now, PATIENCE_ASKING)}
            seen |= lost | late | unanswered
            entry.abandoned, before = stuck_in(entry.backend), entry.abandoned
            abandoned = min(before, entry.abandoned)
            never_back = len((late | hung) & self._late_before) + abandoned
            if lost & self._late_before:
                reason = (
                    f"{len(lost & self._late_before)} threads that sign in place with backend {name!r} do not come back"
                )
            elif never_back >= entry.limits.most_stuck or abandoned >= MAX_ABANDONED_CALLS:
                reason = f"{never_back} calls have not come back from backend {name!r}"
            elif len(unanswered & self._late_before) >= _SAME_QUESTION:
                reason = f"backend {name!r} has not come back to {len(unanswered & self._late_before)} questions"
        self._late_before = frozenset(seen)
        return reason

    def close(self) -> None:
        """Close every backend, except where calls are stuck: what they hold cannot be taken from them."""
        for name, entry in self._entries.items():
            entry.pool.close()
            entry.asking.close()
            if stuck := entry.stuck():
                log.warning("backend_left_open", backend=name, stuck=stuck)
            else:
                entry.backend.close()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise errors.BackendUnknown(f"No backend {name!r} is configured on this node.") from None


def _entry(name: str, backend: Backend, limits: CallLimits) -> _Entry:
    asking = CallPool(name, _ASKING, stuck_limit=_SAME_QUESTION, share=2, slow=1.0)
    return _Entry(
        name=name,
        backend=backend,
        limits=limits,
        checker=SignatureChecker(backend, limits.check_signatures, ask=partial(asking.run, "public_key")),
        pool=CallPool(
            name,
            limits.waiting,
            stuck_limit=limits.most_stuck,
            share=max(1, limits.callers // 4),
            slow=limits.timeout / 4,
        ),
        asking=asking,
    )
