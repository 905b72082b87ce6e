"""Opening a token: choosing it, the start lock between processes, the PIN, the login, the retries.

A PIN is in no message, log or repr.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pkcs11 import PKCS11Error, Token, TokenFlag

from kms_jwks.backends.pkcs11 import uri
from kms_jwks.backends.pkcs11.connection import Connection
from kms_jwks.backends.pkcs11.error_map import (
    CODES,
    Meaning,
    describe_error,
    meaning_of,
    name_of,
    translate,
    unavailable,
)
from kms_jwks.backends.pkcs11.locks import file_lock, lock_path
from kms_jwks.backends.pkcs11.module import (
    CKR_OK,
    CKR_USER_ALREADY_LOGGED_IN,
    CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
    CKR_USER_PIN_NOT_INITIALIZED,
    serial_of,
)
from kms_jwks.errors import BackendError, BackendRefused

if TYPE_CHECKING:
    from typing import BinaryIO

    from kms_jwks.backends.pkcs11.module import Module
    from kms_jwks.config import Pkcs11Options

_RETRY_PAUSES: Final = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Seconds before each further attempt: together longer than a login takes to rewrite a token."""
_SHORT_RETRY_PAUSES: Final = (0.02,)
"""The same while the token is known to be away: one attempt as it stands, one after the module was restarted."""
_MOST_LOGINS: Final = 3
"""Calls of C_Login in one opening, whatever they answer: no answer may use up the tries that a token allows."""
_LOGIN_STEPS: Final = {
    CKR_USER_PIN_NOT_INITIALIZED: "If it goes on saying so: set the user PIN with the vendor's tool (C_InitPIN).",
    CKR_USER_ANOTHER_ALREADY_LOGGED_IN: "End the security officer's session in this process.",
}
_PIN_STEPS: Final = {
    "CKR_PIN_LOCKED": "Have the token's security officer unlock the PIN (C_InitPIN) and put it anew into {source}",
    "CKR_PIN_EXPIRED": "Set a new PIN with the vendor's tool and put it into {source}",
}


class _Transient(Exception):
    """A failure that processes cause in each other when they start at the same time. May name the next step."""

    def __init__(self, detail: str, next_step: str | None = None) -> None:
        super().__init__(detail)
        self.next_step = next_step


