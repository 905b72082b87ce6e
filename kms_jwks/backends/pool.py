"""A bounded pool of threads that wait for a module, and that a process can afford to lose.

A caller is answered by its deadline, whatever the module does. A thread whose caller has gone keeps its place until the
module lets it go: it is *stuck*. The threads are daemons, so none of them holds up the end of the process.

One key whose calls do not come back must not use up the pool, nor the threads of those who call: while none of its
calls has succeeded for `slow` seconds, only `share` callers may wait for it, and its stuck calls take at most
`stuck_limit` places; whoever comes beyond that is answered at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kms_jwks.errors import BackendTimeout, BackendUnavailable

T = TypeVar("T")

_RETRY_AFTER = 1


@dataclass(eq=False, slots=True)
class _Call:
    """One piece of work. `done` is locked until it has ended; `started` is None while it waits for a thread."""

    key: Hashable
    work: Callable[[], Any]
    deadline: float
    done: Any = field(default_factory=threading.Lock)
    started: float | None = None
    ended: bool = False
    given_up: bool = False
    answer: Any = None
    error: BaseException | None = None


@dataclass(eq=False, slots=True)
class _Key:
    """What is under way for one key. `unanswered`: running calls that began after the last success, oldest first."""

    callers: int = 0
    stuck: int = 0
    unanswered: dict[_Call, None] = field(default_factory=dict)


class CallPool:
    """For one backend of one process. `places` bounds its threads, and how many calls may queue for one."""

    def __init__(self, name: str, places: int, *, stuck_limit: int, share: int, slow: float) -> None:
        self._name = name
        self._places = places
        self._stuck_limit = stuck_limit
        self._share = share
        self._slow = slow
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._queued = 0
        self._keys: dict[Hashable, _Key] = {}
        self._stuck: dict[_Call, None] = {}
        self.timeouts = 0
        """Calls whose caller was answered BackendTimeout here."""
        self.refused = 0
        """Calls that were answered at once, because their key or the whole pool is held up."""

    def run(self, key: Hashable, work: Callable[[], T], deadline: float) -> T:
        """What `work` returns or raises, in a thread of the pool.

        Raises BackendTimeout at the deadline, an instant of `time.monotonic()`, and BackendUnavailable where there is
        no use in waiting.
        """
        call = _Call(key, work, deadline)
        call.done.acquire()
        with self._lock:
            state = self._admit(call)
            state.callers += 1
            self._queued += 1
            self._queue.put(call)
        try:
            call.done.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            self._leave(call, state)
        if call.given_up:
            waited = "was still at it" if call.started is not None else f"was busy in all its {self._places} places"
            raise BackendTimeout(f"The deadline came while backend {self._name!r} {waited}.")
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None  # no cycle of error, traceback and frame
        answer: T = call.answer
        return answer

    def stuck(self) -> int:
        """How many threads the module holds although their callers have gone."""
        return len(self._stuck)

    def overdue(self, now: float, patience: float) -> frozenset[int]:
        """The stuck calls that are past their deadline by more than `patience` seconds; an identity for each."""
        with self._lock:
            return frozenset(id(call) for call in self._stuck if now - call.deadline > patience)

    def close(self) -> None:
        """Let the threads go that have nothing to do. Nothing may be run afterwards."""
        with self._lock:
            for _ in range(self._threads):
                self._queue.put(None)

    # --- the callers' side

    def _admit(self, call: _Call) -> _Key:
        """Under the lock: whether the call has a chance, and a thread for it if one is missing."""
        state = self._keys.get(call.key)
        if len(self._stuck) >= self._places or self._queued >= self._places:
            self._refuse(f"All {self._places} calls that may be under way in backend {self._name!r} are held up.")
        if state is None:
            state = _Key()
        elif state.stuck >= self._stuck_limit:
            self._refuse(f"{state.stuck} calls on this key have not come back from backend {self._name!r}.")
        elif state.callers >= self._share and self._is_slow(state):
            self._refuse(f"Calls on this key do not come back from backend {self._name!r}, and others wait already.")
        if self._queued >= self._idle and self._threads < self._places:
            self._start_thread()
        self._keys[call.key] = state
        return state

    def _refuse(self, detail: str) -> None:
        self.refused += 1
        raise BackendUnavailable(detail, retry_after=_RETRY_AFTER)

    def _is_slow(self, state: _Key) -> bool:
        oldest = next(iter(state.unanswered), None)
        return oldest is not None and time.monotonic() - (oldest.started or 0.0) > self._slow

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=f"module-{self._name}", daemon=True).start()
        except RuntimeError:  # the system has no thread left
            if self._threads == 0:
                self._refuse("The system gives this process no thread.")
        else:
            self._threads += 1
            self._idle += 1

    def _leave(self, call: _Call, state: _Key) -> None:
        """The caller goes, with the call's end or without it."""
        with self._lock:
            state.callers -= 1
            if not call.ended:
                call.given_up = True
                self.timeouts += 1
                if call.started is not None:
                    self._stuck[call] = None
                    state.stuck += 1
            self._forget(call.key, state)

    def _forget(self, key: Hashable, state: _Key) -> None:
        if not (state.callers or state.stuck or state.unanswered):
            self._keys.pop(key, None)

    # --- the threads' side

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            with self._lock:
                self._queued -= 1
                if call.given_up:
                    continue
                self._idle -= 1
                call.started = time.monotonic()
                state = self._keys[call.key]
                state.unanswered[call] = None
            answer, error = None, None
            try:
                answer = call.work()
            except BaseException as failed:  # noqa: BLE001 - it is the caller's, whatever it is
                error = failed
            self._end(call, state, answer, error)
            del call, answer, error

    def _end(self, call: _Call, state: _Key, answer: Any, error: BaseException | None) -> None:
        with self._lock:
            self._idle += 1
            call.answer, call.error, call.ended = answer, error, True
            if error is None:
                # The key works: those that are still under way are stuck by themselves.
                state.unanswered.clear()
            else:
                state.unanswered.pop(call, None)
            if self._stuck.pop(call, call) is None:
                state.stuck -= 1
                self._forget(call.key, state)
        call.done.release()
