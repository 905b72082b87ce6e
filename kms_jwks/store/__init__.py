"""The registry in a database: the only SQL of the project. Workers read it through snapshots, not per request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kms_jwks import errors
from kms_jwks.model import Epoch, Instant
from kms_jwks.store import schema
from kms_jwks.store.database import ConnectionSettings, Database
from kms_jwks.store.error_map import HOW_TO_CREATE
from kms_jwks.store.mapping import RegistryContents, snapshot_view
from kms_jwks.store.transactions import EPOCH, ReadTx, WriteTx

__all__ = ["ConnectionSettings", "ReadTx", "RegistryContents", "Store", "WriteTx", "snapshot_view"]


class Store:
    """A registry. It opens nothing until it is used, so it may be made before a fork.

    `wall` (microseconds) replaces this machine's clock, which is the database's time on SQLite; `connection_settings`
    are for PostgreSQL. Every method raises StoreUnavailable while the database cannot be used, and ConfigurationError
    for a URL that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        wall: Callable[[], int] | None = None,
        connection_settings: ConnectionSettings | None = None,
    ) -> None:
        self._database = Database(url, wall, connection_settings)
        self.known_epoch: Callable[[], Epoch | None] = lambda: None
        """The highest epoch that this node has confirmed. It is asked for before each transaction: every write, and a
        read that asks for it, is refused where the registry does not continue that epoch's history."""

    @property
    def url(self) -> str:
        """The database's URL without a password."""
        return self._database.url_without_password

    @contextmanager
    def read(self) -> Iterator[ReadTx]:
        """One consistent read."""
        known = self.known_epoch()
        with self._database.begin(write=False) as connection:
            yield ReadTx(self._database, connection, known)

    @contextmanager
    def write(self) -> Iterator[WriteTx]:
        """One write transaction: committed when the block ends, rolled back when it raises.

        Raises RegistryRolledBack for a registry that has lost changes which this node knows.
        """
        known = self.known_epoch()
        with self._database.begin(write=True) as connection:
            tx = WriteTx(self._database, connection, known)
            yield tx
            epoch = tx.advance_epoch()
        tx.committed_epoch = epoch

    def poll(self) -> tuple[Epoch, Instant]:
        """The epoch and the database's time, in one exchange."""
        found = self._database.fetch_first(EPOCH)
        if found is None:
            raise errors.SchemaMismatch("The registry is empty.", next_step=HOW_TO_CREATE)
        row, now = found
        return Epoch(row.incarnation, row.counter, row.link), now

    def check_schema(self) -> None:
        """Raise SchemaMismatch unless the schema is the one this program was written for."""
        with self._database.begin(write=False) as connection:
            schema.check(connection)

    def upgrade(self) -> None:
        """Create SQLite's file if it is missing, and bring the schema up to date."""
        self._database.create_file()
        with self._database.migrate() as connection:
            schema.upgrade(connection, self._database.now(connection))

    def dispose(self) -> None:
        """Close this process's connections."""
        self._database.dispose()