class TokenOpener:
    """Opens the token that the options of one backend choose, with the PIN and under the locks of this node."""

    def __init__(self, options: Pkcs11Options, *, lock_dir: Path, pin: PinSource | None = None) -> None:
        """`lock_dir` is made with mode 0700 where missing: lock files, and the record of refused PINs.

        `pin` replaces the options' source of the PIN. Raises ValueError where the options' URI is no PKCS#11 URI or
        contradicts the other options.
        """
        self.options = options
        self.pin = pin or PinSource.of(options)
        self.lock_dir = lock_dir
        self.uri = None if options.uri is None else uri.parse_for_token(options.uri, options)
        parts = (
            f"label {options.token_label!r}" if options.token_label is not None else "",
            f"serial {options.token_serial!r}" if options.token_serial is not None else "",
            f"slot {options.slot}" if options.slot is not None else "",
            f"URI {str(self.uri)!r}" if self.uri is not None else "",
        )
        self.selection = " and ".join(part for part in parts if part)
        """How the token is chosen, in words for messages."""
        self._refused_pins = RefusedPins(lock_dir)

    def open(
        self,
        module: Module,
        bound_to: str | None,
        deadline: float,
        *,
        failed_before: bool = False,
        restart: bool = False,
    ) -> Connection:
        """A logged-in connection to the token, and to no other than the one with serial `bound_to`.

        `failed_before`: the last opening failed, so this is a short attempt. `restart`: the module answered that it has
        to be initialised anew. One process at a time does this.

        Raises BackendUnavailable where waiting may help, BackendRefused where it does not, BackendTimeout where another
        process holds the start lock until the deadline.
        """
        with file_lock(lock_path(self.lock_dir, "start", str(module.path)), deadline):
            module.start(self.options.environment, os_locking=self.options.locking == "os", deadline=deadline)
            if restart:
                module.restart(deadline)
            pauses = iter(_SHORT_RETRY_PAUSES if failed_before else _RETRY_PAUSES)
            failed_logins: list[int] = []
            while True:
                try:
                    with module.lock.shared(deadline):
                        return self._attempt(module, bound_to, failed_logins)
                except _Transient as failure:
                    pause = next(pauses, None) if len(failed_logins) < _MOST_LOGINS else None
                    if pause is None or time.monotonic() + pause > deadline:
                        raise unavailable(str(failure), next_step=failure.next_step) from failure.__cause__
                    time.sleep(pause)
                    module.restart(deadline)

    def _attempt(self, module: Module, bound_to: str | None, failed_logins: list[int]) -> Connection:
        doing = "choosing the token"
        connection: Connection | None = None
        try:
            token = self._choose(module)
            serial = serial_of(token)
            self._check_binding(serial, bound_to)
            doing = "opening a session"
            connection = Connection(module, token, serial, sessions=self.options.sessions)
            self._log_in(connection, failed_logins)
            if not connection.is_healthy():
                raise _Transient(f"The token with {self.selection} does not answer as one we are logged in to.")
            module.connections.add(connection)
            return connection
        except (BackendError, _Transient):
            if connection is not None:
                connection.close()
            raise
        except PKCS11Error as error:
            if connection is not None:
                connection.close()
            if meaning_of(error).is_final:
                raise translate(error, doing) from error
            raise _Transient(f"The module answered {describe_error(error)} to {doing}.") from error

    def _choose(self, module: Module) -> Token:
        """The one token that fits all options that choose it."""
        tokens, options = module.tokens(), self.options
        fitting = [
            token
            for token in tokens
            if options.token_label in (None, token.label)
            and options.token_serial in (None, serial_of(token))
            and options.slot in (None, token.slot.slot_id)
            and (self.uri is None or not self.uri.contradictions(module.uri_attributes(token)))
        ]
        if not fitting:
            raise _Transient(f"The module shows no token with {self.selection}.", _other_tokens(tokens))
        if len(fitting) > 1:
            serials = [serial_of(token) for token in fitting]
            by_slot = len(set(serials)) < len(serials) or not all(serials)
            raise BackendRefused(
                f"The module shows {len(fitting)} tokens with {self.selection}: serials {', '.join(serials)}.",
                next_step=f"Choose one of them by slot: {', '.join(str(t.slot.slot_id) for t in fitting)}."
                if by_slot
                else f"Choose one of them by token_serial: {', '.join(serials)}.",
            )
        return fitting[0]

    def _check_binding(self, serial: str, bound_to: str | None) -> None:
        if not serial:
            raise _Transient(
                f"The token with {self.selection} shows no serial.",
                "Initialise it with the vendor's tool (SoftHSM: softhsm2-util --init-token).",
            )
        expected = self.options.expected_serial or bound_to
        if expected is not None and serial != expected:
            raise BackendRefused(
                f"The token with {self.selection} has serial {serial}; the keys are on the one with serial {expected}.",
                next_step="Put the right token back, or configure a backend of another name for the new one.",
            )

    def _log_in(self, connection: Connection, failed_logins: list[int]) -> None:
        """C_Login, stricter than other calls: an answer that may be a judgement of the PIN is never caused twice.

        Such answers are those that say so, and all that the specification does not have: deny by default.
        `failed_logins` gets the return value of a login that failed.
        """
        serial = connection.serial
        try:
            self._refused_pins.check(self.pin, serial)
            # Taken before the PIN is read: where the source changes in between, the new PIN is tried again.
            fingerprint = self._refused_pins.fingerprint(self.pin)
            code = connection.login(self.pin.read())
            # Two backends may share a token; PKCS#11 has one login per process.
            if code in (CKR_OK, CKR_USER_ALREADY_LOGGED_IN):
                self._refused_pins.forget(self.pin, serial)
                return
            failed_logins.append(code)
            if code not in CODES or meaning_of(code) is Meaning.PIN:
                raise self._refused_pins.record(self.pin, serial, fingerprint, name_of(code))
        except OSError as error:
            raise BackendRefused(
                f"The record of refused PINs in {self.lock_dir} cannot be kept: {error.strerror}.",
                next_step="Make it a folder that this user may write to; without the record no PIN is tried.",
            ) from error
        detail = f"The token with serial {serial} answered {name_of(code)} to the login."
        if meaning_of(code).is_final:
            raise BackendRefused(detail)
        raise _Transient(detail, _LOGIN_STEPS.get(code))


