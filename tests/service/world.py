"""An installation in one process: real store, workers and custodian, keys in memory, a clock that tests move."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kms_jwks import authn, wire, wiring
from kms_jwks.access import Role
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.config import Settings
from kms_jwks.custodian.leader_lease import LeaderLease
from kms_jwks.custodian.loop import Custodian
from kms_jwks.model import SECOND, Id, Instant, KeyVersion, VersionState
from kms_jwks.service import RequestContext, Service
from kms_jwks.service.clients import add_client, add_grant, add_token
from kms_jwks.service.signing import Batch
from kms_jwks.service.signing_job import SigningOperation
from kms_jwks.store import Store
from kms_jwks.worker.clocks import boot_clock
from tests.memory_backend import MemoryBackend

T = TypeVar("T")
TOKEN = authn.new_token().token
UNSAFE = {"allow_unsafe_publish_lead": True, "publish_lead": 0}


@functools.cache
def _empty_registry() -> bytes:
    """A SQLite file whose schema is up to date, without rows: migrating one for each world takes longer than a test."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "registry.sqlite3"
        store = Store(f"sqlite:///{file}")
        store.upgrade()
        store.dispose()
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.execute("DELETE FROM epoch")
            connection.execute("DELETE FROM history")
            connection.execute("DELETE FROM installation")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return file.read_bytes()


class World:
    """`service` is the first worker. The custodian and every worker's sync run in threads of this process."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 1,
        backend: MemoryBackend | None = None,
        lease: int = 10,
        url: str | None = None,
    ) -> None:
        self.offset = 0
        self.folder = folder
        self.backend = backend or MemoryBackend()
        self.settings = Settings(
            public_url="https://keys.example",
            database_url=url or f"sqlite:///{folder}/registry.sqlite3",
            state_dir=folder / "state",
            node_name="node-1",
            signing_lease=lease,
            poll_interval_ms=50,
            backends={
                "memory": {"type": "pkcs11", "module": "/nowhere", "slot": 0, "pin_env": "NO_PIN"},
            },
        )
        self.settings.state_dir.mkdir()
        self._stores: list[Store] = []
        self._backends: list[Backends] = []
        self.registry = self.store()
        if url is None:
            (folder / "registry.sqlite3").write_bytes(_empty_registry())
        self.registry.upgrade()
        self.workers = [self.worker() for _ in range(workers)]
        self.service = self.workers[0]
        self.admin = self.client("admin", Role.ADMIN)
        self.signer = self.client("signer", Role.SIGNER)
        self.raw_signer = self.client("raw", Role.RAW_SIGNER)
        self._stop = threading.Event()
        self._custodian: threading.Thread | None = None

    # --- clocks and parts

    def wall(self) -> int:
        return time.time_ns() // 1000 + self.offset

    def boot(self) -> int:
        return boot_clock() + self.offset

    def store(self) -> Store:
        made = Store(self.settings.database_url, wall=self.wall)
        self._stores.append(made)
        return made

    def backends(self) -> Backends:
        made = Backends({"memory": self.backend}, default="memory", limits={"memory": CallLimits(timeout=0.5)})
        self._backends.append(made)
        return made

    def worker(self) -> Service:
        return wiring.assemble(self.settings, store=self.store(), backends=self.backends(), boot=self.boot)

    def custodian(self, **changes: Any) -> Custodian:
        store = self.store()
        options: dict[str, Any] = {"node": "node-1", "boot": self.boot}
        leader_lease = LeaderLease(store, **(options | changes))
        return wiring.assemble_custodian(
            self.settings, store=store, backends=self.backends(), leader_lease=leader_lease
        )

    def client(self, name: str, role: Role, key_set: Id | None = None, key: Id | None = None) -> RequestContext:
        """A client with one grant and a token, straight from the registry."""
        with self.registry.write() as tx:
            owner = add_client(tx, name)
            add_grant(tx, owner, role, key_set, key)
            made, _ = add_token(tx, owner, 400 * 86_400)
        return RequestContext(f"Bearer {made.token}")

    # --- life

    def start(self, *, custodian: bool = True) -> World:
        for worker in self.workers:
            worker.start()
        if custodian:
            self._custodian = threading.Thread(target=self.custodian().run, args=(self._stop,), daemon=True)
            self._custodian.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._custodian is not None:
            self._custodian.join(timeout=10)
        for worker in self.workers:
            worker.stop()
        for backends in self._backends:
            backends.close()
        for store in self._stores:
            store.dispose()

    def advance(self, seconds: float) -> None:
        """Let time pass, for database and boot clock alike, and let every worker notice it."""
        self.offset += int(seconds * SECOND)
        for worker in self.workers:
            worker.sync.kick()
        self.until(lambda: all(w.sync.has_lease() for w in self.workers))

    def until(self, condition: Callable[[], T], seconds: float = 10) -> T:
        """Wait for something that threads bring about; fails when it does not come."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)
        return found

    # --- shorthands

    def create(self, name: str = "main", *, keys: list[dict[str, Any]] | None = None, **fields: Any) -> wire.KeySet:
        keys = [{"name": "default", "alg": "ES256"}] if keys is None else keys
        request = wire.convert({"name": name, "keys": keys, **fields}, wire.KeySetCreate)
        return self.service.key_sets.create(self.admin, request).answer

    def sign(
        self, claims: dict[str, Any] | None = None, *, worker: Service | None = None, **body: Any
    ) -> wire.SignedJwt:
        answer = (worker or self.service).signing.handle(
            SigningOperation.JWT, self.signer, "main", "default", {"claims": claims or {}, **body}
        )
        assert isinstance(answer, wire.SignedJwt)
        return answer

    def batch(self, items: list[Any]) -> Batch:
        answer = self.service.signing.handle(SigningOperation.JWT, self.signer, "main", "default", {"batch": items})
        assert isinstance(answer, Batch)
        return answer

    def kids(self, worker: Service | None = None, key_set: str = "main") -> list[str]:
        document = (worker or self.service).verifiers.jwks(RequestContext(), key_set)
        return [jwk["kid"] for jwk in msgspec.json.decode(document.body)["keys"]]

    def versions(self) -> list[KeyVersion]:
        with self.registry.read() as tx:
            return tx.versions()

    def version(self, number: int) -> KeyVersion:
        return next(v for v in self.versions() if v.number == number)

    def standby(self) -> KeyVersion:
        """The published standby, once it is visible."""

        def find() -> KeyVersion | None:
            waiting = [v for v in self.versions() if v.state is VersionState.PUBLISHED and v.visible_since]
            return waiting[-1] if waiting else None

        return self.until(find)  # type: ignore[return-value]

    def now(self) -> Instant:
        return Instant(self.wall())


@contextlib.contextmanager
def world(folder: Path, **options: Any) -> Any:
    """A started world, ended again."""
    made = World(folder, **options)
    try:
        yield made.start()
    finally:
        made.close()


# --- an older state of a registry


def back_up(registry: Path, copy: Path) -> None:
    """A consistent copy, as `sqlite3 registry.sqlite3 ".backup copy"` makes it."""
    with contextlib.closing(sqlite3.connect(registry)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def put_back(copy: Path, registry: Path) -> None:
    """Put a copy in the registry's place, as an operator does: without the newer file's write-ahead log."""
    for suffix in ("-wal", "-shm"):
        registry.with_name(registry.name + suffix).unlink(missing_ok=True)
    placed = registry.with_name("placed")
    placed.touch(mode=0o600)
    placed.write_bytes(copy.read_bytes())
    placed.chmod(0o600)
    placed.replace(registry)
