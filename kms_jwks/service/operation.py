"""Use cases of operation: workers, backends, readiness."""

from __future__ import annotations

import time
from dataclasses import replace

from kms_jwks import errors, wire
from kms_jwks.access import Permission
from kms_jwks.model import SECOND, Epoch, Id, Instant, Worker
from kms_jwks.service import views
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control
from kms_jwks.times import optional, to_datetime
from kms_jwks.worker.restart_limit import RestartLimit
from kms_jwks.worker.sync import OVERDUE, RegistrySync

_PROBE_EVERY = 1.0
"""Seconds for which a backend's state is remembered: readiness needs no credentials and must not load the module."""
_PROBE_SECONDS = 5.0
"""Seconds a backend may take to answer a probe; opening a module is part of it."""


class Operation:
    """For operators, and for the probes of an orchestrator."""

    def __init__(self, control: Control, sync: RegistrySync, restart_limit: RestartLimit) -> None:
        self._control = control
        self._sync = sync
        self._restart_limit = restart_limit
        self._probed: dict[str, tuple[float, wire.Backend]] = {}

    def nodes(self, context: RequestContext, limit: int, cursor: str | None) -> wire.Page:
        """Every registered worker with the epoch that it has confirmed."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.NODE_READ)
            workers = tx.workers()
            epoch, now = tx.epoch(), tx.now()
        if cursor:
            workers = [w for w in workers if w.id > cursor]
        return views.page(workers, limit, lambda w: self._view_node(w, epoch, now))

    def forget(self, context: RequestContext, worker_id: str) -> None:
        """Stop counting a worker that will not come back, e.g. one of a lost node. A restart registers it anew.

        Raises WorkerNotFound, Conflict while it is alive.
        """
        with self._control.store.write() as tx:
            self._control.guard.enter(tx, context, Permission.NODE_MANAGE)
            worker = tx.worker(Id(worker_id))
            if worker is None or worker.stopped_at is not None:
                raise errors.WorkerNotFound("There is no such worker.")
            if not self._control.confirmation.silent(worker, tx.now()):
                raise errors.Conflict("The worker is alive.", next_step="Stop it instead of forgetting it.")
            tx.save(replace(worker, stopped_at=tx.now(), stop_reason="forgotten"))

    def custodian(self, context: RequestContext) -> wire.Custodian:
        """Which custodian acts and since when, or why none does."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.NODE_READ)
            lease, now = tx.custodian_lease(), tx.now()
        if lease is None:
            return wire.Custodian(
                acting=False, holder=None, node=None, term=0, since=None, renewed_at=None, expires_at=None, halted=None
            )
        return wire.Custodian(
            acting=lease.expires_at > now and lease.halted is None,
            holder=lease.holder,
            node=lease.node,
            term=lease.term,
            since=optional(lease.since),
            renewed_at=to_datetime(lease.renewed_at),
            expires_at=to_datetime(lease.expires_at),
            halted=lease.halted,
        )

    def backends(self, context: RequestContext) -> wire.Page:
        """Every configured backend in the state that this worker finds it in."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.BACKEND_READ)
        return wire.Page(items=[self._check_backend(name) for name in self._control.backends.names()])

    def backend(self, context: RequestContext, name: str) -> wire.Backend:
        """One backend. Raises BackendUnknown."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.BACKEND_READ)
        self._control.backends.get(name)
        return self._check_backend(name)

    def ready(self) -> wire.Readiness:
        """Whether a JWKS can be served. The answer holds nothing secret and needs no credentials."""
        registry = self._check_registry()
        try:
            self._sync.snapshot()
            serving = wire.Dependency(name="jwks", state="ok")
        except errors.Error as error:
            serving = wire.Dependency(name="jwks", state=error.code, detail=error.detail)
        overdue = self._sync.overdue()
        if overdue:
            detail = f"no epoch confirmed for {OVERDUE // (60 * SECOND)} minutes"
            registry = wire.Dependency(name="registry", state="unconfirmed", detail=detail)
        failing = serving.state != "ok" or overdue
        return wire.Readiness(status="failing" if failing else "ok", dependencies=[serving, registry])

    def ready_sign(self) -> wire.Readiness:
        """Whether signing works on this worker, and if not which dependency is the cause."""
        registry = self._check_registry()
        if not self._sync.has_lease():
            state = self._sync.trouble_code if self._sync.rolled_back else errors.RegistryStale.code
            registry = wire.Dependency(name="registry", state=state, detail=registry.detail)
        found = [registry, *self._check_clock()]
        for name in self._control.backends.names():
            backend = self._check_backend(name)
            found.append(wire.Dependency(name=f"backend:{name}", state=backend.state, detail=backend.detail))
        failing = any(d.state != "ok" for d in found)
        return wire.Readiness(status="failing" if failing else "ok", dependencies=found)

    def _check_registry(self) -> wire.Dependency:
        trouble = self._sync.trouble
        return wire.Dependency(
            name="registry", state="ok" if trouble is None else self._sync.trouble_code, detail=trouble or ""
        )

    def _check_clock(self) -> list[wire.Dependency]:
        """The database's clock, while an enabled key does not sign because it was set."""
        try:
            for key_set in self._sync.snapshot().key_sets.values():
                for key in key_set.keys.values():
                    if key.enabled:
                        self._sync.clock.require_agreement(key.rules.clock_skew)
        except errors.ClocksDisagree as error:
            return [wire.Dependency(name="clock", state=error.code, detail=error.detail)]
        except errors.StoreUnavailable:
            pass  # `registry` says so
        return []

    def _check_backend(self, name: str) -> wire.Backend:
        probed = self._probed.get(name)
        if probed is None or time.monotonic() - probed[0] >= _PROBE_EVERY:
            answer = self._probe(name)
            probed = self._probed[name] = (time.monotonic(), answer)
        return probed[1]

    def _probe(self, name: str) -> wire.Backend:
        backends = self._control.backends
        backend = backends.get(name)
        state, detail = "ok", ""
        algorithms: list[str] = []
        try:
            detail, algorithms = backends.probe(
                name, lambda b: (b.ping().description, sorted(b.capabilities())), _PROBE_SECONDS
            )
        except errors.BackendError as error:
            state, detail = error.code, error.detail
        return wire.Backend(
            name=name,
            type=backend.kind,
            default=backends.default == name,
            sign_in_place=backend.sign_in_place,
            state=state,
            detail=detail,
            algorithms=algorithms,
            counters=backends.counters(name),
            recycled=self._restart_limit.count(),
        )

    def _view_node(self, worker: Worker, epoch: Epoch, now: Instant) -> wire.Node:
        confirmed = worker.confirmed
        if confirmed is not None and confirmed.incarnation != epoch.incarnation:
            confirmed = None
        return wire.Node(
            worker=worker.id,
            node=worker.node,
            pid=worker.pid,
            started_at=to_datetime(worker.started_at),
            heartbeat_at=to_datetime(worker.heartbeat_at),
            epoch=confirmed.counter if confirmed is not None else None,
            lag=epoch.counter - confirmed.counter if confirmed is not None else None,
            lease=worker.lease,
            lease_left=max(0, -(-(worker.heartbeat_at + worker.lease * SECOND - now) // SECOND)),
            backends=dict(worker.backends or {}),
            live=not self._control.confirmation.silent(worker, now),
        )
