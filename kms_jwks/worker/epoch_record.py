"""The highest epoch that a node has confirmed, in a file outside the database, which may be put back to an older state.

All processes of the node share the file. An epoch is recorded before it is confirmed. A registry that does not continue
the recorded epoch's history is refused (`ReadTx.require_known_history`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog

from kms_jwks import errors
from kms_jwks.model import Epoch

log = structlog.get_logger(__name__)

_NEXT_STEP = "Make state_dir writable for the service's user, and free space on its disk; the node goes on by itself."


class _File(msgspec.Struct, forbid_unknown_fields=True):
    incarnation: str
    counter: int
    link: str


class EpochRecord:
    """The node's record in `state_dir`; one object for each process, used by all its threads.

    Read it before the registry: a registry that is read afterwards is at that epoch or a later one, or it went back.
    """

    def __init__(self, state_dir: Path) -> None:
        self.file = state_dir / "epoch.json"
        self._last: Epoch | None = None
        """What this process last read from the file or wrote to it: it counts where the file is gone."""
        self._ahead: tuple[Epoch | None, Epoch] | None = None
        """What the file holds, and the later epoch that could not be written to it; only `advance` changes this."""
        self._gone = False
        """Whether the file was not there when it was last read, although this process remembers what was in it."""

    @property
    def unwritten(self) -> bool:
        """Whether this process remembers an epoch that is not in the file: it could not be written, or was removed."""
        return self._ahead is not None or self._gone

    def load(self) -> Epoch | None:
        """The recorded epoch; None on a node that has confirmed none.

        Raises StoreUnavailable where the file cannot be read: a node that may know more must not believe the registry.
        """
        try:
            self._last = _decode(self.file.read_bytes())
            self._gone = False
        except FileNotFoundError:
            self._gone = self._last is not None
        except OSError as error:
            raise _failure(f"cannot be read: {error.strerror}", _NEXT_STEP) from error
        found, ahead = self._last, self._ahead
        return ahead[1] if ahead is not None and _same(ahead[0], found) else found

    def advance(self, known: Epoch | None, epoch: Epoch) -> bool:
        """Record `epoch` durably; it was read from a registry that continues the history of `known`.

        False if another process has recorded another epoch than `known` in the meantime: then nothing is changed, and
        the caller reads the registry again. Raises StoreUnavailable where the file cannot be written.
        """
        ahead = self._ahead
        if epoch.is_same(known) and ahead is None and self.file.exists():
            return True
        try:
            with self._locked():
                current = self.load()
                if not _same(current, known) and not _same(current, epoch):
                    return False
                if ahead is not None or not _same(current, epoch) or not self.file.exists():
                    self._write(epoch)
        except OSError as error:
            # This process remembers the epoch all the same.
            self._ahead = (ahead[0] if ahead is not None and _same(ahead[1], known) else known, epoch)
            if ahead is None:
                log.error("epoch_not_recorded", file=str(self.file), detail=error.strerror)
            raise _failure(f"cannot be written: {error.strerror}", _NEXT_STEP) from error
        self._ahead = None
        if ahead is not None:
            log.info("epoch_recorded_again", file=str(self.file))
        return True

    def replace(self, epoch: Epoch) -> None:
        """Record `epoch` whatever the file holds: an operator accepts the registry as it is.

        Raises StoreUnavailable.
        """
        try:
            with self._locked():
                self._write(epoch)
        except OSError as error:
            raise _failure(f"cannot be written: {error.strerror}", _NEXT_STEP) from error
        self._ahead = None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _give_away(fd, self.file.parent)
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _write(self, epoch: Epoch) -> None:
        """Replace the file atomically; file and folder are on the disk afterwards."""
        folder = self.file.parent
        handle, name = tempfile.mkstemp(dir=folder, prefix=".epoch-")
        try:
            with os.fdopen(handle, "wb") as file:
                _give_away(handle, folder)
                file.write(msgspec.json.encode(_File(epoch.incarnation, epoch.counter, epoch.link)))
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.file)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        self._last = epoch
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _give_away(fd: int, folder: Path) -> None:
    """Let the folder's owner own a file that root makes: the service runs as that user, and has to read it."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)


def _decode(data: bytes) -> Epoch:
    try:
        found = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        step = "Bring the file back. If it is lost, run `kms-jwks db restored --accept` on this node."
        raise _failure("is damaged", step) from error
    return Epoch(found.incarnation, found.counter, found.link)


def _same(one: Epoch | None, other: Epoch | None) -> bool:
    return one is other is None or (one is not None and one.is_same(other))


def _failure(what: str, next_step: str) -> errors.StoreUnavailable:
    return errors.StoreUnavailable(
        f"This node's record of the confirmed epoch, epoch.json in state_dir, {what}.",
        retry_after=1,
        next_step=next_step,
    )
