"""The check of a module's signatures before they are released, with the public key that the registry recorded.

A wrong signature is never released. Every RSA signature is checked, since a single faulty one can reveal the key. Of
the other algorithms a share is checked, and always: the first signature of each key in this process and after each
opening of the module, every signature in the second after an opening or after the module could not be reached, and
every signature in the minute after a wrong one.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from kms_jwks import jose
from kms_jwks.backends.base import Backend, Digest, KeyRef, Message, ModuleKey, PublicJwk
from kms_jwks.errors import (
    BackendError,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    InvalidJwk,
    TokenSignatureInvalid,
)

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

AFTER_RECOVERY = 1.0
"""Seconds after an opening, or after the module could not be reached, in which every signature is checked."""
AFTER_A_BAD_ONE = 60.0
"""Seconds after a wrong signature in which every one is checked."""
_REFUSED_FOR = 5.0
"""Seconds during which a key that is not the recorded one is refused without asking the module again."""
_KNOWN = 1024
"""Keys whose verifiers are kept."""


@dataclass(eq=False, slots=True)
class _Known:
    """A key's verifier, and the `time.monotonic()` of its last good signature here; None before the first."""

    verifier: jose.Verifier
    checked_at: float | None = None
    refused_until: float = 0.0


class SignatureChecker:
    """For one backend of one process. `share`, 0 to 1, of the signatures that need not be checked are checked too.

    `ask` puts a question to the backend by a deadline of ours; the backend's own calls, but for `sign`, take none.
    """

    def __init__(
        self,
        backend: Backend,
        share: float,
        chance: Callable[[], float] = random.random,
        *,
        ask: Callable[[Callable[[], PublicJwk], float], PublicJwk] = lambda question, _: question(),
    ) -> None:
        self._backend = backend
        self._share = share
        self._chance = chance
        self._ask = ask
        self._known: dict[tuple[str, str, KeyRef], _Known] = {}
        self._wary_until = 0.0
        self._lock = threading.Lock()
        self.checked = 0
        """Signatures that were verified."""
        self.bad = 0
        """Of these, how many were wrong and never left."""

    def signed(self, signer: ModuleKey, what: Message | Digest, deadline: float) -> bytes:
        """A signature that may leave. To be called by the thread that signs.

        Raises BackendError: BackendRefused where the module holds another key than the recorded one,
        BackendUnavailable where its signatures are wrong for a reason of its own.
        """
        known = self._known.get(_place(signer)) or self._learn(signer)
        if known.refused_until > time.monotonic():
            raise _another_key(signer)
        backend = self._backend
        try:
            signature = backend.sign(signer.ref, signer.alg, what, deadline)
            if not self._is_due(signer, known) or self._is_good(signer, known, what, signature):
                return signature
            backend.distrust(signer.ref)
            signature = backend.sign(signer.ref, signer.alg, what, deadline)
        except (BackendUnavailable, BackendTimeout):
            self.be_wary()
            raise
        if self._is_good(signer, known, what, signature):
            return signature
        backend.distrust(signer.ref)
        raise self._verdict(signer, known, deadline)

    def be_wary(self, seconds: float = AFTER_RECOVERY) -> None:
        """Check every signature for a while."""
        self._wary_until = max(self._wary_until, time.monotonic() + seconds)

    # --- inside

    def _learn(self, signer: ModuleKey) -> _Known:
        try:
            known = _Known(jose.Verifier(signer.alg, signer.public_jwk))
        except InvalidJwk as error:
            raise BackendRefused(
                f"The recorded public key of kid {signer.kid!r} cannot be used: {error.detail}",
                next_step="Rotate the key; the record in the registry is damaged.",
            ) from None
        if len(self._known) >= _KNOWN:
            self._known.clear()
        return self._known.setdefault(_place(signer), known)

    def _is_due(self, signer: ModuleKey, known: _Known) -> bool:
        if signer.alg.is_rsa or known.checked_at is None:
            return True
        now, opened = time.monotonic(), self._backend.recovered_at
        if now < self._wary_until or known.checked_at <= opened or now - opened < AFTER_RECOVERY:
            return True
        return self._chance() < self._share

    def _is_good(self, signer: ModuleKey, known: _Known, what: Message | Digest, signature: bytes) -> bool:
        try:
            if isinstance(what, Message):
                known.verifier.verify(what.data, signature)
            else:
                known.verifier.verify_digest(what.value, signature)
        except TokenSignatureInvalid:
            good = False
        except Exception as error:  # noqa: BLE001 - a signature that cannot be verified is not released
            log.warning("signature_not_verifiable", backend=self._backend.name, error=type(error).__name__)
            good = False
        else:
            good = True
        with self._lock:
            self.checked += 1
            self.bad += not good
        if good:
            known.checked_at = time.monotonic()
        else:
            self.be_wary(AFTER_A_BAD_ONE)
            log.error("wrong_signature", backend=self._backend.name, kid=signer.kid, alg=signer.alg.name)
        return good

    def _verdict(self, signer: ModuleKey, known: _Known, deadline: float) -> BackendError:
        """After two wrong signatures in a row: find out whether the key or the module is at fault."""
        try:
            held = jose.thumbprint(self._ask(partial(self._backend.public_key, signer.ref), deadline))
        except (BackendError, InvalidJwk):
            held = None
        if held is not None and held != jose.thumbprint(signer.public_jwk):
            known.refused_until = time.monotonic() + _REFUSED_FOR
            log.error(
                "module_key_differs",
                backend=self._backend.name,
                kid=signer.kid,
                held=held,
                next_step="Find out who replaced the key in the module; revoke the version and rotate.",
            )
            return _another_key(signer)
        return BackendUnavailable(
            "The module gave two signatures in a row that do not verify. None of them was released.", retry_after=1
        )


def _place(signer: ModuleKey) -> tuple[str, str, KeyRef]:
    """Which verifier is that of `signer`: two key sets may have one kid for two keys, or one key for two algorithms."""
    return signer.kid, signer.alg.name, signer.ref


def _another_key(signer: ModuleKey) -> BackendRefused:
    return BackendRefused(
        f"The key in the module is not the one that was recorded for kid {signer.kid!r}. Nothing it signs is released.",
        next_step="Find out who replaced the key in the module; revoke the version and rotate.",
    )
