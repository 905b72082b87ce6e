"""Writing the registry, one writer after another: add and save, the epoch's rule, kids bound for ever."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection, insert, select, update

from kms_jwks import errors
from kms_jwks.model import CustodianLease, Epoch, ExternalKey, Id, KeyVersion
from kms_jwks.store import tables as t
from kms_jwks.store.engine import Database
from kms_jwks.store.failures import HOW_TO_MAKE_ONE, translated
from kms_jwks.store.mapping import MAPPERS, Thing, snapshot_view
from kms_jwks.store.reading import ReadTx


class WriteTx(ReadTx):
    """One write transaction; no other one runs beside it.

    The epoch's counter grows by one at the commit when what a snapshot holds has changed, and otherwise not.
    """

    def __init__(self, database: Database, connection: Connection) -> None:
        super().__init__(database, connection)
        # On SQLite the transaction holds the lock already; elsewhere this row is what writers queue for.
        if connection.execute(select(t.epoch.c.counter).with_for_update()).first() is None:
            raise errors.SchemaMismatch("The registry is empty.", next_step=HOW_TO_MAKE_ONE)
        self._views: dict[tuple[type[object], Id], tuple[object, object]] = {}
        self._reborn = False
        self.committed_epoch: Epoch | None = None
        """After the commit: the new epoch, or None when no snapshot is affected."""

    def next_epoch(self) -> Epoch:
        """The epoch this transaction commits, should it change what a snapshot holds."""
        current = self.epoch()
        return Epoch(current.incarnation, current.counter + 1)

    def add(self, thing: Thing) -> None:
        """Write a new thing. Raises NameTaken, KidTaken, TransitionRefused, Conflict; then nothing of it is written."""
        mapper = MAPPERS[type(thing)]
        with translated(), self._connection.begin_nested():
            self._bind_kid(thing)
            self._connection.execute(insert(mapper.table).values(mapper.to_row(thing)))
        self._note(thing, None)

    def save(self, thing: Thing) -> None:
        """Write a thing as it is now; one that has not changed writes nothing. Raises KidTaken, TransitionRefused."""
        mapper = MAPPERS[type(thing)]
        before = self._first(type(thing), mapper.table.c.id == thing.id)
        if before is None:
            raise errors.InternalError(f"No {type(thing).__name__} of that id is there to be saved.")
        old, new = mapper.to_row(before), mapper.to_row(thing)
        changed = {name: value for name, value in new.items() if old[name] != value}
        if not changed:
            return
        if "kid" in changed and old["kid"] is not None:
            raise errors.InternalError("A kid that is bound cannot be taken off its key.")
        with translated(), self._connection.begin_nested():
            if "kid" in changed:
                self._bind_kid(thing)
            self._connection.execute(update(mapper.table).where(mapper.table.c.id == thing.id).values(changed))
        self._note(thing, snapshot_view(before))

    def set_custodian_lease(self, lease: CustodianLease) -> None:
        """Write who acts. The term never goes back."""
        row = MAPPERS[CustodianLease].to_row(lease)
        current = self.custodian_lease()
        if current is None:
            self._connection.execute(insert(t.custodian).values(single=1, **row))
            return
        if lease.term < current.term:
            raise errors.InternalError("A custodian's term cannot go back.")
        self._connection.execute(update(t.custodian).values(row))

    def new_incarnation(self) -> None:
        """Begin the epochs anew: no worker's confirmation of before counts any more (a restored backup)."""
        self._connection.execute(update(t.epoch).values(incarnation=str(uuid.uuid4())))
        self._reborn = True

    def advance_epoch(self) -> Epoch | None:
        """Called once, just before the commit: the epoch it commits, or None when every view is what it was."""
        if not self._reborn and all(before == after for before, after in self._views.values()):
            return None
        epoch = self.next_epoch()
        self._connection.execute(update(t.epoch).values(counter=epoch.counter))
        return epoch

    def _note(self, thing: Thing, before: object) -> None:
        key = (type(thing), thing.id)
        first, _ = self._views.get(key, (before, None))
        self._views[key] = (first, snapshot_view(thing))

    def _bind_kid(self, thing: Thing) -> None:
        if not isinstance(thing, KeyVersion | ExternalKey) or thing.kid is None:
            return
        kind = "version" if isinstance(thing, KeyVersion) else "external_key"
        self._connection.execute(insert(t.kids).values(kid=thing.kid, owner_kind=kind, owner_id=thing.id))
