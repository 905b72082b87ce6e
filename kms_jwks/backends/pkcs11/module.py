"""A PKCS#11 module in this process: its shared object, C functions, initialisation, slots. No token, no login.

`Cryptoki` calls by ctypes what python-pkcs11 does not offer in the form needed here: `C_Initialize` with
CKF_OS_LOCKING_OK (python-pkcs11 passes NULL, which switches SoftHSM's mutexes off), `C_Login` apart from
`C_OpenSession` (python-pkcs11 leaks the session of a login that failed, and closing the session that logged in logs
all sessions out), and `C_GetTokenInfo` and `C_GetSessionInfo`, on which the health check rests.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
from pkcs11 import PKCS11Error, Session, Token, TokenNotPresent, TokenNotRecognised, _pkcs11

from kms_jwks.backends.pkcs11.error_map import code_of, describe_error, name_of, unavailable
from kms_jwks.backends.pkcs11.locks import ModuleLock

log = structlog.get_logger(__name__)

CKR_OK: Final = 0x0
CKR_CANT_LOCK: Final = 0xA
CKR_SESSION_CLOSED: Final = 0xB0
CKR_SESSION_HANDLE_INVALID: Final = 0xB3
CKR_USER_ALREADY_LOGGED_IN: Final = 0x100
CKR_USER_PIN_NOT_INITIALIZED: Final = 0x102
CKR_USER_ANOTHER_ALREADY_LOGGED_IN: Final = 0x104
CKR_CRYPTOKI_NOT_INITIALIZED: Final = 0x190
CKR_CRYPTOKI_ALREADY_INITIALIZED: Final = 0x191
_CKF_OS_LOCKING_OK: Final = 0x2
_CKU_USER: Final = 1
_CKS_RO_USER_FUNCTIONS: Final = 1
_CKS_RW_USER_FUNCTIONS: Final = 3

_ULONG = ctypes.c_ulong
_UNAVAILABLE_INFORMATION: Final = ctypes.c_ulong(-1).value

# Positions in CK_FUNCTION_LIST (PKCS#11 v2.40, pkcs11f.h), which has kept its order since version 2.
_FUNCTIONS: Final = {"C_Initialize": 0, "C_Finalize": 1, "C_GetTokenInfo": 6, "C_GetSessionInfo": 15, "C_Login": 18}

_RESTART_INTERVAL: Final = 30.0
"""Seconds between two restarts of a module while another of its tokens is healthy and in use in this process."""
_CLOSED_ALREADY: Final = (CKR_SESSION_CLOSED, CKR_SESSION_HANDLE_INVALID, CKR_CRYPTOKI_NOT_INITIALIZED)
_CLOSE_RETRIES: Final = 4
"""Sessions that did not close, of which the closing is repeated before another session is opened."""
_CORRECT_PATH: Final = (
    "Give the backend's `module` the path of the vendor's PKCS#11 library, and install that with all it needs."
)


# --- the C functions --------------------------------------------------------------------------------------------------


class _InitializeArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("create_mutex", "destroy_mutex", "lock_mutex", "unlock_mutex")),
        ("flags", _ULONG),
        ("reserved", ctypes.c_void_p),
    )


class _FunctionList(ctypes.Structure):
    _fields_ = (("version", ctypes.c_ubyte * 2), ("functions", ctypes.c_void_p * 68))


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_char * 32) for name in ("label", "manufacturer")),
        *((name, ctypes.c_char * 16) for name in ("model", "serial")),
        *((name, _ULONG) for name in ("flags", "max_sessions", "sessions", "max_rw_sessions", "rw_sessions")),
        ("numbers", _ULONG * 6),
        ("versions", ctypes.c_ubyte * 4),
        ("utc_time", ctypes.c_char * 16),
    )


class _SessionInfo(ctypes.Structure):
    _fields_ = tuple((name, _ULONG) for name in ("slot", "state", "flags", "device_error"))


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """The members of CK_TOKEN_INFO that are used. A count is None where the module does not tell it."""

    serial: str
    sessions: int | None
    rw_sessions: int | None


class Cryptoki:
    """The C functions of a loaded module. The shared object stays loaded for the life of the process."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be loaded, AttributeError when it is no PKCS#11 module."""
        self._library = ctypes.CDLL(str(path))
        get = self._library.C_GetFunctionList
        get.restype = _ULONG
        pointer = ctypes.POINTER(_FunctionList)()
        if (code := get(ctypes.byref(pointer))) != CKR_OK:
            raise AttributeError(f"C_GetFunctionList answered {code:#x}")
        prototype = ctypes.CFUNCTYPE(_ULONG, use_errno=False)
        self._call: dict[str, Any] = {
            name: prototype(pointer.contents.functions[position]) for name, position in _FUNCTIONS.items()
        }

    def initialize(self, *, os_locking: bool) -> int:
        """C_Initialize: the return value."""
        if not os_locking:
            return int(self._call["C_Initialize"](None))
        arguments = _InitializeArgs(flags=_CKF_OS_LOCKING_OK)
        return int(self._call["C_Initialize"](ctypes.byref(arguments)))

    def finalize(self) -> int:
        """C_Finalize: the return value."""
        return int(self._call["C_Finalize"](None))

    def login(self, session: int, pin: bytes) -> int:
        """C_Login as the user: the return value. It counts for all sessions of the process with the token."""
        return int(self._call["C_Login"](_ULONG(session), _ULONG(_CKU_USER), pin, _ULONG(len(pin))))

    def logged_in(self, session: int) -> bool:
        """Whether the session exists and the user is logged in (C_GetSessionInfo)."""
        info = _SessionInfo()
        code = self._call["C_GetSessionInfo"](_ULONG(session), ctypes.byref(info))
        return code == CKR_OK and info.state in (_CKS_RO_USER_FUNCTIONS, _CKS_RW_USER_FUNCTIONS)

    def token_facts(self, slot: int) -> TokenFacts | None:
        """C_GetTokenInfo; None when it fails: the token is gone, or is being rewritten by another process."""
        info = _TokenInfo()
        if self._call["C_GetTokenInfo"](_ULONG(slot), ctypes.byref(info)) != CKR_OK:
            return None
        return TokenFacts(
            serial=info.serial.decode("utf-8", "replace").rstrip(),
            sessions=_count(info.sessions),
            rw_sessions=_count(info.rw_sessions),
        )


