"""The C functions that python-pkcs11 does not offer in the form needed here, by ctypes. No policy.

`C_Initialize` with CKF_OS_LOCKING_OK (python-pkcs11 passes NULL, which switches SoftHSM's mutexes off), `C_Login` apart
from `C_OpenSession` (python-pkcs11 leaks the session of a login that failed, and logs everybody out when it closes the
one that logged in), and `C_GetTokenInfo` and `C_GetSessionInfo`, by which health is judged.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
_FUNCTIONS: Final = {
    "C_Initialize": 0,
    "C_Finalize": 1,
    "C_GetTokenInfo": 6,
    "C_GetSessionInfo": 15,
    "C_Login": 18,
}


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
        ("label", ctypes.c_char * 32),
        ("manufacturer", ctypes.c_char * 32),
        ("model", ctypes.c_char * 16),
        ("serial", ctypes.c_char * 16),
        ("flags", _ULONG),
        ("max_sessions", _ULONG),
        ("sessions", _ULONG),
        ("max_rw_sessions", _ULONG),
        ("rw_sessions", _ULONG),
        ("numbers", _ULONG * 6),
        ("versions", ctypes.c_ubyte * 4),
        ("utc_time", ctypes.c_char * 16),
    )


class _SessionInfo(ctypes.Structure):
    _fields_ = tuple((name, _ULONG) for name in ("slot", "state", "flags", "device_error"))


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """CK_TOKEN_INFO as far as it is used. A count is None where the module does not tell."""

    serial: str
    sessions: int | None
    rw_sessions: int | None


class Cryptoki:
    """A loaded module. The shared object stays loaded for the life of the process."""

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
        """Whether the session exists and the user is logged in."""
        info = _SessionInfo()
        code = self._call["C_GetSessionInfo"](_ULONG(session), ctypes.byref(info))
        return code == CKR_OK and info.state in (_CKS_RO_USER_FUNCTIONS, _CKS_RW_USER_FUNCTIONS)

    def token_facts(self, slot: int) -> TokenFacts | None:
        """C_GetTokenInfo; None when the module cannot tell: the token is gone, or was being rewritten."""
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
