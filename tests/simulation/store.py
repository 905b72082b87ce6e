"""A registry in memory with the store's own interface and rules, for simulations that need thousands of them.

`tests/simulation/test_store.py` holds it to the store's contract. `before` is called at every point at
which a process can die: reading, writing, and on either side of a commit.
"""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from kms_jwks import errors, jose
from kms_jwks.model import (
    ApiToken,
    Client,
    CustodianLease,
    Epoch,
    ExternalKey,
    Grant,
    Id,
    IdempotencyRecord,
    Installation,
    Instant,
    Intent,
    IntentState,
    Key,
    KeySet,
    KeyVersion,
    Origin,
    VersionState,
    Worker,
)
from kms_jwks.store import ReadTx, RegistryContents, Store, WriteTx, snapshot_view

T = TypeVar("T")
Tables = dict[type[Any], dict[str, Any]]
_TABLES = (KeySet, Key, KeyVersion, ExternalKey, Client, ApiToken, Grant, Worker, Intent, IdempotencyRecord)
_S = VersionState


class Contents:
    """What is committed: never changed in place, so that a reader keeps its moment and a backup is an assignment."""

    def __init__(self, incarnation: str, now: Instant) -> None:
        self.tables: Tables = {cls: {} for cls in _TABLES}
        self.kids: dict[tuple[Id, str], tuple[str, bool]] = {}
        self.epoch = Epoch(incarnation, 1, "0")
        self.history: dict[int, tuple[Epoch, Epoch | None]] = {1: (self.epoch, None)}
        """By counter: the epoch, and the one that its incarnation superseded."""
        self.lease: CustodianLease | None = None
        self.installation = Installation("memory00", now)

    def copy(self) -> Contents:
        made = Contents.__new__(Contents)
        made.tables, made.kids, made.epoch = dict(self.tables), self.kids, self.epoch
        made.history, made.lease, made.installation = self.history, self.lease, self.installation
        return made


class Registry:
    """The one database behind every `MemoryStore`."""

    def __init__(self, wall: Callable[[], int], incarnation: Callable[[], str] = lambda: str(uuid.uuid4())) -> None:
        self.wall = wall
        self.incarnation = incarnation
        self.links = itertools.count(1)
        """No two epochs get the same link, whatever was put back between them."""
        self.committed = Contents(incarnation(), Instant(wall()))


class MemoryStore(Store):
    """One process's way to the registry. `away` makes it unreachable for this process alone."""

    def __init__(self, registry: Registry) -> None:
        super().__init__("sqlite://", wall=registry.wall)
        self.registry = registry
        self.away: Callable[[], bool] = lambda: False
        self.before: Callable[[str], None] = lambda _: None

    def _enter(self, point: str) -> None:
        self.before(point)
        if self.away():
            raise errors.StoreUnavailable("The registry is away.", retry_after=1)

    @contextmanager
    def read(self) -> Iterator[ReadTx]:
        known = self.known_epoch()
        self._enter("read")
        yield _Read(self.registry, self.registry.committed, known)

    @contextmanager
    def registry_view(self) -> Iterator[ReadTx]:
        """A test's own look, which no partition keeps out and no bomb hears of."""
        yield _Read(self.registry, self.registry.committed)

    @contextmanager
    def write(self) -> Iterator[WriteTx]:
        known = self.known_epoch()
        self._enter("write")
        tx = _Write(self.registry, self.registry.committed.copy(), known)
        yield tx
        epoch = tx.advance_epoch()
        self._enter("commit")
        self.registry.committed = tx.contents_now
        tx.committed_epoch = epoch
        self.before("committed")

    def poll(self) -> tuple[Epoch, Instant]:
        self._enter("poll")
        return self.registry.committed.epoch, Instant(self.registry.wall())

    def dispose(self) -> None:
        return None


