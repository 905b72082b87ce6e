"""Read and write transactions on the registry: finders, lists in the order of creation, changes, the epoch's rule."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, select, tuple_, union, update

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
from kms_jwks.store import tables as t
from kms_jwks.store.database import Database
from kms_jwks.store.error_map import HOW_TO_CREATE, translate_errors
from kms_jwks.store.mapping import MAPPERS, Entity, RegistryContents, snapshot_view

T = TypeVar("T")
Where = ColumnElement[bool]

HISTORY_KEPT = 100_000
"""How many past epochs the registry remembers. A node that was away for more changes is refused until `db restored`."""


EPOCH = select(t.epoch.c.incarnation, t.epoch.c.counter, t.epoch.c.link)
_FORGET_EVERY = 256
_ACCEPT = (
    "Compare the keys with the revocations that you know of, then run `kms-jwks db restored --accept` on this node."
)


class ReadTx:
    """One read transaction. Finders return None for what is not in the registry.

    `known_epoch` is the highest epoch that this node had confirmed before the transaction began.
    """

    known_epoch: Epoch | None = None

    def __init__(self, database: Database, connection: Connection, known_epoch: Epoch | None = None) -> None:
        self._database = database
        self._connection = connection
        self._now: Instant | None = None
        self.known_epoch = known_epoch

    # --- the registry as a whole

    def now(self) -> Instant:
        """The database's time, read once per transaction."""
        if self._now is None:
            self._now = self._database.now(self._connection)
        return self._now

    def epoch(self) -> Epoch:
        """The epoch this transaction sees."""
        return self._epoch(EPOCH)

    def past_epoch(self, counter: int) -> Epoch | None:
        """The epoch of this registry's history with that counter; None for one that is unknown or too long ago."""
        c = t.history.c
        row = self._connection.execute(select(c.incarnation, c.link).where(c.counter == counter)).first()
        return None if row is None else Epoch(row.incarnation, counter, row.link)

    def superseded(self, incarnation: str) -> int | None:
        """The highest counter of an earlier incarnation that `db restored` has superseded; None where it has not."""
        c = t.history.c
        query = select(func.max(c.supersedes_counter)).where(c.supersedes_incarnation == incarnation)
        found: int | None = self._connection.scalar(query)
        return found

    def require_known_history(self) -> None:
        """Raise RegistryRolledBack unless this registry continues the history that this node has confirmed.

        It does where it holds the known epoch itself, with the same link, or where `db restored` began its incarnation
        and superseded the known epoch. An old copy holds neither: it was made before the known epoch.
        """
        if self.known_epoch is not None:
            self._require_history(self.known_epoch, self.epoch())

    def _require_history(self, known: Epoch, found: Epoch) -> None:
        if found.is_same(known):
            return
        past = self.past_epoch(known.counter)
        if known.is_same(past) or (past is None and self._was_counted_by_older_program(known, found)):
            return
        superseded = self.superseded(known.incarnation) if found.incarnation != known.incarnation else None
        if superseded is not None and superseded >= known.counter:
            return
        raise _rolled_back(known, found, past, superseded, restored=self._began_with(known.incarnation))

    def _began_with(self, incarnation: str) -> bool:
        """Whether an earlier part of this registry's history is of that incarnation."""
        c = t.history.c
        return (
            self._connection.execute(select(c.counter).where(c.incarnation == incarnation).limit(1)).first() is not None
        )

    def _was_counted_by_older_program(self, known: Epoch, found: Epoch) -> bool:
        """Whether `known` has no row because a program of schema 0002, which still ran after the upgrade, made it.

        Such a program counts without a link: its epochs have the link of the last row before them.
        """
        c = t.history.c
        before = select(c.link).where(c.counter < known.counter).order_by(c.counter.desc()).limit(1)
        row = self._connection.execute(before).first()
        return row is not None and row.link == known.link and known.counter <= found.counter

    def installation(self) -> Installation:
        """Which registry this is."""
        row = self._connection.execute(select(t.installation)).one()
        return Installation(row.id, Instant(row.created_at))

    def contents(self) -> RegistryContents:
        """Everything that a snapshot holds."""
        v = t.versions.c
        shown = [state.value for state in VersionState if state.in_jwks]
        return RegistryContents(
            epoch=self.epoch(),
            installation=self.installation().id,
            now=self.now(),
            key_sets=self._viewed(KeySet, t.key_sets.c.deleted_at.is_(None)),
            keys=self._viewed(Key, t.keys.c.deleted_at.is_(None)),
            versions=self._viewed(KeyVersion, v.state.in_(shown) | v.revoked_at.is_not(None)),
            external_keys=self._viewed(
                ExternalKey, t.external_keys.c.removed_at.is_(None) | t.external_keys.c.revoked_at.is_not(None)
            ),
            clients=self._viewed(Client, t.clients.c.deleted_at.is_(None)),
            tokens=self._viewed(ApiToken),
            grants=self._viewed(Grant, t.grants.c.deleted_at.is_(None)),
            ever_published=self.ever_published(),
        )

    # --- key sets, keys, versions

    def key_set(self, name: str) -> KeySet | None:
        """The key set of that name, if it was not deleted."""
        return self._first(KeySet, t.key_sets.c.name == name, t.key_sets.c.deleted_at.is_(None))

    def key_set_by_id(self, entity_id: Id) -> KeySet | None:
        """The key set of that id, deleted or not."""
        return self._first(KeySet, t.key_sets.c.id == entity_id)

    def key_sets(self, *, after: Id | None = None, limit: int | None = None) -> list[KeySet]:
        """Key sets that were not deleted, after the id `after`, at most `limit`."""
        return self._list(KeySet, t.key_sets.c.deleted_at.is_(None), after=after, limit=limit)

    def key(self, key_set_id: Id, name: str) -> Key | None:
        """The key of that name in a set, if it was not deleted."""
        c = t.keys.c
        return self._first(Key, c.key_set_id == key_set_id, c.name == name, c.deleted_at.is_(None))

    def key_by_id(self, entity_id: Id) -> Key | None:
        """The key of that id, deleted or not."""
        return self._first(Key, t.keys.c.id == entity_id)

    def keys(self, key_set_id: Id | None = None, *, after: Id | None = None, limit: int | None = None) -> list[Key]:
        """Keys that were not deleted, of one set or of all."""
        where = [*_equal(t.keys.c.key_set_id, key_set_id), t.keys.c.deleted_at.is_(None)]
        return self._list(Key, *where, after=after, limit=limit)

    def version(self, entity_id: Id) -> KeyVersion | None:
        """The version of that id."""
        return self._first(KeyVersion, t.versions.c.id == entity_id)

    def version_by_kid(self, key_set_id: Id, kid: str) -> KeyVersion | None:
        """The version of a key set that has the kid."""
        return self._first(KeyVersion, t.versions.c.key_set_id == key_set_id, t.versions.c.kid == kid)

    def version_by_number(self, key_id: Id, number: int) -> KeyVersion | None:
        """A key's version of that number."""
        return self._first(KeyVersion, t.versions.c.key_id == key_id, t.versions.c.number == number)

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
        """Versions, of one set or key, in some states, with one public key (its parameters alone).

        `unseen` selects those that were never visible everywhere.
        """
        c = t.versions.c
        where = [*_equal(c.key_set_id, key_set_id), *_equal(c.key_id, key_id)]
        if states is not None:
            where.append(c.state.in_([s.value for s in states]))
        if unseen:
            where.append(c.visible_since.is_(None))
        if public_jwk is not None:
            where.append(self._has_key(c, public_jwk))
        return self._list(KeyVersion, *where, after=after, limit=limit)

    def external_key(self, key_set_id: Id, kid: str) -> ExternalKey | None:
        """The external key that a set publishes under `kid`."""
        c = t.external_keys.c
        return self._first(ExternalKey, c.key_set_id == key_set_id, c.kid == kid, c.removed_at.is_(None))

    def external_keys(
        self,
        key_set_id: Id | None = None,
        *,
        include_removed: bool = False,
        public_jwk: Mapping[str, str] | None = None,
        after: Id | None = None,
        limit: int | None = None,
    ) -> list[ExternalKey]:
        """External keys, of one set or of all, with one public key (its parameters alone)."""
        c = t.external_keys.c
        where = [*_equal(c.key_set_id, key_set_id), *([] if include_removed else [c.removed_at.is_(None)])]
        if public_jwk is not None:
            where.append(self._has_key(c, public_jwk))
        return self._list(ExternalKey, *where, after=after, limit=limit)

    def count_removed_external_keys(self, key_set_id: Id) -> int:
        """How many external keys of a set were removed; their records stay."""
        c = t.external_keys.c
        removed = select(func.count()).where(c.key_set_id == key_set_id, c.removed_at.is_not(None))
        return self._connection.execute(removed).scalar_one()

    def ever_published(self, key_set_id: Id | None = None) -> frozenset[tuple[Id, str]]:
        """Key set and `alg` of every version and external key that was ever published, of one set or of all."""
        v, e = t.versions.c, t.external_keys.c
        versions = select(v.key_set_id, v.alg).where(v.published_at.is_not(None), *_equal(v.key_set_id, key_set_id))
        externals = select(e.key_set_id, e.alg).where(*_equal(e.key_set_id, key_set_id))
        return frozenset((Id(row[0]), row[1]) for row in self._connection.execute(union(versions, externals)))

    def shared_keys(self, public_jwks: Collection[Mapping[str, str]]) -> frozenset[str]:
        """The thumbprints (RFC 7638) of those public keys that more than one kid is bound to, in any key set."""
        c = t.kids.c
        wanted = {jose.thumbprint(jwk) for jwk in public_jwks}
        query = select(c.thumbprint).where(c.thumbprint.in_(wanted)).group_by(c.thumbprint).having(func.count() > 1)
        return frozenset(self._connection.execute(query).scalars())

    def kid_binding(self, key_set_id: Id, kid: str) -> str | None:
        """The public key that a kid of a key set is bound to for ever: its thumbprint (RFC 7638); None for a free kid.

        A free kid can still be refused: where it is the computed kid of a pair that was made for another set.
        """
        query = select(t.kids.c.thumbprint).where(t.kids.c.key_set_id == key_set_id, t.kids.c.kid == kid)
        found: str | None = self._connection.execute(query).scalar()
        return found

    # --- callers

    def client(self, name: str) -> Client | None:
        """The client of that name, if it was not deleted."""
        return self._first(Client, t.clients.c.name == name, t.clients.c.deleted_at.is_(None))

    def client_by_id(self, entity_id: Id) -> Client | None:
        """The client of that id, deleted or not."""
        return self._first(Client, t.clients.c.id == entity_id)

    def clients(self, *, after: Id | None = None, limit: int | None = None) -> list[Client]:
        """Clients that were not deleted."""
        return self._list(Client, t.clients.c.deleted_at.is_(None), after=after, limit=limit)

    def token(self, entity_id: Id) -> ApiToken | None:
        """The API token of that id."""
        return self._first(ApiToken, t.tokens.c.id == entity_id)

    def token_by_sha256(self, sha256: str) -> ApiToken | None:
        """The API token with that SHA-256, lower-case hex."""
        return self._first(ApiToken, t.tokens.c.sha256 == sha256)

    def tokens(
        self, client_id: Id | None = None, *, after: Id | None = None, limit: int | None = None
    ) -> list[ApiToken]:
        """API tokens, of one client or of all, revoked ones included."""
        return self._list(ApiToken, *_equal(t.tokens.c.client_id, client_id), after=after, limit=limit)

    def grant(self, entity_id: Id) -> Grant | None:
        """The grant of that id, deleted or not."""
        return self._first(Grant, t.grants.c.id == entity_id)

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
        """Grants, of one client or of all, of one role, and those that name one key set."""
        c = t.grants.c
        where = [*_equal(c.client_id, client_id), *_equal(c.role, role), *_equal(c.key_set_id, key_set_id)]
        where += [] if include_deleted else [c.deleted_at.is_(None)]
        return self._list(Grant, *where, after=after, limit=limit)

    # --- processes

    def worker(self, entity_id: Id) -> Worker | None:
        """The worker of that id, stopped or not."""
        return self._first(Worker, t.workers.c.id == entity_id)

    def workers(self, *, include_stopped: bool = False) -> list[Worker]:
        """Workers that have not stopped, or every worker."""
        return self._list(Worker, *([] if include_stopped else [t.workers.c.stopped_at.is_(None)]))

    def intent(self, entity_id: Id) -> Intent | None:
        """The intent of that id."""
        return self._first(Intent, t.intents.c.id == entity_id)

    def intents(
        self,
        *,
        states: Collection[IntentState] | None = None,
        version_id: Id | None = None,
        after: Id | None = None,
        limit: int | None = None,
    ) -> list[Intent]:
        """Intents, in some states, of one version."""
        where = _equal(t.intents.c.version_id, version_id)
        if states is not None:
            where.append(t.intents.c.state.in_([s.value for s in states]))
        return self._list(Intent, *where, after=after, limit=limit)

    def idempotency_record(self, client_id: Id, key: str) -> IdempotencyRecord | None:
        """What a client's creation with this Idempotency-Key made, if it is not expired."""
        c = t.idempotency_records.c
        return self._first(IdempotencyRecord, c.client_id == client_id, c.key == key, c.expires_at > self.now())

    def has_expired_idempotency_records(self) -> bool:
        """Whether there is one to remove."""
        query = select(t.idempotency_records.c.id).where(t.idempotency_records.c.expires_at <= self.now())
        return self._connection.execute(query.limit(1)).first() is not None

    def custodian_lease(self) -> CustodianLease | None:
        """The custodian's lease; None before the first one."""
        found = self._connection.execute(select(t.custodian)).mappings().first()
        return None if found is None else MAPPERS[CustodianLease].from_row(found)

    # --- helpers

    def _epoch(self, query: Select[Any]) -> Epoch:
        row = self._connection.execute(query).first()
        if row is None:
            raise errors.SchemaMismatch("The registry is empty.", next_step=HOW_TO_CREATE)
        return Epoch(row.incarnation, row.counter, row.link)

    def _first(self, cls: type[T], *where: Where) -> T | None:
        mapper = MAPPERS[cls]
        row = self._connection.execute(select(mapper.table).where(*where)).mappings().first()
        return None if row is None else mapper.from_row(row)

    def _list(self, cls: type[T], *where: Where, after: Id | None = None, limit: int | None = None) -> list[T]:
        mapper = MAPPERS[cls]
        query = select(mapper.table).where(*where).order_by(mapper.table.c.id)
        if after is not None:
            query = query.where(mapper.table.c.id > after)
        if limit is not None:
            query = query.limit(limit)
        return [mapper.from_row(row) for row in self._connection.execute(query).mappings()]

    def _has_key(self, columns: Any, public_jwk: Mapping[str, str]) -> Where:
        """The condition that a version or external key has this public key, by the kids that are bound to it."""
        c = t.kids.c
        query = select(c.key_set_id, c.kid).where(c.thumbprint == jose.thumbprint(public_jwk))
        bound = [tuple(row) for row in self._connection.execute(query)]
        return tuple_(columns.key_set_id, columns.kid).in_(bound)

    def _viewed(self, cls: type[T], *where: Where) -> tuple[T, ...]:
        return tuple(entity for entity in self._list(cls, *where) if snapshot_view(entity) is not None)  # type: ignore[arg-type]


