"""The fault-injecting PKCS#11 module: compiled here, and controlled by a test in every process that has loaded it.

    faults = Faults.make(folder, hsm.module)
    backend = dataclasses.replace(hsm, module=faults.module).backend()
    faults.answer("C_Sign", CKR_DEVICE_ERROR, first=3)     # the third C_Sign from now on, and every later one
    faults.clear()

A copy of the module has a control file beside it; a service needs only the path of the copy. A fault takes effect at
once in every process that has loaded the copy, and counts are totals of these processes.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import psutil

from tests.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Iterable

SOURCES: Final = Path(__file__).parent
FUNCTIONS: Final = tuple(
    re.findall(r"^(?:PLAIN|SESSION|OWN)\((C_\w+)", (SOURCES / "functions.h").read_text(), re.MULTILINE)
)

_EVERY: Final = 2**64 - 1
_ANSWER, _HANG, _TRUNCATE, _FLIP, _CRASH = range(1, 6)

_U64 = ctypes.c_uint64


class _Fault(ctypes.Structure):
    _fields_ = (
        *((name, _U64) for name in ("armed", "action", "value", "first", "last", "every")),
        *((name, _U64) for name in ("late", "pid", "mechanism", "key_size")),
        ("key", ctypes.c_ubyte * 64),
    )


class _Slot(ctypes.Structure):
    _fields_ = (
        *((name, _U64) for name in ("calls", "succeeded", "seen", "acted", "hanging")),
        ("fault", _Fault),
    )


class _Process(ctypes.Structure):
    _fields_ = (("pid", _U64), ("open", _U64))


class _Control(ctypes.Structure):
    _fields_ = (
        *((name, _U64) for name in ("ready", "opened", "closed", "losses")),
        *((name, _U64) for name in ("finalised_under_calls", "calls_without_locking", "sessions_shared")),
        ("real", ctypes.c_char * 1024),
        ("processes", _Process * 64),
        ("slots", _Slot * len(FUNCTIONS)),
    )


@functools.cache
def compiled() -> Path:
    """The module, compiled once per pytest process. Needs cc and libc's headers; `./dev test` sees to that."""
    folder = Path(tempfile.mkdtemp(prefix="kms-jwks-faults-"))
    atexit.register(shutil.rmtree, folder)
    out = folder / "faults.so"
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    done = subprocess.run(
        [*command, "-pthread", "-o", out, SOURCES / "module.c", "-ldl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@dataclass(frozen=True)
class Violations:
    """How often callers broke each rule of PKCS#11."""

    finalised_under_calls: int
    calls_without_locking: int
    sessions_shared: int

    NONE: ClassVar[Violations]


Violations.NONE = Violations(0, 0, 0)


@dataclass(frozen=True)
class Faults:
    """A copy of the module in a folder. Can be pickled: children use the same one.

    Each function has at most one fault; a new one takes the old one's place. `first`, `last` and `every` choose among
    the calls since then, counted from 1 over all processes; `pid` is of the one process that is meant. `late` means
    after the real module has done its work. `mechanism` (CKM_…) and `key` (CKA_ID) are those of the signature that is
    being made, and are for C_SignInit, C_Sign and C_SignFinal. python-pkcs11 calls C_Sign twice a signature, first
    for its length; `truncate` and `flip` count the second one alone.
    """

    module: Path

    @classmethod
    def make(cls, folder: Path, real: Path) -> Faults:
        """A copy in `folder` that forwards to the module `real`."""
        folder.mkdir(parents=True, exist_ok=True)
        module = folder.resolve() / "faults.so"
        control = _Control(ready=ctypes.sizeof(_Control), real=str(real).encode())
        module.with_name(f"{module.name}.control").write_bytes(bytes(control))
        shutil.copyfile(compiled(), module)
        return cls(module)

    @classmethod
    def over(cls, hsm: SoftHsm) -> tuple[Faults, SoftHsm]:
        """A copy in the folder of a token, and the token as the copy shows it."""
        faults = cls.make(hsm.directory / "faults", hsm.module)
        return faults, SoftHsm(hsm.directory, faults.module, hsm.label)

    # --- setting faults -------------------------------------------------------------------------------------------

    def answer(self, functions: str | Iterable[str], code: int, **which: Any) -> None:
        """Answer a CKR_… without calling the real module, also for CKR_OK (0)."""
        self._set(functions, _ANSWER, code, **which)

    def hang(self, functions: str | Iterable[str], seconds: float | None = None, **which: Any) -> None:
        """Return after so many seconds, or when the fault is cleared; then the real module is called."""
        self._set(functions, _HANG, 0 if seconds is None else max(1, round(seconds * 1000)), **which)

    def truncate(self, size: int = 1, **which: Any) -> None:
        """Signatures lack their last `size` bytes."""
        self._set(("C_Sign", "C_SignFinal"), _TRUNCATE, size, **which)

    def flip(self, bit: int = 0, **which: Any) -> None:
        """Signatures have one bit changed: number `bit`, counted from the first byte's lowest."""
        self._set(("C_Sign", "C_SignFinal"), _FLIP, bit, **which)

    def crash(self, functions: str | Iterable[str], **which: Any) -> None:
        """The process ends with SIGSEGV."""
        self._set(functions, _CRASH, 0, **which)

    def lose_sessions(self) -> None:
        """Every session that is open now answers CKR_SESSION_HANDLE_INVALID from its next call on."""
        _mapped(self.module).losses += 1

    def clear(self, functions: str | Iterable[str] = FUNCTIONS) -> None:
        """Clear faults. Calls that hang continue."""
        for name in _names(functions):
            self._slot(name).fault.armed = 0

    def _set(
        self,
        functions: str | Iterable[str],
        action: int,
        value: int,
        *,
        first: int = 1,
        last: int | None = None,
        every: int = 1,
        late: bool = False,
        pid: int = 0,
        mechanism: int | None = None,
        key: bytes = b"",
    ) -> None:
        for name in _names(functions):
            slot = self._slot(name)
            # Disarmed first and armed last, because other processes read the fault while it is written.
            slot.fault.armed = 0
            slot.seen = slot.acted = 0
            armed = time.monotonic_ns()
            slot.fault.action, slot.fault.value = action, value
            slot.fault.first, slot.fault.last, slot.fault.every = first, _EVERY if last is None else last, every
            slot.fault.late, slot.fault.pid = late, pid
            slot.fault.mechanism = _EVERY if mechanism is None else mechanism
            slot.fault.key_size = len(key)
            slot.fault.key[: len(key)] = key
            slot.fault.armed = armed

    # --- reading counts -------------------------------------------------------------------------------------------

    def calls(self, function: str) -> int:
        """How often it was called, faults included, by all processes."""
        return int(self._slot(function).calls)

    def succeeded(self, function: str) -> int:
        """How often it answered CKR_OK."""
        return int(self._slot(function).succeeded)

    def acted(self, function: str) -> int:
        """How often the fault that was set last for this function has acted."""
        return int(self._slot(function).acted)

    def hanging(self, function: str) -> int:
        """How many calls hang in it now."""
        return int(self._slot(function).hanging)

    def open_sessions(self, pid: int | None = None) -> int:
        """Sessions that are open in one process, or in all living processes. Lost sessions are not open."""
        processes = list(_mapped(self.module).processes)
        if pid is None:
            return sum(int(one.open) for one in processes if one.pid and psutil.pid_exists(one.pid))
        return sum(int(one.open) for one in processes if one.pid == pid)

    @property
    def sessions(self) -> int:
        """Sessions that are open in this process."""
        return self.open_sessions(os.getpid())

    @property
    def violations(self) -> Violations:
        """The rules that callers have broken up to now."""
        control = _mapped(self.module)
        return Violations(control.finalised_under_calls, control.calls_without_locking, control.sessions_shared)

    def _slot(self, function: str) -> Any:
        return _mapped(self.module).slots[FUNCTIONS.index(function)]


def _names(functions: str | Iterable[str]) -> Iterable[str]:
    return (functions,) if isinstance(functions, str) else functions


@functools.cache
def _mapped(module: Path) -> _Control:
    with module.with_name(f"{module.name}.control").open("r+b") as file:
        return _Control.from_buffer(mmap.mmap(file.fileno(), 0))
