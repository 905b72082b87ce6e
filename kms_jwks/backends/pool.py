"""A bounded pool of threads for calls into a module, any of which the module may never return.

A caller is answered by its deadline, whatever the module does. A thread whose caller was answered stays occupied until
the module returns: its call is *stuck*. The threads are daemons, so a stuck one does not delay the end of the process.

A key whose calls do not return must not use up the pool, nor the threads of the callers. While no call of a key has
succeeded for `slow` seconds, only `share` callers may wait for that key, and its stuck calls take at most
`stuck_limit` places; every further call is refused at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import structlog

from kms_jwks.errors import BackendTimeout, BackendUnavailable

T = TypeVar("T")
log = structlog.get_logger(__name__)

_RETRY_AFTER = 1


@dataclass(eq=False, slots=True)
class _Key:
    """The calls of one key. `unanswered`: running calls that began after the last success, oldest first."""

    callers: int = 0
    stuck: int = 0
    unanswered: dict[PendingCall[Any], None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class PendingCall(Generic[T]):
    """A call under way. A thread waits for it with `wait`, an event loop with `on_done`; then `result` is taken once.

    `deadline` is an instant of `time.monotonic()`; an event loop that waits has to keep it by itself. The other fields
    are the pool's.
    """

    deadline: float
    pool: CallPool
    key: Hashable
    state: _Key
    work: Callable[[], T]
    started: float | None = None
    """None while the call waits for a thread."""
    ended: bool = False
    left: bool = False
    given_up: bool = False
    answer: T | None = None
    error: BaseException | None = None
    callback: Callable[[], object] | None = None
    running: Any = field(default_factory=threading.Lock)
    """Locked until the call has ended."""

    def wait(self) -> None:
        """Block until the call has ended or its deadline has come; to be called at most once."""
        try:
            self.running.acquire(timeout=max(0.0, self.deadline - time.monotonic()))
        except BaseException:
            self.pool.leave(self)
            raise

    def on_done(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once the call has ended, by the pool's thread or at once. It must not block.

        It may still be called for a call that has just been given up.
        """
        with self.pool.lock:
            self.callback = callback
            ended = self.ended
        if ended:
            callback()

    def give_up(self) -> None:
        """Stop waiting without taking the result. Idempotent."""
        self.pool.leave(self)

    def result(self) -> T:
        """What the work returned or raised. Raises BackendTimeout where it has not ended: the call is given up."""
        self.pool.leave(self)
        if self.given_up:
            raise BackendTimeout(f"The deadline came while {self.pool.describe(self.started is not None)}.")
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # no cycle of error, traceback and frame
        answer: T = self.answer  # type: ignore[assignment]
        return answer


