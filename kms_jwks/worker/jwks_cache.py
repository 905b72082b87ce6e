"""The last public JWKS documents on disk, so that a worker that starts without a database still serves them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from kms_jwks.model import Epoch, Id, Purpose
from kms_jwks.worker.snapshot import Document, PublishedSet, Snapshot

log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct):
    body: str
    etag: str
    cache_control: str


class _Row(msgspec.Struct):
    name: str
    issuer: str
    algorithms: list[str]
    purpose: Purpose
    jwks: _Kept | None = None
    jwks_pq: _Kept | None = None


class _File(msgspec.Struct):
    incarnation: str
    counter: int
    sets: list[_Row]


class JwksCache:
    """One file, replaced as a whole; only public sets stand in it, and nothing secret."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "jwks.json"

    def store(self, snapshot: Snapshot) -> None:
        """Write the snapshot's public documents. A disk that fails is logged: the worker serves on from memory."""
        rows = [
            _Row(s.name, s.issuer, list(s.algorithms), s.purpose, _kept(s.jwks), _kept(s.jwks_pq))
            for s in snapshot.key_sets.values()
            if s.public and (s.jwks is not None or s.jwks_pq is not None)
        ]
        data = msgspec.json.encode(_File(snapshot.epoch.incarnation, snapshot.epoch.counter, rows))
        kept = self._read()
        here = snapshot.epoch
        if kept is not None and kept.incarnation == here.incarnation and kept.counter > here.counter:
            return  # another worker is ahead: what is kept must not go back
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".jwks-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            log.warning("jwks_not_kept", error=str(error))

    def load(self) -> Mapping[str, PublishedSet]:
        """The key sets as last kept: documents only, no key that signs and no caller. Empty when there is no file."""
        kept = self._read()
        if kept is None:
            return {}
        return {
            row.name: PublishedSet(
                id=Id(""),
                name=row.name,
                issuer=row.issuer,
                purpose=row.purpose,
                public=True,
                clock_skew=0,
                keys={},
                verify_keys={},
                jwks=_document(row.jwks),
                algorithms=tuple(row.algorithms),
                jwks_pq=_document(row.jwks_pq),
            )
            for row in kept.sets
        }

    def _read(self) -> _File | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.warning("jwks_not_read", error=str(error))
            return None

    def snapshot(self) -> Snapshot | None:
        """A snapshot that serves documents and signs nothing, or None when nothing was kept."""
        sets = self.load()
        return Snapshot(Epoch("", 0), sets, {}, complete=False) if sets else None


def _kept(document: Document | None) -> _Kept | None:
    return None if document is None else _Kept(document.body.decode(), document.etag, document.cache_control)


def _document(kept: _Kept | None) -> Document | None:
    return None if kept is None else Document(kept.body.encode(), kept.etag, kept.cache_control, public=True)
