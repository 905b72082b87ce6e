"""The registry in a database: the only SQL of the project. Workers read it through snapshots, not per request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import select

from kms_jwks import errors
from kms_jwks.model import Epoch, Instant
from kms_jwks.store import schema, tables
from kms_jwks.store.engine import Connecting, Database
from kms_jwks.store.failures import HOW_TO_MAKE_ONE
from kms_jwks.store.mapping import snapshot_view
from kms_jwks.store.reading import ReadTx, RegistryContents
from kms_jwks.store.writing import WriteTx

__all__ = ["Connecting", "ReadTx", "RegistryContents", "Store", "WriteTx", "snapshot_view"]


class Store:
    """A registry. Made before the fork if need be: it opens nothing until it is used.

    `wall` (microseconds) stands for the database's clock on SQLite, where both are this machine's; `connecting` is for
    PostgreSQL. Everything raises StoreUnavailable while the database is away; a URL that cannot be used is a
    ConfigurationError.
    """

    def __init__(
        self, url: str, *, wall: Callable[[], int] | None = None, connecting: Connecting | None = None
    ) -> None:
        self._database = Database(url, wall, connecting)

    @property
    def url(self) -> str:
        """The database's URL without a password."""
        return self._database.shown_url

    @contextmanager
    def read(self) -> Iterator[ReadTx]:
        """One consistent read."""
        with self._database.begin(write=False) as connection:
            yield ReadTx(self._database, connection)

    @contextmanager
    def write(self) -> Iterator[WriteTx]:
        """One write transaction: committed when the block ends, rolled back when it raises."""
        with self._database.begin(write=True) as connection:
            tx = WriteTx(self._database, connection)
            yield tx
            epoch = tx.advance_epoch()
        tx.committed_epoch = epoch

    def poll(self) -> tuple[Epoch, Instant]:
        """The epoch and the database's time, cheaply."""
        found = self._database.ask(select(tables.epoch.c.incarnation, tables.epoch.c.counter))
        if found is None:
            raise errors.SchemaMismatch("The registry is empty.", next_step=HOW_TO_MAKE_ONE)
        row, now = found
        return Epoch(row.incarnation, row.counter), now

    def check_schema(self) -> None:
        """Raise SchemaMismatch unless the schema is the one this program was written for."""
        with self._database.begin(write=False) as connection:
            schema.check(connection)

    def upgrade(self) -> None:
        """Make the database if it is not there, and bring its schema up to date."""
        self._database.create_file()
        with self._database.migrate() as connection:
            schema.upgrade(connection, self._database.now(connection))

    def dispose(self) -> None:
        """Close this process's connections."""
        self._database.dispose()