class WriteTx(ReadTx):
    """One write transaction. No other one runs at the same time.

    The commit increments the epoch's counter if what a snapshot holds has changed, and otherwise leaves it.
    """

    def __init__(self, database: Database, connection: Connection, known_epoch: Epoch | None = None) -> None:
        """Raises RegistryRolledBack."""
        super().__init__(database, connection, known_epoch)
        # On SQLite the transaction holds the lock already; on a server the writers queue for this row.
        found = self._epoch(EPOCH.with_for_update())
        if known_epoch is not None:
            self._require_history(known_epoch, found)
        self._views: dict[tuple[type[object], Id], tuple[object, object]] = {}
        self._incarnation_changed = False
        self._superseded: Epoch | None = None
        self.committed_epoch: Epoch | None = None
        """After the commit: the new epoch, or None when no snapshot is affected."""

    def next_epoch(self) -> Epoch:
        """The epoch that this transaction commits if it changes what a snapshot holds."""
        current = self.epoch()
        return Epoch(current.incarnation, current.counter + 1)

    def add(self, entity: Entity) -> None:
        """Insert an entity. Raises NameTaken, KidTaken, TransitionRefused, Conflict; then nothing of it is written."""
        mapper = MAPPERS[type(entity)]
        with translate_errors(), self._connection.begin_nested():
            self._bind_kid(entity)
            self._connection.execute(insert(mapper.table).values(mapper.to_row(entity)))
        self._note(entity, None)

    def save(self, entity: Entity) -> None:
        """Update an entity's changed columns. Raises KidTaken, TransitionRefused; then nothing of it is written."""
        mapper = MAPPERS[type(entity)]
        before = self._first(type(entity), mapper.table.c.id == entity.id)
        if before is None:
            raise errors.InternalError(f"No {type(entity).__name__} of that id is in the registry.")
        old, new = mapper.to_row(before), mapper.to_row(entity)
        changed = {name: value for name, value in new.items() if old[name] != value}
        if not changed:
            return
        if "kid" in changed and old["kid"] is not None:
            raise errors.InternalError("A kid that is bound to a key cannot be changed or removed.")
        if "public_jwk" in changed and old["kid"] is not None:
            raise errors.InternalError("The public key that a kid is bound to cannot be changed.")
        with translate_errors(), self._connection.begin_nested():
            if "kid" in changed:
                self._bind_kid(entity)
            self._connection.execute(update(mapper.table).where(mapper.table.c.id == entity.id).values(changed))
        self._note(entity, snapshot_view(before))

    def set_custodian_lease(self, lease: CustodianLease) -> None:
        """Write the custodian's lease. Raises InternalError for a lower term: terms never decrease."""
        row = MAPPERS[CustodianLease].to_row(lease)
        current = self.custodian_lease()
        if current is None:
            self._connection.execute(insert(t.custodian).values(single=1, **row))
            return
        if lease.term < current.term:
            raise errors.InternalError("A custodian's term cannot decrease.")
        self._connection.execute(update(t.custodian).values(row))

    def remove_expired_idempotency_records(self) -> None:
        """Delete the idempotency records whose time is over."""
        table = t.idempotency_records
        self._connection.execute(delete(table).where(table.c.expires_at <= self.now()))

    def remove_idempotency_record(self, created_id: Id) -> None:
        """Delete the record of the creation that made this object, so that the same call is tried anew."""
        table = t.idempotency_records
        self._connection.execute(delete(table).where(table.c.created_id == created_id))

    def new_incarnation(self, superseded: Epoch | None = None) -> None:
        """Change the epoch's incarnation (a restored backup): earlier confirmations of workers no longer count.

        Nodes that have confirmed at most the epoch `superseded` accept it; those that have confirmed more refuse it.
        """
        self._connection.execute(update(t.epoch).values(incarnation=str(uuid.uuid4())))
        self._incarnation_changed = True
        self._superseded = superseded

    def advance_epoch(self) -> Epoch | None:
        """Called once, just before the commit: the epoch it commits, or None when no view has changed."""
        if not self._incarnation_changed and all(before == after for before, after in self._views.values()):
            return None
        current, following = self.epoch(), self.next_epoch()
        epoch = Epoch(following.incarnation, following.counter, next_link(current.link, following))
        superseded = self._superseded
        self._connection.execute(update(t.epoch).values(counter=epoch.counter, link=epoch.link))
        self._connection.execute(
            insert(t.history).values(
                counter=epoch.counter,
                incarnation=epoch.incarnation,
                link=epoch.link,
                supersedes_incarnation=superseded.incarnation if superseded is not None else None,
                supersedes_counter=superseded.counter if superseded is not None else None,
            )
        )
        if epoch.counter % _FORGET_EVERY == 0:
            c = t.history.c
            self._connection.execute(
                delete(t.history).where(c.counter <= epoch.counter - HISTORY_KEPT, c.supersedes_incarnation.is_(None))
            )
        return epoch

    def _note(self, entity: Entity, before: object) -> None:
        key = (type(entity), entity.id)
        first, _ = self._views.get(key, (before, None))
        self._views[key] = (first, snapshot_view(entity))

    def _bind_kid(self, entity: Entity) -> None:
        """Bind a kid to its public key within its key set. Raises KidTaken.

        Write transactions run one after the other, so nothing is bound between the check and the insert.
        """
        if not isinstance(entity, KeyVersion | ExternalKey) or entity.kid is None:
            return
        assert entity.public_jwk is not None
        thumbprint = jose.thumbprint(entity.public_jwk)
        computed = isinstance(entity, KeyVersion) and entity.origin is Origin.GENERATED
        bound = self._connection.execute(select(t.kids).where(t.kids.c.kid == entity.kid)).all()
        here = next((row for row in bound if row.key_set_id == entity.key_set_id), None)
        if here is not None and (computed or here.thumbprint != thumbprint):
            raise errors.KidTaken("The kid is bound to another public key of this key set, for ever.")
        if any(computed or row.computed for row in bound if row is not here):
            raise errors.KidTaken("The kid is that of a key pair that was made for another key set.")
        if here is None:
            values = {"key_set_id": entity.key_set_id, "kid": entity.kid}
            self._connection.execute(insert(t.kids).values(**values, thumbprint=thumbprint, computed=computed))


