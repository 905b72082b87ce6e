"""What a PKCS#11 backend is told: plain values, checked once. Reads nothing and opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kms_jwks.backends.pkcs11.pin import PinSource
from kms_jwks.backends.pkcs11.uri import Uri


@dataclass(frozen=True, slots=True, kw_only=True)
class Pkcs11Options:
    """One token behind one module. Raises ValueError where the parts cannot go together.

    The token is chosen by `token_label`, `token_serial`, `slot` or `uri`; where several are given, all must fit. It is
    bound to `expected_serial`, or else to the serial this process saw first.
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
    uri: Uri | None = None
    """A PKCS#11 URI that names a token, not an object (RFC 7512)."""
    expected_serial: str | None = None
    sessions: int = 1
    """How many calls of one process may be inside the module at once; one more session holds the login."""
    locking: Literal["os", "process"] = "os"
    """os: the module locks for itself (CKF_OS_LOCKING_OK) if it can; process: one call at a time per process."""
    sign_in_place: bool = True
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables set in `os.environ` before the module is loaded. A module may keep secrets here."""

    def __post_init__(self) -> None:
        if self.token_label is None and self.token_serial is None and self.slot is None and self.uri is None:
            raise ValueError("one of token_label, token_serial, slot, uri must say which token to use")
        if self.sessions < 1:
            raise ValueError("sessions must be at least 1")
        if self.locking not in ("os", "process"):
            raise ValueError("locking is either 'os' or 'process'")
        if self.token_serial and self.expected_serial and self.token_serial != self.expected_serial:
            raise ValueError("token_serial and expected_serial name different tokens")
        if self.uri is not None:
            self._check(self.uri)

    def _check(self, uri: Uri) -> None:
        if uri.names_an_object:
            raise ValueError("uri names a token here, so it has no object, id or type")
        if not uri.of_the_token:
            raise ValueError("uri says nothing of the token")
        if problem := module_problem(uri, self.module):
            raise ValueError(f"uri: {problem}")
        said = {
            "token_label": (self.token_label, "token"),
            "token_serial": (self.token_serial, "serial"),
            "expected_serial": (self.expected_serial, "serial"),
            "slot": (None if self.slot is None else str(self.slot), "slot-id"),
        }
        for setting, (value, attribute) in said.items():
            if value is not None and uri.of_the_token.get(attribute, value) != value:
                raise ValueError(f"uri and {setting} name different tokens")

    @property
    def selection(self) -> str:
        """How the token is chosen, in words for messages."""
        parts = (
            f"label {self.token_label!r}" if self.token_label is not None else "",
            f"serial {self.token_serial!r}" if self.token_serial is not None else "",
            f"slot {self.slot}" if self.slot is not None else "",
            f"URI {str(self.uri)!r}" if self.uri is not None else "",
        )
        return " and ".join(part for part in parts if part)


def module_problem(uri: Uri, module: Path) -> str | None:
    """Why a URI's module-path or module-name does not mean `module`, or None. A path may be that of its folder."""
    if uri.module_path is not None:
        named = Path(uri.module_path)
        try:
            is_it = module.resolve() in (named.resolve(), (named / module.name).resolve())
        except (OSError, ValueError, RuntimeError):  # no path at all, or one that leads in a circle
            is_it = False
        if not is_it:
            return f"its module-path is not the backend's module {module}"
    if uri.module_name is not None and uri.module_name not in (_stem(module), _stem(module).removeprefix("lib")):
        return f"its module-name is not that of the backend's module {module}"
    return None


def _stem(module: Path) -> str:
    return module.name.split(".", 1)[0]
