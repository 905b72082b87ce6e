"""The backend contract (backends/base.py) over one PKCS#11 token. Sessions, retries and attributes live beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from pkcs11 import Attribute, ObjectClass

from kms_jwks.algorithms import DEFAULT_RSA_BITS, Algorithm
from kms_jwks.backends.base import Digest, Evidence, GeneratedKey, Health, KeyRef, Message, PublicJwk, StoredKey
from kms_jwks.backends.pkcs11 import adopting, keys, making, objects
from kms_jwks.backends.pkcs11.access import Access
from kms_jwks.backends.pkcs11.errands import Errands
from kms_jwks.backends.pkcs11.error_map import Lost
from kms_jwks.backends.pkcs11.locks import locked
from kms_jwks.backends.pkcs11.mechanisms import offered
from kms_jwks.backends.pkcs11.module import module_at, serial_of
from kms_jwks.backends.pkcs11.opening import lock_path
from kms_jwks.errors import BackendRefused, BackendTimeout, UnsupportedAlgorithm

if TYPE_CHECKING:
    from kms_jwks.backends.pkcs11.connection import Seat
    from kms_jwks.backends.pkcs11.options import Pkcs11Options

T = TypeVar("T")

_READING: Final = 10.0
"""Seconds that calls without a deadline of their own wait for locks, sessions and the opening."""
_MUTATING: Final = 60.0
"""The same for making and destroying: another process may be at an RSA key."""
_LABEL_BYTES: Final = 40


class Pkcs11Backend:
    """A `Backend` over one token. Made before the fork; each process opens the token at its own first call.

    References hold `id` (CKA_ID in hexadecimal), `label` and `serial` (the token's).
    """

    kind = "pkcs11"

    def __init__(self, name: str, options: Pkcs11Options) -> None:
        self.name = name
        self.sign_in_place = options.sign_in_place
        self._options = options
        self.recovered_at = 0.0
        self._errands = Errands()
        self._unfinished: list[bytes] = []
        """CKA_IDs of pairs that were not finished and not yet destroyed either; touched under the mutation lock."""
        self._bound_to: str | None = None
        # By process: a child of a fork sees the parent's entry, keeps it alive (its locks and handles are not the
        # child's to touch) and makes its own.
        self._accesses: dict[int, Access] = {}

    def bind(self, ref: KeyRef) -> None:
        """See `Backend.bind`: the token's serial."""
        serial = ref.as_dict().get("serial")
        if serial and self._options.expected_serial is None:
            self._bound_to = serial
            self._access().bind(serial)

    @property
    def stuck(self) -> int:
        """See `stuck_in`: each keeps its session, and one that makes or destroys a key the token's lock besides."""
        return self._errands.stuck

    # --- signing and reading --------------------------------------------------------------------------------------

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        """See `Backend.sign`."""
        if time.monotonic() >= deadline:
            raise BackendTimeout("The deadline had passed before the module was asked.")
        return self._access().run(lambda seat: objects.signed(seat, ref, alg, what), deadline, doing="signing")

    def capabilities(self) -> frozenset[str]:
        """See `Backend.capabilities`. Curves are not in a mechanism list: `generate` may still refuse ES256K."""
        return self._read("reading the mechanisms", lambda seat: offered(seat.connection.mechanisms))

    def public_key(self, ref: KeyRef) -> PublicJwk:
        """See `Backend.public_key`."""
        return self._read(
            "reading a public key", lambda seat: objects.jwk_of(seat, ref, objects.private_key(seat, ref))
        )

    def attributes(self, ref: KeyRef) -> Evidence:
        """See `Backend.attributes`."""
        return self._read("reading attributes", lambda seat: keys.evidence_of(objects.private_key(seat, ref)))

    def list_keys(self, label_prefix: str) -> list[StoredKey]:
        """See `Backend.list_keys`."""

        def work(seat: Seat) -> list[StoredKey]:
            found = objects.find(seat.connection, seat.session, {Attribute.CLASS: ObjectClass.PRIVATE_KEY})
            labelled = ((str(keys.optional(key, Attribute.LABEL) or ""), key) for key in found)
            return [
                StoredKey(objects.ref_of(seat, label, key), label)
                for label, key in labelled
                if label.startswith(label_prefix)
            ]

        return self._read("listing keys", work)

    def adopt(self, locator: str, public_jwk: PublicJwk | None = None) -> GeneratedKey:
        """Find the one private key with a label, with ``id=<hexadecimal CKA_ID>``, or by a PKCS#11 URI (RFC 7512)."""
        wanted = adopting.wanted(locator, self._options.module)
        return self._read("adopting a key", lambda seat: adopting.adopted(seat, wanted, public_jwk))

    def ping(self) -> Health:
        """See `Backend.ping`. The counts of sessions are the module's, where it tells, and this process's own."""

        def work(seat: Seat) -> Health:
            connection = seat.connection
            facts = connection.facts()
            if facts is None or not connection.is_healthy():
                raise Lost
            token = connection.token
            return Health(
                f"token {token.label!r}, serial {connection.serial}, {token.manufacturer_id} {token.model}",
                {
                    "token_label": token.label,
                    "token_serial": serial_of(token),
                    "token_model": token.model,
                    "token_manufacturer": token.manufacturer_id,
                    "token_firmware": "{}.{}".format(*token.firmware_version),
                    "slot": str(token.slot.slot_id),
                    "library": connection.module.description,
                    "library_version": connection.module.version,
                    "locking": "process" if connection.module.gate.serial else "os",
                    "sessions_of_token": _known(facts.sessions),
                    "rw_sessions_of_token": _known(facts.rw_sessions),
                    "sessions_of_process": str(connection.sessions),
                },
            )

        return self._read("asking for a sign of life", work)

    # --- making and destroying ------------------------------------------------------------------------------------

    def generate(
        self, label: str, alg: Algorithm, *, rsa_bits: int | None = None, purpose: Mapping[str, str] | None = None
    ) -> GeneratedKey:
        """See `Backend.generate`. The key has signed, and the signature was verified, when this returns.

        `purpose` is not written anywhere: tokens keep no tags, and their labels are random.
        """
        if not label.isascii() or not label.isprintable() or not 0 < len(label) <= _LABEL_BYTES:
            raise BackendRefused(f"A key's label is 1 to {_LABEL_BYTES} printable ASCII characters.")
        if alg.is_rsa:
            rsa_bits = rsa_bits or DEFAULT_RSA_BITS
            if rsa_bits not in alg.rsa_bits:
                raise UnsupportedAlgorithm(f"{alg.name} keys have {_either(alg.rsa_bits)} bits, not {rsa_bits}.")
        elif rsa_bits is not None:
            raise BackendRefused(f"{alg.name} keys have no RSA modulus.")
        request = making.Request(label, alg, rsa_bits)
        return self._mutate(
            "generating a key",
            lambda seat: making.generated(seat, request, self._unfinished),
            undo=lambda late: self.destroy(late.ref),
        )

    def destroy(self, ref: KeyRef) -> None:
        """See `Backend.destroy`. Both halves are gone, and were looked for again, when this returns."""
        self._mutate("destroying a key", lambda seat: making.destroyed(seat, ref))

    def distrust(self, ref: KeyRef) -> None:
        """See `Backend.distrust`: the session is replaced before its next use."""
        self._access().distrust()

    def schedule_destroy(self, ref: KeyRef, days: int) -> bool:
        """Tokens have no waiting period: False."""
        return False

    def cancel_destroy(self, ref: KeyRef) -> None:
        """Nothing was scheduled."""

    def close(self) -> None:
        """Close this process's sessions. Where a call is stuck in the module its session stays."""
        access = self._accesses.get(os.getpid())
        if access is not None:
            with suppress(BackendTimeout):
                access.close(time.monotonic() + _READING)

    # --- the ways in ----------------------------------------------------------------------------------------------

    def _access(self) -> Access:
        pid = os.getpid()
        access = self._accesses.get(pid)
        if access is None:
            access = Access(
                module_at(self._options.module), self._options, bound_to=self._bound_to, opened=self._note_opening
            )
            access = self._accesses.setdefault(pid, access)
        return access

    def _note_opening(self, at: float) -> None:
        self.recovered_at = at

    def _read(self, doing: str, work: Callable[[Seat], T]) -> T:
        access, deadline = self._access(), time.monotonic() + _READING
        return self._errands.run(lambda: access.run(work, deadline, doing=doing), deadline, doing=doing)

    def _mutate(self, doing: str, work: Callable[[Seat], T], undo: Callable[[T], None] | None = None) -> T:
        deadline = time.monotonic() + _MUTATING
        return self._errands.run(lambda: self._alone(doing, work, deadline), deadline, doing=doing, undo=undo)

    def _alone(self, doing: str, work: Callable[[Seat], T], deadline: float) -> T:
        """One at a time per token, whatever the thread or process: SoftHSM fails beside readers otherwise."""
        access = self._access()
        serial = access.run(lambda seat: seat.connection.serial, deadline, doing=doing)
        with locked(lock_path(self._options.lock_dir, "mutate", serial), deadline):
            return access.run(work, deadline, doing=doing, pool=lambda connection: connection.mutating)


def _known(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def _either(sizes: tuple[int, ...]) -> str:
    return " or ".join(str(size) for size in sizes)