class _Read(ReadTx):
    def __init__(self, registry: Registry, contents: Contents, known_epoch: Epoch | None = None) -> None:
        self._registry = registry
        self.contents_now = contents
        self._now: Instant | None = None
        self.known_epoch = known_epoch

    def now(self) -> Instant:
        if self._now is None:
            self._now = Instant(self._registry.wall())
        return self._now

    def epoch(self) -> Epoch:
        return self.contents_now.epoch

    def past_epoch(self, counter: int) -> Epoch | None:
        return self.contents_now.history.get(counter, (None, None))[0]

    def _was_counted_by_older_program(self, known: Epoch, found: Epoch) -> bool:
        """No older program runs here."""
        return False

    def _began_with(self, incarnation: str) -> bool:
        return any(epoch.incarnation == incarnation for epoch, _ in self.contents_now.history.values())

    def superseded(self, incarnation: str) -> int | None:
        found = (s for _, s in self.contents_now.history.values() if s is not None and s.incarnation == incarnation)
        return max((epoch.counter for epoch in found), default=None)

    def installation(self) -> Installation:
        return self.contents_now.installation

    def contents(self) -> RegistryContents:
        def viewed(cls: type[T]) -> tuple[T, ...]:
            return tuple(thing for thing in self._all(cls) if snapshot_view(thing) is not None)  # type: ignore[arg-type]

        return RegistryContents(
            epoch=self.epoch(),
            installation=self.installation().id,
            now=self.now(),
            key_sets=viewed(KeySet),
            keys=viewed(Key),
            versions=viewed(KeyVersion),
            external_keys=viewed(ExternalKey),
            clients=viewed(Client),
            tokens=viewed(ApiToken),
            grants=viewed(Grant),
            ever_published=self.ever_published(),
        )

    def ever_published(self, key_set_id: Id | None = None) -> frozenset[tuple[Id, str]]:
        shown = {(v.key_set_id, v.alg) for v in self._all(KeyVersion) if v.published_at is not None}
        shown |= {(e.key_set_id, e.alg) for e in self._all(ExternalKey)}
        return frozenset(pair for pair in shown if key_set_id in (None, pair[0]))

    # --- finders

    def _all(self, cls: type[T]) -> list[T]:
        return list(self.contents_now.tables[cls].values())

    def _by_id(self, cls: type[T], thing_id: Id) -> T | None:
        found: T | None = self.contents_now.tables[cls].get(thing_id)
        return found

    def _only(self, cls: type[T], fits: Callable[[T], bool]) -> T | None:
        return next((thing for thing in self.contents_now.tables[cls].values() if fits(thing)), None)

    def _page(self, things: list[T], after: Id | None, limit: int | None) -> list[T]:
        if after is not None:
            ids = [thing.id for thing in things]  # type: ignore[attr-defined]
            things = things[ids.index(after) + 1 :] if after in ids else []
        return things if limit is None else things[:limit]

    def key_set(self, name: str) -> KeySet | None:
        return self._only(KeySet, lambda s: s.name == name and s.deleted_at is None)

    def key_set_by_id(self, thing_id: Id) -> KeySet | None:
        return self._by_id(KeySet, thing_id)

    def key_sets(self, *, after: Id | None = None, limit: int | None = None) -> list[KeySet]:
        return self._page([s for s in self._all(KeySet) if s.deleted_at is None], after, limit)

    def key(self, key_set_id: Id, name: str) -> Key | None:
        return self._only(Key, lambda k: k.key_set_id == key_set_id and k.name == name and k.deleted_at is None)

    def key_by_id(self, thing_id: Id) -> Key | None:
        return self._by_id(Key, thing_id)

    def keys(self, key_set_id: Id | None = None, *, after: Id | None = None, limit: int | None = None) -> list[Key]:
        found = [k for k in self._all(Key) if key_set_id in (None, k.key_set_id) and k.deleted_at is None]
        return self._page(found, after, limit)

    def version(self, thing_id: Id) -> KeyVersion | None:
        return self._by_id(KeyVersion, thing_id)

    def version_by_kid(self, key_set_id: Id, kid: str) -> KeyVersion | None:
        return self._only(KeyVersion, lambda v: v.key_set_id == key_set_id and v.kid == kid)

    def version_by_number(self, key_id: Id, number: int) -> KeyVersion | None:
        return self._only(KeyVersion, lambda v: v.key_id == key_id and v.number == number)

    def versions(
        self,
        *,
        key_set_id: Id | None = None,
        key_id: Id | None = None,
        states: Collection[VersionState] | None = None,
        unseen: bool = False,
        public_jwk: Mapping[str, str] | None = None,
        after: Id | None = None,
        limit: int | None = None,
    ) -> list[KeyVersion]:
        found = [
            v
            for v in self._all(KeyVersion)
            if (key_set_id is None or v.key_set_id == key_set_id)
            and (key_id is None or v.key_id == key_id)
            and (states is None or v.state in states)
            and not (unseen and v.visible_since is not None)
            and (public_jwk is None or v.public_jwk == public_jwk)
        ]
        return self._page(found, after, limit)

    def external_key(self, key_set_id: Id, kid: str) -> ExternalKey | None:
        return self._only(ExternalKey, lambda e: e.key_set_id == key_set_id and e.kid == kid and e.removed_at is None)

    def external_keys(
        self,
        key_set_id: Id | None = None,
        *,
        include_removed: bool = False,
        public_jwk: Mapping[str, str] | None = None,
        after: Id | None = None,
        limit: int | None = None,
    ) -> list[ExternalKey]:
        found = [
            e
            for e in self._all(ExternalKey)
            if key_set_id in (None, e.key_set_id)
            and (include_removed or e.removed_at is None)
            and (public_jwk is None or e.public_jwk == public_jwk)
        ]
        return self._page(found, after, limit)

    def count_removed_external_keys(self, key_set_id: Id) -> int:
        return sum(e.key_set_id == key_set_id and e.removed_at is not None for e in self._all(ExternalKey))

    def shared_keys(self, public_jwks: Collection[Mapping[str, str]]) -> frozenset[str]:
        wanted = {jose.thumbprint(jwk) for jwk in public_jwks}
        counted = Counter(thumbprint for thumbprint, _ in self.contents_now.kids.values())
        return frozenset(thumbprint for thumbprint in wanted if counted[thumbprint] > 1)

    def kid_binding(self, key_set_id: Id, kid: str) -> str | None:
        found = self.contents_now.kids.get((key_set_id, kid))
        return found and found[0]

    def client(self, name: str) -> Client | None:
        return self._only(Client, lambda c: c.name == name and c.deleted_at is None)

    def client_by_id(self, thing_id: Id) -> Client | None:
        return self._by_id(Client, thing_id)

    def token_by_sha256(self, sha256: str) -> ApiToken | None:
        return self._only(ApiToken, lambda t: t.sha256 == sha256)

    def token(self, thing_id: Id) -> ApiToken | None:
        return self._by_id(ApiToken, thing_id)

    def clients(self, *, after: Id | None = None, limit: int | None = None) -> list[Client]:
        return self._page([c for c in self._all(Client) if c.deleted_at is None], after, limit)

    def tokens(
        self, client_id: Id | None = None, *, after: Id | None = None, limit: int | None = None
    ) -> list[ApiToken]:
        return self._page([t for t in self._all(ApiToken) if client_id in (None, t.client_id)], after, limit)

    def grant(self, thing_id: Id) -> Grant | None:
        return self._by_id(Grant, thing_id)

    def grants(
        self,
        client_id: Id | None = None,
        *,
        role: str | None = None,
        key_set_id: Id | None = None,
        include_deleted: bool = False,
        after: Id | None = None,
        limit: int | None = None,
    ) -> list[Grant]:
        found = [
            g
            for g in self._all(Grant)
            if client_id in (None, g.client_id)
            and role in (None, g.role)
            and key_set_id in (None, g.key_set_id)
            and (include_deleted or g.deleted_at is None)
        ]
        return self._page(found, after, limit)

    def worker(self, thing_id: Id) -> Worker | None:
        return self._by_id(Worker, thing_id)

    def workers(self, *, include_stopped: bool = False) -> list[Worker]:
        return [w for w in self._all(Worker) if include_stopped or w.stopped_at is None]

    def intent(self, thing_id: Id) -> Intent | None:
        return self._by_id(Intent, thing_id)

    def intents(
        self,
        *,
        states: Collection[IntentState] | None = None,
        version_id: Id | None = None,
        after: Id | None = None,
        limit: int | None = None,
    ) -> list[Intent]:
        found = [
            i
            for i in self._all(Intent)
            if (version_id is None or i.version_id == version_id) and (states is None or i.state in states)
        ]
        return self._page(found, after, limit)

    def idempotency_record(self, client_id: Id, key: str) -> IdempotencyRecord | None:
        return self._only(
            IdempotencyRecord, lambda r: (r.client_id, r.key) == (client_id, key) and r.expires_at > self.now()
        )

    def has_expired_idempotency_records(self) -> bool:
        return any(r.expires_at <= self.now() for r in self._all(IdempotencyRecord))

    def custodian_lease(self) -> CustodianLease | None:
        return self.contents_now.lease


