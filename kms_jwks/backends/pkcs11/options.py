"""What a PKCS#11 backend is told: plain values, checked once. Reads nothing and opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kms_jwks.backends.pkcs11.pin import PinSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Pkcs11Options:
    """One token behind one module. Raises ValueError where the parts cannot go together.

    The token is chosen by `token_label`, `token_serial` or `slot`; where several are given, all must fit. It is bound
    to `expected_serial`, or else to the serial this process saw first.
    """

    module: Path
    """The vendor's shared object."""
    pin: PinSource
    lock_dir: Path
    """Made with mode 0700 where missing: the locks between processes, and the record of refused PINs."""
    token_label: str | None = None
    token_serial: str | None = None
    slot: int | None = None
    """The slot's number (CK_SLOT_ID)."""
    expected_serial: str | None = None
    sessions: int = 1
    """How many calls of one process may be inside the module at once; one more session holds the login."""
    locking: Literal["os", "process"] = "os"
    """os: the module locks for itself (CKF_OS_LOCKING_OK) if it can; process: one call at a time per process."""
    sign_in_place: bool = True
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables set in `os.environ` before the module is loaded. A module may keep secrets here."""

    def __post_init__(self) -> None:
        if self.token_label is None and self.token_serial is None and self.slot is None:
            raise ValueError("one of token_label, token_serial, slot must say which token to use")
        if self.sessions < 1:
            raise ValueError("sessions must be at least 1")
        if self.locking not in ("os", "process"):
            raise ValueError("locking is either 'os' or 'process'")
        if self.token_serial and self.expected_serial and self.token_serial != self.expected_serial:
            raise ValueError("token_serial and expected_serial name different tokens")

    @property
    def selection(self) -> str:
        """How the token is chosen, in words for messages."""
        parts = (
            f"label {self.token_label!r}" if self.token_label is not None else "",
            f"serial {self.token_serial!r}" if self.token_serial is not None else "",
            f"slot {self.slot}" if self.slot is not None else "",
        )
        return " and ".join(part for part in parts if part)