def _count(value: int) -> int | None:
    return None if value == _UNAVAILABLE_INFORMATION else int(value)


# --- the module -------------------------------------------------------------------------------------------------------


class HealthChecked(Protocol):
    """A connection to a token of the module."""

    def is_healthy(self) -> bool:
        """Whether its token answers. Called while the module is held exclusively."""
        ...


class _Library(_pkcs11.lib):
    """python-pkcs11's library without its C_Initialize(NULL): `Module` has initialised the module before."""

    def initialize(self) -> None:
        """Do nothing."""


class Module:
    """One shared object in this process.

    Every call into the module holds `lock`. `generation` grows with each initialisation: sessions and handles of an
    earlier generation are dead.
    """

    def __init__(self, path: Path, *, inherited: bool) -> None:
        self.lock = ModuleLock()
        self.generation = 0
        self.connections: set[HealthChecked] = set()
        """The open connections of this process to tokens of the module."""
        self.path = path
        self.restart_logged = False
        """A restart was logged since a token was last opened: while a token is away there is one for each attempt."""
        self._inherited = inherited
        """A parent process had initialised the module before it forked this one."""
        self._initialized_by_others = False
        self._initialized_before = False
        self._unclosed: deque[Session] = deque()
        """Sessions that the module did not close when it was asked to."""
        self._cryptoki: Cryptoki | None = None
        self._library: _Library | None = None
        self._restarted_at = float("-inf")

    @property
    def cryptoki(self) -> Cryptoki:
        """The C functions; only after `start`."""
        assert self._cryptoki is not None
        return self._cryptoki

    @property
    def description(self) -> str:
        """Manufacturer and description from C_GetInfo."""
        library = self._library
        return "" if library is None else f"{library.manufacturer_id} {library.library_description}".strip()

    @property
    def version(self) -> str:
        """The library's version from C_GetInfo, as major.minor."""
        return "" if self._library is None else "{}.{}".format(*self._library.library_version)

    def start(self, environment: Mapping[str, str], *, os_locking: bool, deadline: float) -> None:
        """Load and initialise the module, once. Raises BackendUnavailable, BackendTimeout."""
        if not os_locking:
            self.lock.serial = True
        if not self.generation:
            with self.lock.exclusive(deadline):
                self._load(environment)

    def restart(self, deadline: float) -> bool:
        """Finalise and initialise the module: the only cure after SoftHSM lost its token. All sessions and handles die.

        Returns False, and does nothing, where other code in this process initialised the module; where another of its
        tokens is healthy and in use here and the last restart is not long ago; and where C_Finalize fails. Raises
        BackendUnavailable, without a long wait, while a call hangs in the module.
        """
        with self.lock.exclusive(deadline):
            self.connections = {connection for connection in self.connections if connection.is_healthy()}
            is_early = time.monotonic() < self._restarted_at + _RESTART_INTERVAL
            if self._initialized_by_others or (self.connections and is_early):
                return False
            self._restarted_at = time.monotonic()
            if self.cryptoki.finalize() not in (CKR_OK, CKR_CRYPTOKI_NOT_INITIALIZED):
                return False
            self.generation += 1
            self.connections.clear()
            self._unclosed.clear()
            self._initialize()
            if not self.restart_logged:
                log.warning("module_restarted", module=self.path.name)
                self.restart_logged = True
            return True

    def tokens(self) -> list[Token]:
        """The tokens that are present; those that fail are left out where another answers. Hold the lock shared.

        Raises PKCS11Error.
        """
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

    def uri_attributes(self, token: Token) -> dict[str, str]:
        """The attributes of a token, its slot and this library that a PKCS#11 URI can name (RFC 7512 §2.3)."""
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
        """Close a session. One that the module does not close is kept for `retry_closing`. Hold the lock shared."""
        try:
            session.close()
        except PKCS11Error as error:
            if code_of(error) not in _CLOSED_ALREADY:
                self._unclosed.append(session)

    def retry_closing(self) -> None:
        """Try again to close sessions that did not close: a token has only so many. Hold the lock shared."""
        for _ in range(min(len(self._unclosed), _CLOSE_RETRIES)):
            with suppress(IndexError):
                self.close_session(self._unclosed.popleft())

    def _load(self, environment: Mapping[str, str]) -> None:
        if self.generation:
            return  # another thread was first
        os.environ.update(environment)
        try:
            self._cryptoki = Cryptoki(self.path)
        except OSError as error:
            raise unavailable(f"The module {self.path} cannot be loaded: {error}.", next_step=_CORRECT_PATH) from error
        except AttributeError as error:
            raise unavailable(
                f"{self.path} is no PKCS#11 module: it offers no C_GetFunctionList.", next_step=_CORRECT_PATH
            ) from error
        self._initialize()
        self._restarted_at = time.monotonic()

    def _initialize(self) -> None:
        code = self._call_initialize()
        if code == CKR_CANT_LOCK:
            self.lock.serial = True
            code = self.cryptoki.initialize(os_locking=False)
        if code == CKR_CRYPTOKI_ALREADY_INITIALIZED:
            if not self._initialized_before:
                # Other code in this process initialised it, and may not have asked for locking.
                self._initialized_by_others = self.lock.serial = True
        elif code != CKR_OK:
            raise unavailable(
                f"The module {self.path} answered {name_of(code)} to C_Initialize.",
                next_step="See the module's own documentation and its log; what it needs may be in its environment.",
            )
        self._initialized_before = True
        try:
            if self._library is None:
                self._library = _Library(str(self.path))
                # Never deallocated: that would unload the shared object, which sessions and a child's parent use.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._library))
        except PKCS11Error as error:
            raise unavailable(f"The module {self.path} answered {describe_error(error)} to C_GetInfo.") from error
        self.generation += 1

    def _call_initialize(self) -> int:
        """C_Initialize. A forked child finalises first what its parent initialised: not all modules notice a fork."""
        os_locking = not self.lock.serial
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
    """The process's one `Module` for a shared object. A forked child gets a new one."""
    real = path.resolve()
    key = (os.getpid(), real)
    module = _modules.get(key)
    if module is None:
        inherited = any(known.generation for (_, other), known in _modules.items() if other == real)
        module = _modules.setdefault(key, Module(real, inherited=inherited))
    return module
