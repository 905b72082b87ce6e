"""Use cases of operation: workers, backends, readiness."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from kms_jwks import errors, wire
from kms_jwks.access import EVERYTHING, Permission, allow, allow_within
from kms_jwks.model import SECOND, Epoch, Id, Instant, Worker
from kms_jwks.service import views
from kms_jwks.service.control import Control
from kms_jwks.service.guard import RequestContext
from kms_jwks.times import optional, to_datetime
from kms_jwks.worker.restart_limit import RestartLimit
from kms_jwks.worker.snapshot import SigningKey
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
        self._next_steps: dict[str, str] = {}
        """By backend: what to do about its state at the last probe."""

    def nodes(
        self,
        context: RequestContext,
        limit: int,
        cursor: str | None,
        *,
        node: str | None = None,
        state: str | None = None,
    ) -> wire.Page:
        """Every registered worker with the epoch that it has confirmed, or those of a node, `live` or `silent` ones."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.NODE_READ)
            workers = tx.workers()
            epoch, now = tx.epoch(), tx.now()
        if node is not None:
            workers = [w for w in workers if w.node == node]
        if state is not None:
            workers = [w for w in workers if self._control.confirmation.silent(w, now) == (state == "silent")]
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
        """Whether a JWKS can be served. Needs no credentials; `shown` says what of it a caller may see."""
        registry = self._check_registry()
        try:
            self._sync.snapshot()
            serving = wire.Dependency(name="jwks", state="ok")
        except errors.Error as error:
            serving = _dependency("jwks", error)
        overdue = self._sync.overdue()
        if overdue:
            detail = f"no epoch confirmed for {OVERDUE // (60 * SECOND)} minutes"
            registry = wire.Dependency(name="registry", state="unconfirmed", detail=detail)
        failing = serving.state != "ok" or overdue
        return wire.Readiness(status="failing" if failing else "ok", dependencies=[serving, registry])

    def ready_sign(self, context: RequestContext, key_set: str | None = None, key: str | None = None) -> wire.Readiness:
        """Whether this worker can sign with every enabled key, or with those of a key set, or with one key.

        Needs no credentials; `shown` says what of it a caller may see. A backend counts where an enabled key that was
        asked for needs it: one that no key needs is listed. While there is no enabled key at all, every backend counts.
        """
        registry = self._check_registry()
        if not self._sync.has_lease():
            registry.state = errors.RegistryStale.code if not self._sync.rolled_back else errors.RegistryRolledBack.code
        asked, wanted = self._find_keys(context, key_set, key)
        clock = self._check_clock(signing_key for _, signing_key in wanted)
        needed: dict[str, list[str]] = {}
        for place, signing_key in wanted:
            if signing_key.active is not None:
                needed.setdefault(signing_key.active.backend, []).append(place)
        configured = self._control.backends.names()
        listed = sorted(set(needed) if key_set is not None else {*configured, *needed})
        backends = {name: self._depend_on_backend(name, needed.get(name, [])) for name in listed}
        if not configured and not needed:
            backends[""] = wire.Dependency(
                name="backends",
                state=errors.BackendUnknown.code,
                detail="No backend is configured on this node.",
                next_step="Add a [backends.NAME] table to the settings.",
            )
        counted = list(needed) if needed or key_set is not None else list(backends)
        failing = any(d.state != "ok" for d in (registry, *clock, *asked, *(backends[name] for name in counted)))
        return wire.Readiness(
            status="failing" if failing else "ok", dependencies=[registry, *clock, *asked, *backends.values()]
        )

    def shown(self, context: RequestContext, readiness: wire.Readiness) -> wire.Readiness:
        """What a caller may see: names, states and causes without credentials, the details with a permission."""
        try:
            caller = self._control.guard.identify(self._sync.snapshot(), context, self._sync.clock.now())
        except errors.StoreUnavailable:
            caller = None
        grants = caller.grants if caller is not None else ()
        hidden = [
            d
            if allow(
                grants, Permission.BACKEND_READ if d.name.startswith("backend") else Permission.NODE_READ, EVERYTHING
            )
            else wire.Dependency(name=d.name, state=d.state, cause=d.cause)
            for d in readiness.dependencies
        ]
        return wire.Readiness(status=readiness.status, dependencies=hidden)

    def _find_keys(
        self, context: RequestContext, key_set: str | None, key: str | None
    ) -> tuple[list[wire.Dependency], list[tuple[str, SigningKey]]]:
        """What is said of a key set or key that was asked for by name, and the enabled keys by `key_set/key`.

        The answer for a restricted key set is that of one that does not exist, unless the caller may read its JWKS.
        """
        try:
            snapshot = self._sync.snapshot()
        except errors.StoreUnavailable:
            return [], []
        if key_set is None:
            return [], [
                (f"{s.name}/{k.name}", k) for s in snapshot.key_sets.values() for k in s.keys.values() if k.enabled
            ]
        found = snapshot.key_sets.get(key_set)
        if found is not None and not found.public:
            caller = self._control.guard.identify(snapshot, context, self._sync.clock.now())
            if caller is None or not allow_within(caller.grants, Permission.JWKS_READ, found.id):
                found = None
        if not snapshot.complete:
            return [], []
        if key is None:
            if found is None:
                return [_dependency(f"key_set:{key_set}", errors.KeySetNotFound())], []
            return [], [(f"{found.name}/{k.name}", k) for k in found.keys.values() if k.enabled]
        place = f"{key_set}/{key}"
        one = found.keys.get(key) if found is not None else None
        if one is None:
            return [_dependency(f"key:{place}", errors.KeyNotFound())], []
        refused = errors.KeyDisabled() if not one.enabled else errors.NoActiveVersion() if one.active is None else None
        said = (
            wire.Dependency(name=f"key:{place}", state="ok")
            if refused is None
            else _dependency(f"key:{place}", refused)
        )
        return [said], [(place, one)]

    def _check_registry(self) -> wire.Dependency:
        trouble = self._sync.trouble
        return wire.Dependency(name="registry", state="ok") if trouble is None else _dependency("registry", trouble)

    def _depend_on_backend(self, name: str, keys: list[str]) -> wire.Dependency:
        """The state of a backend that these keys need."""
        if name not in self._control.backends.by_name:
            return wire.Dependency(
                name=f"backend:{name}",
                state=errors.BackendUnknown.code,
                detail=f"It is not configured on this node, and these keys need it: {', '.join(keys[:5])}"
                f"{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}.",
                next_step=f"Add [backends.{name}] to the settings of this node.",
            )
        found = self._check_backend(name)
        step = self._next_steps.get(name, "")
        return wire.Dependency(name=f"backend:{name}", state=found.state, detail=found.detail, next_step=step)

    def _check_clock(self, keys: Iterable[SigningKey]) -> list[wire.Dependency]:
        """The database's clock, while one of the keys does not sign because it was set."""
        try:
            for key in keys:
                if key.enabled:
                    self._sync.clock.require_agreement(key.rules.clock_skew)
        except errors.ClocksDisagree as error:
            return [_dependency("clock", error)]
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
        state, detail, step = "ok", "", ""
        algorithms: list[str] = []
        try:
            detail, algorithms = backends.probe(
                name, lambda b: (b.ping().description, sorted(b.capabilities())), _PROBE_SECONDS
            )
        except errors.BackendError as error:
            state, detail, step = error.code, error.detail, error.next_step
        self._next_steps[name] = step
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


def _dependency(name: str, error: errors.Error) -> wire.Dependency:
    """A dependency that is in the way, as the error says."""
    cause = str(error.fields.get("cause", ""))
    return wire.Dependency(name=name, state=error.code, cause=cause, detail=error.detail, next_step=error.next_step)
