"""Opening a token: choosing it, the start lock between processes, the login, the retries. Makes a `Connection`."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Final

from pkcs11 import PKCS11Error

from kms_jwks.backends.pkcs11.connection import Connection
from kms_jwks.backends.pkcs11.cryptoki import (
    CKR_OK,
    CKR_PIN_EXPIRED,
    CKR_PIN_INCORRECT,
    CKR_PIN_INVALID,
    CKR_PIN_LEN_RANGE,
    CKR_PIN_LOCKED,
    CKR_USER_ALREADY_LOGGED_IN,
)
from kms_jwks.backends.pkcs11.locks import locked
from kms_jwks.backends.pkcs11.meanings import Meaning, meaning_of, said, translated, unavailable
from kms_jwks.backends.pkcs11.module import serial_of
from kms_jwks.backends.pkcs11.pin import RefusedPins
from kms_jwks.errors import BackendError, BackendRefused

if TYPE_CHECKING:
    from pathlib import Path

    from pkcs11 import Token

    from kms_jwks.backends.pkcs11.module import Module
    from kms_jwks.backends.pkcs11.options import Pkcs11Options

_WAITS: Final = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Seconds before each further attempt. What fails for longer than a login takes to rewrite a token has failed."""

_WRONG_PIN: Final = (CKR_PIN_INCORRECT, CKR_PIN_INVALID, CKR_PIN_LEN_RANGE)
_FINAL_LOGIN: Final = {
    CKR_PIN_LOCKED: ("CKR_PIN_LOCKED", "Have the token's security officer unlock the PIN (C_InitPIN)."),
    CKR_PIN_EXPIRED: ("CKR_PIN_EXPIRED", "Set a new PIN with the vendor's tool."),
}


class _Transient(Exception):
    """Failed in a way that processes which start at the same time cause in each other."""


def open_token(module: Module, options: Pkcs11Options, bound_to: str | None, deadline: float) -> Connection:
    """A logged-in connection to the token the options choose, and no other than the one with serial `bound_to`.

    One process at a time does this. Raises BackendUnavailable where waiting may help, BackendRefused where it does
    not, BackendTimeout where another process is at it until the deadline.
    """
    with locked(lock_path(options.lock_dir, "start", str(module.path)), deadline):
        module.start(options.environment, os_locking=options.locking == "os", deadline=deadline)
        waits = iter(_WAITS)
        while True:
            try:
                with module.gate.inside(deadline):
                    return _attempt(module, options, bound_to)
            except _Transient as failure:
                wait = next(waits, None)
                if wait is None or time.monotonic() + wait > deadline:
                    raise unavailable(str(failure)) from failure.__cause__
                time.sleep(wait)
                module.restart(deadline)


def lock_path(folder: Path, purpose: str, what: str) -> Path:
    """The lock file for one purpose and one module or token; its name is as good as any and holds no odd characters."""
    return folder / f"{purpose}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"


def _attempt(module: Module, options: Pkcs11Options, bound_to: str | None) -> Connection:
    doing = "choosing the token"
    connection: Connection | None = None
    try:
        token = _chosen(module, options)
        serial = serial_of(token)
        _check_binding(serial, options, bound_to)
        doing = "opening a session"
        connection = Connection(module, token, serial, seats=options.sessions)
        _log_in(connection, options)
        if not connection.is_healthy():
            raise _Transient(f"The token with {options.selection} does not answer as one we are logged in to.")
        module.tenants.add(connection)
        return connection
    except (BackendError, _Transient):
        if connection is not None:
            connection.close()
        raise
    except PKCS11Error as error:
        if connection is not None:
            connection.close()
        if meaning_of(error) in (Meaning.REFUSED, Meaning.UNSUPPORTED):
            raise translated(error, doing) from error
        raise _Transient(f"The module answered {said(error)} to {doing}.") from error


def _chosen(module: Module, options: Pkcs11Options) -> Token:
    fitting = [
        token
        for token in module.tokens()
        if options.token_label in (None, token.label)
        and options.token_serial in (None, serial_of(token))
        and options.slot in (None, token.slot.slot_id)
        and (options.uri is None or not options.uri.contradictions(module.shows(token)))
    ]
    if not fitting:
        raise _Transient(f"The module shows no token with {options.selection}.")
    if len(fitting) > 1:
        serials = ", ".join(serial_of(token) for token in fitting)
        raise BackendRefused(
            f"The module shows {len(fitting)} tokens with {options.selection}: serials {serials}.",
            next_step="Choose one of them by token_serial.",
        )
    return fitting[0]


def _check_binding(serial: str, options: Pkcs11Options, bound_to: str | None) -> None:
    if not serial:
        raise _Transient(f"The token with {options.selection} shows no serial.")
    expected = options.expected_serial or bound_to
    if expected is not None and serial != expected:
        raise BackendRefused(
            f"The token with {options.selection} has serial {serial}; the keys are on the one with serial {expected}.",
            next_step="Put the right token back, or configure a backend of another name for the new one.",
        )


def _log_in(connection: Connection, options: Pkcs11Options) -> None:
    source, serial = options.pin, connection.serial
    refused = RefusedPins(options.lock_dir)
    try:
        refused.check(source, serial)
        # Taken before the PIN is read: where the source changes in between, the new one is tried again.
        fingerprint = refused.fingerprint(source)
        code = connection.login(source.read())
        # Two backends may share a token; PKCS#11 has one login per process.
        if code in (CKR_OK, CKR_USER_ALREADY_LOGGED_IN):
            refused.forget(serial)
            return
        if code in _WRONG_PIN:
            raise refused.refuse(source, serial, fingerprint)
    except OSError as error:
        raise BackendRefused(
            f"The record of refused PINs in {options.lock_dir} cannot be kept: {error.strerror}.",
            next_step="Make it a folder that this user may write to; without the record no PIN is tried.",
        ) from error
    if code in _FINAL_LOGIN:
        name, step = _FINAL_LOGIN[code]
        raise BackendRefused(f"The token with serial {serial} answered {name} to the login.", next_step=step)
    raise _Transient(f"The token with serial {serial} answered {code:#x} to the login.")