class _Write(_Read, WriteTx):
    def __init__(self, registry: Registry, contents: Contents, known_epoch: Epoch | None = None) -> None:
        _Read.__init__(self, registry, contents, known_epoch)
        self.require_known_history()
        self._views = {}
        self._reborn = False
        self._superseded = None
        self._own: set[type[Any]] = set()
        self.committed_epoch = None

    def add(self, thing: Any) -> None:
        self._check(thing)
        self._bind(thing)
        table = self._table(type(thing))
        in_order = not table or next(reversed(table)) < thing.id
        table[thing.id] = thing
        if not in_order:
            self.contents_now.tables[type(thing)] = dict(sorted(table.items()))
        self._note(thing, None)

    def save(self, thing: Any) -> None:
        before = self.contents_now.tables[type(thing)].get(thing.id)
        if before is None:
            raise errors.InternalError(f"No {type(thing).__name__} of that id is there to be saved.")
        if before == thing:
            return
        kid = getattr(before, "kid", None)
        if kid is not None and thing.kid != kid:
            raise errors.InternalError("A kid that is bound cannot be taken off its key.")
        if kid is not None and thing.public_jwk != before.public_jwk:
            raise errors.InternalError("The public key of a kid stays the same.")
        self._check(thing)
        if kid is None:
            self._bind(thing)
        self._table(type(thing))[thing.id] = thing
        self._note(thing, snapshot_view(before))

    def set_custodian_lease(self, lease: CustodianLease) -> None:
        current = self.contents_now.lease
        if current is not None and lease.term < current.term:
            raise errors.InternalError("A custodian's term cannot go back.")
        self.contents_now.lease = lease

    def remove_expired_idempotency_records(self) -> None:
        table = self._table(IdempotencyRecord)
        for record in self._all(IdempotencyRecord):
            if record.expires_at <= self.now():
                del table[record.id]

    def remove_idempotency_record(self, created_id: Id) -> None:
        table = self._table(IdempotencyRecord)
        for record in self._all(IdempotencyRecord):
            if record.created_id == created_id:
                del table[record.id]

    def new_incarnation(self, superseded: Epoch | None = None) -> None:
        self._superseded = superseded
        self.contents_now.epoch = Epoch(self._registry.incarnation(), self.contents_now.epoch.counter)
        self._reborn = True

    def advance_epoch(self) -> Epoch | None:
        if not self._reborn and all(before == after for before, after in self._views.values()):
            return None
        following = self.next_epoch()
        epoch = Epoch(following.incarnation, following.counter, str(next(self._registry.links)))
        self.contents_now.epoch = epoch
        self.contents_now.history = self.contents_now.history | {epoch.counter: (epoch, self._superseded)}
        return epoch

    def _table(self, cls: type[Any]) -> dict[str, Any]:
        """This transaction's own copy of a table."""
        if cls not in self._own:
            self._own.add(cls)
            self.contents_now.tables[cls] = dict(self.contents_now.tables[cls])
        return self.contents_now.tables[cls]

    def _bind(self, thing: Any) -> None:
        kid = getattr(thing, "kid", None)
        if kid is None:
            return
        place, mine = (thing.key_set_id, kid), jose.thumbprint(thing.public_jwk)
        computed = isinstance(thing, KeyVersion) and thing.origin is Origin.GENERATED
        for (key_set_id, other), (thumbprint, was_computed) in self.contents_now.kids.items():
            if other == kid and (computed or (thumbprint != mine if key_set_id == place[0] else was_computed)):
                raise errors.KidTaken
        if place not in self.contents_now.kids:
            self.contents_now.kids = self.contents_now.kids | {place: (mine, computed)}

    def _check(self, thing: Any) -> None:
        """The constraints of the schema that key life depends on."""
        if isinstance(thing, KeyVersion) and thing.state is _S.ACTIVE:
            others = (v for v in self._all(KeyVersion) if v.key_id == thing.key_id and v.id != thing.id)
            if any(v.state is _S.ACTIVE for v in others):
                raise errors.TransitionRefused("One version of a key is active.")
        if isinstance(thing, ExternalKey) and thing.removed_at is None:
            found = self.external_key(thing.key_set_id, thing.kid)
            if found is not None and found.id != thing.id:
                raise errors.KidTaken("The set publishes this external key already.")
        if isinstance(thing, KeyVersion) and thing.kid is not None:
            same = self.version_by_kid(thing.key_set_id, thing.kid)
            if same is not None and same.id != thing.id:
                raise errors.KidTaken("Another version of the set has this kid.")
        taken: dict[type[Any], tuple[tuple[str, ...], type[errors.Conflict]]] = {
            KeySet: (("name",), errors.NameTaken),
            Key: (("key_set_id", "name"), errors.NameTaken),
            Client: (("name",), errors.NameTaken),
            ApiToken: (("sha256",), errors.Conflict),
            KeyVersion: (("key_id", "number"), errors.Conflict),
            IdempotencyRecord: (("client_id", "key"), errors.Conflict),
        }
        if type(thing) in taken:
            self._unique(thing, *taken[type(thing)])
        if isinstance(thing, KeySet):
            self._unique(thing, ("issuer",), errors.IssuerTaken)

    def _unique(self, thing: Any, names: tuple[str, ...], error: type[errors.Conflict]) -> None:
        for other in self.contents_now.tables[type(thing)].values():
            gone = thing if getattr(thing, "deleted_at", None) is not None else other
            if isinstance(thing, KeySet | Key) and gone.deleted_at is not None:
                continue  # a tombstone leaves its name to others
            if other.id != thing.id and all(getattr(other, n) == getattr(thing, n) for n in names):
                raise error
