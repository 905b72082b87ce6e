"""Where a token's PIN comes from, and the record of PINs that a token refused. A PIN is in no message, log or repr."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kms_jwks.errors import BackendRefused

if TYPE_CHECKING:
    from typing import BinaryIO


_STEPS = {
    "CKR_PIN_LOCKED": "Have the token's security officer unlock the PIN (C_InitPIN) and put it anew into {source}",
    "CKR_PIN_EXPIRED": "Set a new PIN with the vendor's tool and put it into {source}",
}


@dataclass(frozen=True, slots=True)
class PinSource:
    """A file, an environment variable, or standard input. The first two are read at each login, the last one once."""

    kind: Literal["file", "env", "stdin"]
    place: str = ""
    _held: bytes = field(default=b"", repr=False)

    @classmethod
    def from_file(cls, path: Path) -> PinSource:
        """The file's content without the line end."""
        return cls("file", str(Path(path).absolute()))

    @classmethod
    def from_env(cls, variable: str) -> PinSource:
        """The value of an environment variable."""
        return cls("env", variable)

    @classmethod
    def from_stdin(cls, stream: BinaryIO | None = None) -> PinSource:
        """The first line of standard input, read now: children of a later fork find it in memory."""
        line = (stream or sys.stdin.buffer).readline()
        return cls("stdin", "", line.rstrip(b"\r\n"))

    @property
    def description(self) -> str:
        """The source in words, for messages."""
        match self.kind:
            case "file":
                return f"the file {self.place}"
            case "env":
                return f"the environment variable {self.place}"
            case "stdin":
                return "standard input"

    def read(self) -> bytes:
        """The PIN. Raises BackendRefused where the source holds none."""
        match self.kind:
            case "file":
                try:
                    pin = Path(self.place).read_bytes().rstrip(b"\r\n")
                except OSError as error:
                    raise BackendRefused(
                        f"The PIN cannot be read from {self.description}: {error.strerror}.",
                        next_step="Put the PIN there, readable by this user alone.",
                    ) from None
            case "env":
                pin = os.environb.get(os.fsencode(self.place), b"")
            case "stdin":
                pin = self._held
        if not pin:
            raise BackendRefused(f"There is no PIN in {self.description}.", next_step="Put the token's PIN there.")
        return pin

    def fingerprint(self, key: bytes) -> str:
        """What changes when the source changes: a file's identity, or a slow keyed hash (scrypt) of the value."""
        if self.kind == "file":
            try:
                facts = Path(self.place).stat()
            except OSError:
                return "file:missing"
            identity = f"{self.place}\0{facts.st_dev}\0{facts.st_ino}\0{facts.st_mtime_ns}\0{facts.st_size}"
            return "file:" + hashlib.blake2b(identity.encode(), key=key, digest_size=32).hexdigest()
        return f"{self.kind}:" + hashlib.scrypt(self.read(), salt=key, n=2**14, r=8, p=1, dklen=32).hex()


class RefusedPins:
    """Which PIN each token refused, kept beside the start lock so that no process tries it again.

    Tokens lock after a few wrong PINs, and many workers that try the same wrong one are few tries. Used only under the
    start lock.
    """

    def __init__(self, lock_dir: Path) -> None:
        self._dir = lock_dir

    def check(self, source: PinSource, serial: str) -> None:
        """Raise BackendRefused while the source is as it was when the token with this serial refused its PIN."""
        record = self._record(serial)
        try:
            facts = json.loads(record.read_bytes())
            refused, answer = facts["fingerprint"], str(facts.get("answer", "CKR_PIN_INCORRECT"))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendRefused(
                f"The record of the refused PIN, {record}, cannot be read ({type(error).__name__}).",
                next_step=f"Make sure that the PIN in {source.description} is right, then remove {record}.",
            ) from None
        if refused == source.fingerprint(self._key()):
            raise self._refusal(source, serial, answer)

    def refuse(self, source: PinSource, serial: str, fingerprint: str, answer: str) -> BackendRefused:
        """Record what the token answered to the PIN; the error to raise.

        `fingerprint` is from before the PIN was read, `answer` the name of the return value.
        """
        record = self._record(serial)
        part = record.with_suffix(f".{os.getpid()}.part")
        facts = {"serial": serial, "source": source.description, "fingerprint": fingerprint, "answer": answer}
        part.write_text(json.dumps(facts))
        part.chmod(0o600)
        part.replace(record)
        return self._refusal(source, serial, answer)

    def forget(self, serial: str) -> None:
        """The token took the PIN."""
        self._record(serial).unlink(missing_ok=True)

    def fingerprint(self, source: PinSource) -> str:
        """The source as it is now."""
        return source.fingerprint(self._key())

    def _refusal(self, source: PinSource, serial: str, answer: str) -> BackendRefused:
        step = _STEPS.get(answer, "Put the right PIN into {source}").format(source=source.description)
        return BackendRefused(
            f"The token with serial {serial} refused the PIN from {source.description}: {answer}.",
            next_step=f"{step}; it is tried again when that changes, or when {self._record(serial)} is removed.",
        )

    def _record(self, serial: str) -> Path:
        return self._dir / f"refused-pin-{hashlib.sha256(serial.encode()).hexdigest()[:16]}.json"

    def _key(self) -> bytes:
        path = self._dir / "fingerprint.key"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            part = path.with_suffix(f".{secrets.token_hex(8)}.part")
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_bytes(32))
            # A link appears whole, and where another process was first, that one's key counts.
            with suppress(FileExistsError):
                path.hardlink_to(part)
            part.unlink()
            return path.read_bytes()