class CallPool:
    """For one backend of one process. `places` bounds its threads, and how many calls may queue for one."""

    def __init__(self, name: str, places: int, *, stuck_limit: int, share: int, slow: float) -> None:
        self._name = name
        self._places = places
        self._stuck_limit = stuck_limit
        self._share = share
        self._slow = slow
        self.lock = threading.Lock()
        self._queue: queue.SimpleQueue[PendingCall[Any] | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._queued = 0
        self._keys: dict[Hashable, _Key] = {}
        self._stuck: dict[PendingCall[Any], None] = {}
        self.timeouts = 0
        """Calls whose caller was answered BackendTimeout here."""
        self.refused = 0
        """Calls that were refused at once, because too many of their key or of the whole pool are stuck."""

    def submit(self, key: Hashable, work: Callable[[], T], deadline: float) -> PendingCall[T]:
        """Have `work` done by a thread of the pool; `result` of what is returned must be called, also after a failure.

        `deadline` is an instant of `time.monotonic()`. Raises BackendUnavailable where waiting is of no use.
        """
        with self.lock:
            state = self._admit(key)
            call = PendingCall(deadline, self, key, state, work)
            call.running.acquire()
            state.callers += 1
            self._queued += 1
            self._queue.put(call)
        return call

    def run(self, key: Hashable, work: Callable[[], T], deadline: float) -> T:
        """Submit `work` and wait for it. Raises what `work` raises, BackendTimeout and BackendUnavailable."""
        call = self.submit(key, work, deadline)
        call.wait()
        return call.result()

    def stuck(self) -> int:
        """How many threads are still in the module although their callers were answered."""
        return len(self._stuck)

    def overdue(self, now: float, patience: float) -> frozenset[int]:
        """The stuck calls that are past their deadline by more than `patience` seconds; an identity for each."""
        with self.lock:
            return frozenset(id(call) for call in self._stuck if now - call.deadline > patience)

    def close(self) -> None:
        """End the idle threads. Nothing may be submitted afterwards."""
        with self.lock:
            for _ in range(self._threads):
                self._queue.put(None)

    # --- the callers' side

    def _admit(self, key: Hashable) -> _Key:
        """Under the lock: refuse a call that has no chance, and start a thread for it where one is missing."""
        state = self._keys.get(key)
        if len(self._stuck) >= self._places or self._queued >= self._places:
            self._refuse(f"All {self._places} calls that may be under way in backend {self._name!r} are occupied.")
        if state is None:
            state = _Key()
        elif state.stuck >= self._stuck_limit:
            self._refuse(f"{state.stuck} calls on this key have not returned from backend {self._name!r}.")
        elif state.callers >= self._share and self._is_slow(state):
            self._refuse(f"Calls on this key do not return from backend {self._name!r}, and others wait already.")
        if self._queued >= self._idle and self._threads < self._places:
            self._start_thread()
        self._keys[key] = state
        return state

    def _refuse(self, detail: str) -> None:
        self.refused += 1
        raise BackendUnavailable(detail, retry_after=_RETRY_AFTER)

    def _is_slow(self, state: _Key) -> bool:
        oldest = next(iter(state.unanswered), None)
        return oldest is not None and time.monotonic() - (oldest.started or 0.0) > self._slow

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=f"backend-{self._name}", daemon=True).start()
        except RuntimeError:  # the system has no thread left
            if self._threads == 0:
                self._refuse("The system gives this process no thread.")
        else:
            self._threads += 1
            self._idle += 1

    def leave(self, call: PendingCall[Any]) -> None:
        """The caller no longer waits. A call that has not ended is given up. Idempotent."""
        state = call.state
        with self.lock:
            if call.left:
                return
            call.left = True
            call.callback = None
            state.callers -= 1
            if not call.ended:
                call.given_up = True
                self.timeouts += 1
                if call.started is not None:
                    self._stuck[call] = None
                    state.stuck += 1
            self._forget(call.key, state)

    def describe(self, started: bool) -> str:
        """Why a call was given up, in words."""
        if started:
            return f"backend {self._name!r} was still working on the call"
        return f"backend {self._name!r} was busy in all its {self._places} places"

    def _forget(self, key: Hashable, state: _Key) -> None:
        if not (state.callers or state.stuck or state.unanswered):
            self._keys.pop(key, None)

    # --- the threads' side

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            with self.lock:
                self._queued -= 1
                if call.given_up:
                    continue
                self._idle -= 1
                call.started = time.monotonic()
                call.state.unanswered[call] = None
            answer, error = None, None
            try:
                answer = call.work()
            except BaseException as failed:  # noqa: BLE001 - raised again by `result`, whatever it is
                error = failed
            self._end(call, answer, error)
            del call, answer, error

    def _end(self, call: PendingCall[Any], answer: Any, error: BaseException | None) -> None:
        state = call.state
        with self.lock:
            self._idle += 1
            call.answer, call.error, call.ended = answer, error, True
            if error is None:
                # The key works: a call that is still running is stuck for a reason of its own.
                state.unanswered.clear()
            else:
                state.unanswered.pop(call, None)
            if self._stuck.pop(call, call) is None:
                state.stuck -= 1
                self._forget(call.key, state)
            callback = call.callback
        call.running.release()
        if callback is not None:
            try:
                callback()
            except Exception as raised:  # noqa: BLE001 - the thread must go on serving other calls
                log.warning("callback_raised", backend=self._name, error=type(raised).__name__)
