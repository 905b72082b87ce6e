"""A loaded PKCS#11 module, once per process and shared object: loading, (re)initialising, slots. No token, no PIN."""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from pkcs11 import PKCS11Error, Session, Token, TokenNotPresent, TokenNotRecognised, _pkcs11

from kms_jwks.backends.pkcs11.cryptoki import (
    CKR_CANT_LOCK,
    CKR_CRYPTOKI_ALREADY_INITIALIZED,
    CKR_CRYPTOKI_NOT_INITIALIZED,
    CKR_OK,
    CKR_SESSION_CLOSED,
    CKR_SESSION_HANDLE_INVALID,
    Cryptoki,
)
from kms_jwks.backends.pkcs11.error_map import code_of, named, said, unavailable
from kms_jwks.backends.pkcs11.locks import Gate

_RESTART_UNDER_OTHERS: Final = 30.0
"""Seconds between two restarts of a module of which another token, in use in this process, is well."""
_CORRECT: Final = (
    "Give the backend's `module` the path of the vendor's PKCS#11 library, and install that with all it needs."
)
_IS_CLOSED: Final = (CKR_SESSION_CLOSED, CKR_SESSION_HANDLE_INVALID, CKR_CRYPTOKI_NOT_INITIALIZED)
_LEFTOVERS_AT_ONCE: Final = 4


class Tenant(Protocol):
    """Somebody with sessions in the module."""

    def is_healthy(self) -> bool:
        """Whether its token answers; asked while nobody else is inside."""
        ...


class _Library(_pkcs11.lib):
    """python-pkcs11's library without its C_Initialize(NULL): `Module` has initialised the module before."""

    def initialize(self) -> None:
        """Do nothing."""


