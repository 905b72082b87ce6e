"""The backend contract (backends/base.py) over one PKCS#11 token."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from kms_jwks.algorithms import DEFAULT_RSA_BITS, Algorithm
from kms_jwks.backends.base import (
    CallTimeouts,
    Digest,
    Evidence,
    GeneratedKey,
    Health,
    KeyRef,
    Message,
    PublicJwk,
    StoredKey,
)
from kms_jwks.backends.pkcs11 import generation, objects
from kms_jwks.backends.pkcs11.error_map import ConnectionLost
from kms_jwks.backends.pkcs11.locks import file_lock, lock_path
from kms_jwks.backends.pkcs11.mechanisms import supported_algorithms
from kms_jwks.backends.pkcs11.module import module_at, serial_of
from kms_jwks.backends.pkcs11.opening import TokenOpener
from kms_jwks.backends.pkcs11.recovery import RecoveringConnection
from kms_jwks.errors import BackendRefused, BackendTimeout, UnsupportedAlgorithm

if TYPE_CHECKING:
    from pathlib import Path

    from kms_jwks.backends.pkcs11.connection import PooledSession
    from kms_jwks.backends.pkcs11.opening import PinSource
    from kms_jwks.config import Pkcs11Options

T = TypeVar("T")

_READING: Final = 10.0
"""Seconds that calls without a deadline of their own wait for locks, sessions and the opening of the token."""
_MUTATING: Final = 60.0
"""The same for making and destroying keys: another process may be making an RSA key."""
_GRACE: Final = 0.25
"""Seconds after these in which a call that waited in vain can say itself what it waited for."""
_LABEL_BYTES: Final = 40


class Pkcs11Backend:
    """A `Backend` over one token. Made before the fork; each process opens the token at its own first call.

    References hold `id` (CKA_ID in hexadecimal), `label` and `serial` (the token's). The token is the one that the
    options choose; it is bound to `expected_serial`, or else to the serial of `bind` or of the first opening.
    """

    kind = "pkcs11"

    def __init__(self, name: str, options: Pkcs11Options, *, lock_dir: Path, pin: PinSource | None = None) -> None:
        """See `TokenOpener` for `lock_dir`, `pin` and the ValueError that it raises."""
        self.name = name
        self.sign_in_place = options.sign_in_place
        self.recovered_at = 0.0
        self._module_path = options.module
        self._opener = TokenOpener(options, lock_dir=lock_dir, pin=pin)
        self._unfinished: list[bytes] = []
        """CKA_IDs of pairs that were not finished and are not destroyed yet; used under the mutation lock."""
        self._bound_to: str | None = None
        # By process. A forked child keeps the parent's entry, whose locks and handles it must not touch, alive and
        # makes its own.
        self._connections: dict[int, RecoveringConnection] = {}

    def bind(self, ref: KeyRef) -> None:
        """See `Backend.bind`: the token's serial."""
        serial = ref.as_dict().get("serial")
        if serial and self._opener.options.expected_serial is None:
            self._bound_to = serial
            self._connection().bind(serial)

    @property
    def timeouts(self) -> CallTimeouts:
        """See `timeouts_of`. A call that hangs in the module keeps its session.

        One that makes or destroys a key keeps the token's mutation lock as well.
        """
        return CallTimeouts(read=_READING + _GRACE, change=_MUTATING + _GRACE)

    # --- signing and reading --------------------------------------------------------------------------------------

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        """See `Backend.sign`."""
        if time.monotonic() >= deadline:
            raise BackendTimeout("The deadline had passed before the module was asked.")
        return self._connection().run(lambda pooled: objects.sign(pooled, ref, alg, what), deadline, doing="signing")

    def capabilities(self) -> frozenset[str]:
        """See `Backend.capabilities`. A mechanism list names no curves: `generate` may still refuse ES256K."""
        return self._read("reading the mechanisms", lambda pooled: supported_algorithms(pooled.connection.mechanisms))

    def public_key(self, ref: KeyRef) -> PublicJwk:
        """See `Backend.public_key`."""
        return self._read(
            "reading a public key",
            lambda pooled: objects.read_jwk(pooled, ref, objects.find_private_key(pooled, ref)),
        )

    def attributes(self, ref: KeyRef) -> Evidence:
        """See `Backend.attributes`."""
        return self._read(
            "reading attributes", lambda pooled: generation.read_evidence(objects.find_private_key(pooled, ref))
        )

    def list_keys(self, label_prefix: str) -> list[StoredKey]:
        """See `Backend.list_keys`."""
        return self._read("listing keys", lambda pooled: objects.list_keys(pooled, label_prefix))

    def adopt(self, locator: str, public_jwk: PublicJwk | None = None) -> GeneratedKey:
        """Find the one private key with a label, with ``id=<hexadecimal CKA_ID>``, or by a PKCS#11 URI (RFC 7512)."""
        parsed = objects.parse_locator(locator, self._module_path)
        return self._read("adopting a key", lambda pooled: objects.adopt(pooled, parsed, public_jwk))

    def ping(self) -> Health:
        """See `Backend.ping`. The counts of sessions are the module's, where it tells them, and this process's own."""

        def work(pooled: PooledSession) -> Health:
            connection = pooled.connection
            facts = connection.facts()
            if facts is None or not connection.is_healthy():
                raise ConnectionLost
            token, module = connection.token, connection.module
            return Health(
                f"token {token.label!r}, serial {connection.serial}, {token.manufacturer_id} {token.model}",
                {
                    "token_label": token.label,
                    "token_serial": serial_of(token),
                    "token_model": token.model,
                    "token_manufacturer": token.manufacturer_id,
                    "token_firmware": "{}.{}".format(*token.firmware_version),
                    "slot": str(token.slot.slot_id),
                    "library": module.description,
                    "library_version": module.version,
                    "locking": "process" if module.lock.serial else "os",
                    "sessions_of_token": _count(facts.sessions),
                    "rw_sessions_of_token": _count(facts.rw_sessions),
                    "sessions_of_process": str(connection.sessions),
                },
            )

        return self._read("asking for a sign of life", work)

    # --- making and destroying ------------------------------------------------------------------------------------

    def generate(
        self, label: str, alg: Algorithm, *, rsa_bits: int | None = None, purpose: Mapping[str, str] | None = None
    ) -> GeneratedKey:
        """See `Backend.generate`. The key has signed, and the signature was verified, when this returns.

        `purpose` is not kept: tokens have no tags, and their labels are random.
        """
        if not label.isascii() or not label.isprintable() or not 0 < len(label) <= _LABEL_BYTES:
            raise BackendRefused(f"A key's label is 1 to {_LABEL_BYTES} printable ASCII characters.")
        if alg.is_rsa:
            rsa_bits = rsa_bits or DEFAULT_RSA_BITS
            if rsa_bits not in alg.rsa_bits:
                sizes = " or ".join(str(size) for size in alg.rsa_bits)
                raise UnsupportedAlgorithm(f"{alg.name} keys have {sizes} bits, not {rsa_bits}.")
        elif rsa_bits is not None:
            raise BackendRefused(f"{alg.name} keys have no RSA modulus.")
        request = generation.KeyRequest(label, alg, rsa_bits)
        return self._mutate("generating a key", lambda pooled: generation.generate(pooled, request, self._unfinished))

    def destroy(self, ref: KeyRef) -> None:
        """See `Backend.destroy`. Both halves are gone, and were searched for again, when this returns."""
        self._mutate("destroying a key", lambda pooled: generation.destroy(pooled, ref))

    def distrust(self, ref: KeyRef) -> None:
        """See `Backend.distrust`: the session is replaced before its next use."""
        self._connection().distrust()

    def schedule_destroy(self, ref: KeyRef, days: int) -> bool:
        """False: tokens have no waiting period."""
        return False

    def cancel_destroy(self, ref: KeyRef) -> None:
        """Do nothing: a destruction in a token is never scheduled."""

    def close(self) -> None:
        """Close this process's sessions. A call that is stuck in the module keeps its session."""
        connection = self._connections.get(os.getpid())
        if connection is not None:
            with suppress(BackendTimeout):
                connection.close(time.monotonic() + _READING)

    # --- the token of this process --------------------------------------------------------------------------------

    def _connection(self) -> RecoveringConnection:
        pid = os.getpid()
        connection = self._connections.get(pid)
        if connection is None:
            made = RecoveringConnection(
                module_at(self._module_path), self._opener, bound_to=self._bound_to, on_opened=self._note_opening
            )
            connection = self._connections.setdefault(pid, made)
        return connection

    def _note_opening(self, at: float) -> None:
        self.recovered_at = at

    def _read(self, doing: str, work: Callable[[PooledSession], T]) -> T:
        return self._connection().run(work, time.monotonic() + _READING, doing=doing)

    def _mutate(self, doing: str, work: Callable[[PooledSession], T]) -> T:
        """One mutation at a time per token, over all threads and processes: beside readers SoftHSM fails otherwise."""
        connection, deadline = self._connection(), time.monotonic() + _MUTATING
        serial = connection.run(lambda pooled: pooled.connection.serial, deadline, doing=doing)
        with file_lock(lock_path(self._opener.lock_dir, "mutate", serial), deadline):
            return connection.run(work, deadline, doing=doing, pool=lambda current: current.mutating)


def _count(count: int | None) -> str:
    return "unknown" if count is None else str(count)