def _other_tokens(tokens: list[Token]) -> str:
    """The next step where none of these tokens fits."""
    known = [
        f"{token.label!r} (serial {serial_of(token)}, slot {token.slot.slot_id})"
        for token in tokens
        if token.flags & TokenFlag.TOKEN_INITIALIZED
    ]
    shown = f"It shows tokens labelled {', '.join(known)}" if known else "It shows no initialised token"
    return f"{shown}: connect the right one, correct the backend's token, or initialise it with the vendor's tool."


# --- the PIN ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PinSource:
    """A file, an environment variable, or standard input. The first two are read at each login, the last one once."""

    kind: Literal["file", "env", "stdin"]
    place: str = ""
    _value: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, options: Pkcs11Options) -> PinSource:
        """The source that the options name."""
        if options.pin_file is not None:
            return cls.from_file(options.pin_file)
        return _standard_input() if options.pin_env is None else cls.from_env(options.pin_env)

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
                pin = self._value
        if not pin:
            raise BackendRefused(f"There is no PIN in {self.description}.", next_step="Put the token's PIN there.")
        return pin

    def fingerprint(self, key: bytes) -> str:
        """A value that changes with the source: from a file's identity, else a slow keyed hash (scrypt) of the PIN."""
        if self.kind == "file":
            try:
                facts = Path(self.place).stat()
            except OSError:
                return "file:missing"
            identity = f"{self.place}\0{facts.st_dev}\0{facts.st_ino}\0{facts.st_mtime_ns}\0{facts.st_size}"
            return "file:" + hashlib.blake2b(identity.encode(), key=key, digest_size=32).hexdigest()
        return f"{self.kind}:" + hashlib.scrypt(self.read(), salt=key, n=2**14, r=8, p=1, dklen=32).hex()


@cache
def _standard_input() -> PinSource:
    """Read once in a process; children of a later fork find it here."""
    return PinSource.from_stdin()


class RefusedPins:
    """The PINs that tokens refused, recorded beside the lock files so that no process tries them again.

    Tokens lock after a few wrong PINs, and each of many workers would make one try. Used only under the start lock.
    """

    def __init__(self, lock_dir: Path) -> None:
        self._dir = lock_dir

    def check(self, source: PinSource, serial: str) -> None:
        """Raise BackendRefused while the source is unchanged since the token with this serial refused its PIN."""
        record = self._path(source, serial)
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
        if refused == self.fingerprint(source):
            raise self._refusal(source, serial, answer)

    def record(self, source: PinSource, serial: str, fingerprint: str, answer: str) -> BackendRefused:
        """Record that the token refused the PIN. Returns the error to raise.

        `fingerprint` was taken before the PIN was read; `answer` is the name of the return value.
        """
        record = self._path(source, serial)
        part = record.with_suffix(f".{os.getpid()}.part")
        facts = {"serial": serial, "source": source.description, "fingerprint": fingerprint, "answer": answer}
        part.write_text(json.dumps(facts))
        part.chmod(0o600)
        part.replace(record)
        return self._refusal(source, serial, answer)

    def forget(self, source: PinSource, serial: str) -> None:
        """Remove the record: the token accepted the PIN."""
        self._path(source, serial).unlink(missing_ok=True)

    def fingerprint(self, source: PinSource) -> str:
        """The fingerprint of the source as it is now."""
        return source.fingerprint(self._key())

    def _refusal(self, source: PinSource, serial: str, answer: str) -> BackendRefused:
        step = _PIN_STEPS.get(answer, "Put the right PIN into {source}").format(source=source.description)
        return BackendRefused(
            f"The token with serial {serial} refused the PIN from {source.description}: {answer}.",
            next_step=f"{step}; it is tried again when that changes, or when {self._path(source, serial)} is removed.",
        )

    def _path(self, source: PinSource, serial: str) -> Path:
        """One record for each token and source: a right PIN in one source says nothing about another source."""
        name = hashlib.sha256(f"{serial}\0{source.kind}\0{source.place}".encode()).hexdigest()[:16]
        return self._dir / f"refused-pin-{name}.json"

    def _key(self) -> bytes:
        path = self._dir / "fingerprint.key"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            part = path.with_suffix(f".{secrets.token_hex(8)}.part")
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_bytes(32))
            # A link appears whole; where another process was first, its key counts.
            with suppress(FileExistsError):
                path.hardlink_to(part)
            part.unlink()
            return path.read_bytes()