class Module:
    """One shared object in this process. `generation` grows with each initialisation: what older ones gave is dead.

    Every call into the module passes `gate`.
    """

    def __init__(self, path: Path, *, inherited: bool) -> None:
        self.gate = Gate()
        self.generation = 0
        self.tenants: set[Tenant] = set()
        self.path = path
        self._inherited = inherited
        """A parent process had the module initialised before it forked us."""
        self._foreign = False
        self._initialized_before = False
        self._leftovers: deque[Session] = deque()
        self._cryptoki: Cryptoki | None = None
        self._library: _Library | None = None
        self._restarted = float("-inf")

    @property
    def cryptoki(self) -> Cryptoki:
        """The C functions; only after `start`."""
        assert self._cryptoki is not None
        return self._cryptoki

    @property
    def description(self) -> str:
        """The module's own words about itself."""
        library = self._library
        return "" if library is None else f"{library.manufacturer_id} {library.library_description}".strip()

    @property
    def version(self) -> str:
        """Of the library, as it says itself."""
        return "" if self._library is None else "{}.{}".format(*self._library.library_version)

    def start(self, environment: Mapping[str, str], *, os_locking: bool, deadline: float) -> None:
        """Load and initialise, once. Raises BackendUnavailable, BackendTimeout."""
        if not os_locking:
            self.gate.serial = True
        if not self.generation:
            with self.gate.alone(deadline):
                self._load(environment)

    def restart(self, deadline: float) -> bool:
        """Finalise and initialise: the only cure after SoftHSM lost its token. All sessions and handles die.

        Not done, and False, where it would be wrong: other code in this process initialised the module, or another
        token of it is in use here and well and the last restart is not long ago; and where the module does not let
        itself be finalised. Raises BackendUnavailable, and that at once where a call is stuck inside.
        """
        with self.gate.alone(deadline):
            self.tenants = {tenant for tenant in self.tenants if tenant.is_healthy()}
            soon = time.monotonic() < self._restarted + _RESTART_UNDER_OTHERS
            if self._foreign or (self.tenants and soon):
                return False
            self._restarted = time.monotonic()
            if self.cryptoki.finalize() not in (CKR_OK, CKR_CRYPTOKI_NOT_INITIALIZED):
                return False
            self.generation += 1
            self.tenants.clear()
            self._leftovers.clear()
            self._initialize()
            return True

    def tokens(self) -> list[Token]:
        """The tokens that are there now, other people's that fail left out; to be called inside. Raises PKCS11Error."""
        assert self._library is not None
        found = []
        failure: PKCS11Error | None = None
        for slot in self._library.get_slots(token_present=True):
            try:
                found.append(slot.get_token())
            except PKCS11Error as error:
                if type(error) not in (TokenNotPresent, TokenNotRecognised):
                    failure = error
        if failure is not None and not found:
            raise failure
        return found

    def shows(self, token: Token) -> dict[str, str]:
        """What a PKCS#11 URI can say of a token, its slot and this library, by RFC 7512's names."""
        slot = token.slot
        return {
            "token": token.label,
            "manufacturer": token.manufacturer_id,
            "serial": serial_of(token),
            "model": token.model,
            "slot-id": str(slot.slot_id),
            "slot-description": slot.slot_description,
            "slot-manufacturer": slot.manufacturer_id,
            "library-manufacturer": self._library.manufacturer_id if self._library else "",
            "library-description": self._library.library_description if self._library else "",
            "library-version": self.version,
        }

    def close_session(self, session: Session) -> None:
        """Close one, inside; what the module does not want to close now is tried again before another is opened."""
        try:
            session.close()
        except PKCS11Error as error:
            if code_of(error) not in _IS_CLOSED:
                self._leftovers.append(session)

    def close_leftovers(self) -> None:
        """Try again to close what did not close, inside: a token has only so many sessions."""
        for _ in range(min(len(self._leftovers), _LEFTOVERS_AT_ONCE)):
            with suppress(IndexError):
                self.close_session(self._leftovers.popleft())

    def _load(self, environment: Mapping[str, str]) -> None:
        if self.generation:
            return  # another thread was first
        os.environ.update(environment)
        try:
            self._cryptoki = Cryptoki(self.path)
        except OSError as error:
            raise unavailable(f"The module {self.path} cannot be loaded: {error}.", next_step=_CORRECT) from error
        except AttributeError as error:
            raise unavailable(
                f"{self.path} is no PKCS#11 module: it offers no C_GetFunctionList.", next_step=_CORRECT
            ) from error
        self._initialize()
        self._restarted = time.monotonic()

    def _initialize(self) -> None:
        code = self._initialized()
        if code == CKR_CANT_LOCK:
            self.gate.serial = True
            code = self.cryptoki.initialize(os_locking=False)
        if code == CKR_CRYPTOKI_ALREADY_INITIALIZED:
            if not self._initialized_before:
                # Somebody else in this process did it, and may not have asked for locking.
                self._foreign = self.gate.serial = True
        elif code != CKR_OK:
            raise unavailable(
                f"The module {self.path} answered {named(code)} to C_Initialize.",
                next_step="See the module's own documentation and its log; what it needs may be in its environment.",
            )
        self._initialized_before = True
        try:
            if self._library is None:
                self._library = _Library(str(self.path))
                # Never deallocated: that would unload the shared object, which sessions and a child's parent use.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._library))
        except PKCS11Error as error:
            raise unavailable(f"The module {self.path} answered {said(error)} to C_GetInfo.") from error
        self.generation += 1

    def _initialized(self) -> int:
        """C_Initialize. What a child has from its parent is thrown away first: not all modules notice a fork."""
        os_locking = not self.gate.serial
        code = self.cryptoki.initialize(os_locking=os_locking)
        for _ in range(2):
            if code == CKR_OK or not self._inherited:
                break
            self.cryptoki.finalize()
            code = self.cryptoki.initialize(os_locking=os_locking)
        self._inherited = False
        return code


def serial_of(token: Token) -> str:
    """The token's serial without the padding."""
    return token.serial.decode("utf-8", "replace").rstrip(" \0")


_modules: dict[tuple[int, Path], Module] = {}


def module_at(path: Path) -> Module:
    """The process's one `Module` for a shared object. After a fork the child gets a new one."""
    real = path.resolve()
    key = (os.getpid(), real)
    module = _modules.get(key)
    if module is None:
        inherited = any(known.generation for (_, other), known in _modules.items() if other == real)
        module = _modules.setdefault(key, Module(real, inherited=inherited))
    return module
