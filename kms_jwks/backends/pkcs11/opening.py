"""Opening a token: choosing it, the start lock between processes, the login, the retries. Makes a `Connection`."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Final

from pkcs11 import PKCS11Error, Token, TokenFlag

from kms_jwks.backends.pkcs11.connection import Connection
from kms_jwks.backends.pkcs11.cryptoki import (
    CKR_OK,
    CKR_USER_ALREADY_LOGGED_IN,
    CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
    CKR_USER_PIN_NOT_INITIALIZED,
)
from kms_jwks.backends.pkcs11.error_map import CODES, Meaning, meaning_of, named, said, translated, unavailable
from kms_jwks.backends.pkcs11.locks import locked
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
_WAITS_AGAIN: Final = (0.02,)
"""The same while the token is known to be away: one look as it is, one after the module was started again."""
_LOGINS: Final = 3
"""C_Login in one opening at most, whatever it answers: no answer may cost more tries of a PIN than a token allows."""
_LOGIN_STEPS: Final = {
    CKR_USER_PIN_NOT_INITIALIZED: "If it goes on saying so: set the user PIN with the vendor's tool (C_InitPIN).",
    CKR_USER_ANOTHER_ALREADY_LOGGED_IN: "End the security officer's session in this process.",
}


class _Transient(Exception):
    """Failed in a way that processes which start at the same time cause in each other. May say what to do next."""

    def __init__(self, detail: str, next_step: str | None = None) -> None:
        super().__init__(detail)
        self.next_step = next_step


def open_token(
    module: Module,
    options: Pkcs11Options,
    bound_to: str | None,
    deadline: float,
    *,
    failed_before: bool = False,
    restart: bool = False,
) -> Connection:
    """A logged-in connection to the token the options choose, and no other than the one with serial `bound_to`.

    `failed_before`: it could not be opened a moment ago, so this is a short look. `restart`: the module said that it
    has to be initialised anew. One process at a time does this.

    Raises BackendUnavailable where waiting may help, BackendRefused where it does not, BackendTimeout where another
    process is at it until the deadline.
    """
    with locked(lock_path(options.lock_dir, "start", str(module.path)), deadline):
        module.start(options.environment, os_locking=options.locking == "os", deadline=deadline)
        if restart:
            module.restart(deadline)
        waits = iter(_WAITS_AGAIN if failed_before else _WAITS)
        answers: list[int] = []
        while True:
            try:
                with module.gate.inside(deadline):
                    return _attempt(module, options, bound_to, answers)
            except _Transient as failure:
                wait = next(waits, None) if len(answers) < _LOGINS else None
                if wait is None or time.monotonic() + wait > deadline:
                    raise unavailable(str(failure), next_step=failure.next_step) from failure.__cause__
                time.sleep(wait)
                module.restart(deadline)


def lock_path(folder: Path, purpose: str, what: str) -> Path:
    """The lock file for one purpose and one module or token; its name is as good as any and holds no odd characters."""
    return folder / f"{purpose}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"


def _attempt(module: Module, options: Pkcs11Options, bound_to: str | None, answers: list[int]) -> Connection:
    doing = "choosing the token"
    connection: Connection | None = None
    try:
        token = _chosen(module, options)
        serial = serial_of(token)
        _check_binding(serial, options, bound_to)
        doing = "opening a session"
        connection = Connection(module, token, serial, seats=options.sessions)
        _log_in(connection, options, answers)
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
        if meaning_of(error).is_final:
            raise translated(error, doing) from error
        raise _Transient(f"The module answered {said(error)} to {doing}.") from error


def _chosen(module: Module, options: Pkcs11Options) -> Token:
    tokens = module.tokens()
    fitting = [
        token
        for token in tokens
        if options.token_label in (None, token.label)
        and options.token_serial in (None, serial_of(token))
        and options.slot in (None, token.slot.slot_id)
        and (options.uri is None or not options.uri.contradictions(module.shows(token)))
    ]
    if not fitting:
        raise _Transient(f"The module shows no token with {options.selection}.", _shown(tokens))
    if len(fitting) > 1:
        serials = ", ".join(serial_of(token) for token in fitting)
        raise BackendRefused(
            f"The module shows {len(fitting)} tokens with {options.selection}: serials {serials}.",
            next_step="Choose one of them by token_serial.",
        )
    return fitting[0]


def _shown(tokens: list[Token]) -> str:
    """What to do where the token is not among these."""
    named = [repr(token.label) for token in tokens if token.flags & TokenFlag.TOKEN_INITIALIZED]
    shown = f"It shows tokens labelled {', '.join(named)}" if named else "It shows no initialised token"
    return f"{shown}: connect the right one, correct the backend's token, or initialise it with the vendor's tool."


def _check_binding(serial: str, options: Pkcs11Options, bound_to: str | None) -> None:
    if not serial:
        raise _Transient(
            f"The token with {options.selection} shows no serial.",
            "Initialise it with the vendor's tool (SoftHSM: softhsm2-util --init-token).",
        )
    expected = options.expected_serial or bound_to
    if expected is not None and serial != expected:
        raise BackendRefused(
            f"The token with {options.selection} has serial {serial}; the keys are on the one with serial {expected}.",
            next_step="Put the right token back, or configure a backend of another name for the new one.",
        )


def _log_in(connection: Connection, options: Pkcs11Options, answers: list[int]) -> None:
    """C_Login, stricter than other calls: what may be a judgement of the PIN is never asked for twice.

    `answers` gets what it answered where it did not succeed.
    That is every answer that says so, and every one that the specification does not have: deny by default.
    """
    source, serial = options.pin, connection.serial
    refused = RefusedPins(options.lock_dir)
    try:
        refused.check(source, serial)
        # Taken before the PIN is read: where the source changes in between, the new one is tried again.
        fingerprint = refused.fingerprint(source)
        code = connection.login(source.read())
        # Two backends may share a token; PKCS#11 has one login per process.
        if code in (CKR_OK, CKR_USER_ALREADY_LOGGED_IN):
            refused.forget(source, serial)
            return
        answers.append(code)
        if code not in CODES or meaning_of(code) is Meaning.PIN:
            raise refused.refuse(source, serial, fingerprint, named(code))
    except OSError as error:
        raise BackendRefused(
            f"The record of refused PINs in {options.lock_dir} cannot be kept: {error.strerror}.",
            next_step="Make it a folder that this user may write to; without the record no PIN is tried.",
        ) from error
    said_so = f"The token with serial {serial} answered {named(code)} to the login."
    if meaning_of(code).is_final:
        raise BackendRefused(said_so)
    raise _Transient(said_so, _LOGIN_STEPS.get(code))
