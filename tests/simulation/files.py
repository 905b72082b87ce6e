"""SQLite under a plant in place of memory: the same points, partitions and views on the real store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kms_jwks import errors
from kms_jwks.model import Epoch, Instant
from kms_jwks.store import ReadTx, Store, WriteTx
from tests.simulation.store import MemoryStore


class FileStore(MemoryStore):
    """A real store with the hooks of the simulated one."""

    def __init__(self, url: str, wall: Callable[[], int]) -> None:
        Store.__init__(self, url, wall=wall)
        self.away: Callable[[], bool] = lambda: False
        self.before: Callable[[str], None] = lambda _: None

    def _enter(self, point: str) -> None:
        self.before(point)
        if self.away():
            raise errors.StoreUnavailable("The registry is away.", retry_after=1)

    @contextmanager
    def read(self) -> Iterator[ReadTx]:
        self._enter("read")
        with Store.read(self) as tx:
            yield tx

    @contextmanager
    def registry_view(self) -> Iterator[ReadTx]:
        with Store.read(self) as tx:
            yield tx

    @contextmanager
    def write(self) -> Iterator[WriteTx]:
        self._enter("write")
        with Store.write(self) as tx:
            yield tx
            self._enter("commit")
        self.before("committed")

    def poll(self) -> tuple[Epoch, Instant]:
        self._enter("poll")
        return Store.poll(self)

    def dispose(self) -> None:
        Store.dispose(self)