def next_link(link: str, epoch: Epoch) -> str:
    """The link of `epoch`, whose predecessor has `link`: random, so that no two histories come to the same one."""
    parts = (link, secrets.token_hex(16), epoch.incarnation, str(epoch.counter))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _rolled_back(
    known: Epoch, found: Epoch, past: Epoch | None, superseded: int | None, *, restored: bool
) -> errors.RegistryRolledBack:
    """What is wrong with a registry at `found` for a node that has confirmed `known`.

    `past` is what the registry has at the counter of `known`; `superseded` is how far `db restored` reached; `restored`
    is whether the registry was once of the incarnation of `known`.
    """
    if found.incarnation != known.incarnation:
        if superseded is None and restored:
            return errors.RegistryRolledBack(
                "`kms-jwks db restored` was run on a node that had confirmed no epoch of this node's incarnation. This"
                f" node had confirmed epoch {known.counter} of {known.incarnation}; later changes may be lost.",
                next_step=_ACCEPT,
            )
        if superseded is None:
            return errors.RegistryRolledBack(
                f"The registry is another one: its incarnation is {found.incarnation}, and this node last confirmed"
                f" epoch {known.counter} of {known.incarnation}."
            )
        return errors.RegistryRolledBack(
            f"`kms-jwks db restored` was run on a node that had confirmed epoch {superseded}. This node had confirmed"
            f" epoch {known.counter}; the changes between are lost.",
            next_step=_ACCEPT,
        )
    if found.counter < known.counter:
        return errors.RegistryRolledBack(
            f"The registry went back from epoch {known.counter} to {found.counter}: it has lost changes."
        )
    if past is None:
        return errors.RegistryRolledBack(
            f"The registry is at epoch {found.counter} and does not remember epoch {known.counter}, which this node"
            " confirmed last.",
            next_step=_ACCEPT,
        )
    return errors.RegistryRolledBack(
        f"The registry went back and was changed again: its epoch {known.counter} is not the one that this node"
        f" confirmed. It has lost changes. It is at epoch {found.counter} now."
    )


def _equal(column: Any, value: str | None) -> list[Where]:
    return [] if value is None else [column == value]
