"""The configured backends of a process, and the one way to have something signed by them: with a deadline, and checked.

A call that hangs holds a thread for ever. In the pool that costs a place there; in place it costs the thread of the
request. `worn_out` says when a process has lost enough of them to be replaced by a fresh one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import structlog

from kms_jwks import errors
from kms_jwks.backends.base import MOST_LEFT_BEHIND, Backend, Digest, KeyRef, Message, ModuleKey, stuck_in
from kms_jwks.backends.pool import CallPool
from kms_jwks.backends.released import SignatureChecker
from kms_jwks.model import KeyVersion, VersionState

T = TypeVar("T")
log = structlog.get_logger(__name__)

_OK: Final = "ok"
PATIENCE: Final = 1.0
"""Seconds past its deadline until a call in the pool counts as one that never comes back."""
PATIENCE_IN_PLACE: Final = 3.0
"""The same for a call in place, whose caller waits with it: one is enough to replace the process."""
_ASKING: Final = 4
"""Threads that may ask a backend for something other than a signature, beside those that sign."""
_SAME_QUESTION: Final = 2
"""How often one question may stay without an answer until it is not asked again, and the process is replaced."""
_ASKING_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What a backend's calls may take. `timeout` is seconds.

    `waiting` bounds the calls under way in the pool, `parallel` says how many the module works at itself (None: as many
    as may wait), `callers` how many threads of this process ask for signatures (those of its requests).
    """

    timeout: float = 2.0
    waiting: int = 32
    stuck_limit: int = 8
    check_signatures: float = 0.05
    parallel: int | None = None
    callers: int = 8

    @property
    def most_stuck(self) -> int:
        """Calls that never came back after which the process is replaced: before half of the module's room is lost."""
        room = min(self.waiting, self.parallel or self.waiting)
        return min(self.stuck_limit, max(1, room // 2))


@dataclass(eq=False, slots=True)
class _Entry:
    """A backend and what this process keeps about it."""

    backend: Backend
    limits: CallLimits
    checker: SignatureChecker
    pool: CallPool
    asking: CallPool
    in_place: dict[int, float] = field(default_factory=dict)
    """Calls in place by thread: their deadlines."""
    left_behind: int = 0
    """What `stuck_in` said at the last look."""

    def lost_threads(self, now: float) -> frozenset[int]:
        """The threads of requests that are in the module for longer than anybody waits."""
        deadlines = list(self.in_place.items())
        return frozenset(thread for thread, deadline in deadlines if now - deadline > PATIENCE_IN_PLACE)

    def stuck(self) -> int:
        """Threads that the module holds past their deadline, the backend's own among them."""
        lost = len(self.lost_threads(time.monotonic()))
        return self.pool.stuck() + self.asking.stuck() + lost + stuck_in(self.backend)


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
        self.seen: dict[str, str] = {}
        """What this process saw of each backend last: `ok`, or the code of the error; absent until it was used."""

    def get(self, name: str) -> Backend:
        """The backend of that name. Raises BackendUnknown."""
        return self._entry(name).backend

    def bind(self, versions: Iterable[KeyVersion]) -> None:
        """Tell the backends in which modules the registry's keys are; versions in the order of their making."""
        for version in versions:
            backend = self.by_name.get(version.backend)
            if backend is not None and version.ref is not None and version.state is not VersionState.DESTROYED:
                backend.bind(KeyRef.of(**version.ref))

    def sign(self, signer: ModuleKey, what: Message | Digest) -> bytes:
        """One signature in JOSE form within the backend's deadline, checked. Raises BackendError, BackendUnknown.

        A backend that does not sign in place works in a bounded pool: a call that hangs there is answered with
        BackendTimeout and its thread is left behind. In place nobody can be answered before the module does.
        """
        try:
            signature = self._sign(self._entry(signer.backend), signer, what)
        except (errors.BackendKeyNotFound, errors.UnsupportedAlgorithm):
            raise  # about the key, not about the module
        except errors.BackendError as error:
            self.seen[signer.backend] = error.code
            raise
        if self.seen.get(signer.backend) != _OK:
            self.seen[signer.backend] = _OK
        return signature

    def _sign(self, entry: _Entry, signer: ModuleKey, what: Message | Digest) -> bytes:
        deadline = time.monotonic() + entry.limits.timeout
        if entry.backend.sign_in_place:
            thread = threading.get_ident()
            entry.in_place[thread] = deadline
            try:
                return entry.checker.signed(signer, what, deadline)
            finally:
                del entry.in_place[thread]
        try:
            return entry.pool.run(signer.kid, partial(entry.checker.signed, signer, what, deadline), deadline)
        except errors.BackendTimeout:
            entry.checker.be_wary()
            raise

    def ask(self, name: str, what: str, question: Callable[[Backend], T], seconds: float = _ASKING_SECONDS) -> T:
        """What a backend answers to anything but signing, within `seconds`. Raises BackendError, BackendUnknown.

        `what` names the question: while one does not come back the same one is not asked by all threads at once.
        """
        entry = self._entry(name)
        return entry.asking.run(what, partial(question, entry.backend), time.monotonic() + seconds)

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

        What counts was late at the look before too: a process that was itself stopped for a while has lost nothing.
        """
        now = time.monotonic()
        seen, reason = set[object](), None
        for name, entry in self._entries.items():
            lost = {(name, thread, entry.in_place.get(thread)) for thread in entry.lost_threads(now)}
            late = {(name, call) for call in entry.pool.overdue(now, PATIENCE)}
            unanswered = {(name, call) for call in entry.asking.overdue(now, PATIENCE)}
            seen |= lost | late | unanswered
            entry.left_behind, before = stuck_in(entry.backend), entry.left_behind
            left_behind = min(before, entry.left_behind)
            never_back = len(late & self._late_before) + left_behind
            if lost & self._late_before:
                reason = (
                    f"{len(lost & self._late_before)} threads that sign in place with backend {name!r} do not come back"
                )
            elif never_back >= entry.limits.most_stuck or left_behind >= MOST_LEFT_BEHIND:
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
