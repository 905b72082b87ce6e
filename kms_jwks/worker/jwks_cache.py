"""The last public JWKS documents on disk: a worker that starts without a database serves them."""

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


class _StoredDocument(msgspec.Struct):
    body: str
    etag: str
    cache_control: str


class _Row(msgspec.Struct):
    name: str
    issuer: str
    algorithms: list[str]
    purpose: Purpose
    jwks: _StoredDocument | None = None
    jwks_pq: _StoredDocument | None = None


class _File(msgspec.Struct):
    incarnation: str
    counter: int
    sets: list[_Row]


class JwksCache:
    """One file, replaced atomically. It holds public key sets only, and nothing secret."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "jwks.json"

    def store(self, snapshot: Snapshot) -> None:
        """Write the snapshot's public documents. A disk error is only logged: the worker serves from memory."""
        rows = [
            _Row(s.name, s.issuer, list(s.algorithms), s.purpose, _stored(s.jwks), _stored(s.jwks_pq))
            for s in snapshot.key_sets.values()
            if s.public and (s.jwks is not None or s.jwks_pq is not None)
        ]
        data = msgspec.json.encode(_File(snapshot.epoch.incarnation, snapshot.epoch.counter, rows))
        stored, epoch = self._read(), snapshot.epoch
        if stored is not None and stored.incarnation == epoch.incarnation and stored.counter > epoch.counter:
            return  # another worker has stored a newer epoch
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
            log.warning("jwks_cache_not_written", file=str(self._path), error=str(error))

    def load(self) -> Mapping[str, PublishedSet]:
        """The stored key sets: documents only, no signing keys and no callers. Empty when there is no file."""
        stored = self._read()
        if stored is None:
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
            for row in stored.sets
        }

    def _read(self) -> _File | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.warning("jwks_cache_not_read", file=str(self._path), error=str(error))
            return None

    def snapshot(self) -> Snapshot | None:
        """A snapshot that serves the stored documents and cannot sign, or None when nothing is stored."""
        sets = self.load()
        return Snapshot(Epoch("", 0), sets, {}, complete=False) if sets else None


def _stored(document: Document | None) -> _StoredDocument | None:
    if document is None:
        return None
    return _StoredDocument(document.body.decode(), document.etag, document.cache_control)


def _document(stored: _StoredDocument | None) -> Document | None:
    return None if stored is None else Document(stored.body.encode(), stored.etag, stored.cache_control, public=True)
