"""The configured backends of a process, and the one way to have something signed by them with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from kms_jwks import errors
from kms_jwks.algorithms import Algorithm
from kms_jwks.backends.base import Backend, Digest, KeyRef, Message
from kms_jwks.model import KeyVersion, VersionState

_OK = "ok"
_POOL = 32
"""Threads that may wait for a module at once, per backend that does not sign in place."""


class Modules:
    """Backends by name. `sign_timeouts` holds each one's deadline in seconds. Opens nothing itself."""

    def __init__(self, backends: Mapping[str, Backend], *, default: str | None, sign_timeouts: Mapping[str, float]):
        self.backends = dict(backends)
        self.default = default
        self._timeouts = dict(sign_timeouts)
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._waiting: dict[str, threading.BoundedSemaphore] = {
            name: threading.BoundedSemaphore(_POOL) for name in self.backends
        }
        self._lock = threading.Lock()
        self.seen: dict[str, str] = {}
        """What this process saw of each backend last: `ok`, or the code of the error; absent until it was used."""

    def get(self, name: str) -> Backend:
        """The backend of that name. Raises BackendUnknown."""
        try:
            return self.backends[name]
        except KeyError:
            raise errors.BackendUnknown(f"No backend {name!r} is configured on this node.") from None

    def bind(self, versions: Iterable[KeyVersion]) -> None:
        """Tell the backends in which modules the registry's keys are; versions in the order of their making."""
        for version in versions:
            backend = self.backends.get(version.backend)
            if backend is not None and version.ref is not None and version.state is not VersionState.DESTROYED:
                backend.bind(KeyRef.of(**version.ref))

    def sign(self, backend_name: str, ref: KeyRef, alg: Algorithm, what: Message | Digest) -> bytes:
        """One signature in JOSE form within the backend's deadline. Raises BackendError, BackendUnknown.

        A backend that does not sign in place works in a bounded pool: a call that hangs there is answered with
        BackendTimeout and its thread is left behind, and once all are left behind calls are refused at once.
        """
        try:
            signature = self._sign(self.get(backend_name), backend_name, ref, alg, what)
        except (errors.KeyNotFound, errors.UnsupportedAlgorithm):
            raise  # about the key, not about the module
        except errors.BackendError as error:
            self.seen[backend_name] = error.code
            raise
        if self.seen.get(backend_name) != _OK:
            self.seen[backend_name] = _OK
        return signature

    def _sign(self, backend: Backend, backend_name: str, ref: KeyRef, alg: Algorithm, what: Message | Digest) -> bytes:
        timeout = self._timeouts.get(backend_name, 2.0)
        deadline = time.monotonic() + timeout
        if backend.sign_in_place:
            return backend.sign(ref, alg, what, deadline)
        room = self._waiting[backend_name]
        if not room.acquire(timeout=timeout):
            raise errors.BackendTimeout(f"All {_POOL} calls that may wait for backend {backend_name!r} are waiting.")
        try:
            future = self._pool(backend_name).submit(backend.sign, ref, alg, what, deadline)
        except BaseException:
            room.release()
            raise
        future.add_done_callback(lambda _: room.release())
        return self._result(future, backend_name, deadline)

    def _result(self, future: Future[bytes], backend_name: str, deadline: float) -> bytes:
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            future.cancel()
            raise errors.BackendTimeout(f"Backend {backend_name!r} did not sign within its deadline.") from None

    def _pool(self, name: str) -> ThreadPoolExecutor:
        with self._lock:
            pool = self._pools.get(name)
            if pool is None:
                pool = self._pools[name] = ThreadPoolExecutor(_POOL, thread_name_prefix=f"module-{name}")
            return pool

    def names(self) -> Sequence[str]:
        """The names of the configured backends."""
        return sorted(self.backends)

    def close(self) -> None:
        """Close every backend."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for backend in self.backends.values():
            backend.close()
