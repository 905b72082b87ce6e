"""The backend contract: the operations of a module that holds private keys. No module is named here.

A backend is bound to one module (a token serial, an account and region). It is made before the fork and opens nothing
until its first call; it is thread-safe. Every method raises `kms_jwks.errors.BackendError` subclasses and nothing else.
backends/calling.py calls it; no other part of the service does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from kms_jwks.algorithms import Algorithm
from kms_jwks.errors import BackendError


@dataclass(frozen=True, slots=True)
class KeyRef:
    """The place of a key pair in its module: strings that only the backend interprets, kept in the registry.

    `locator` is a sorted tuple of (name, value) pairs, so that a reference is hashable and can key a handle cache.
    """

    locator: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, **parts: str) -> KeyRef:
        """A reference made of its parts."""
        return cls(tuple(sorted(parts.items())))

    def __getitem__(self, name: str) -> str:
        return dict(self.locator)[name]

    def as_dict(self) -> dict[str, str]:
        """The parts, as the registry keeps them."""
        return dict(self.locator)


PublicJwk = Mapping[str, str]
"""The parameters of a public JWK: kty and its members (RFC 7518 §6), without kid, use or alg."""


@dataclass(frozen=True, slots=True)
class ModuleKey:
    """One key pair as the registry records it: the reference to sign with, and the public key to verify with."""

    kid: str
    alg: Algorithm
    backend: str
    ref: KeyRef
    public_jwk: PublicJwk


@dataclass(frozen=True, slots=True)
class GeneratedKey:
    """A new or adopted key pair: its reference, and its public half as read back from the module."""

    ref: KeyRef
    public_jwk: PublicJwk


@dataclass(frozen=True, slots=True)
class Message:
    """The bytes to sign; the backend or the module hashes them."""

    data: bytes

    def digest(self, alg: Algorithm) -> bytes:
        """The hash that `alg` signs. Raises ValueError for EdDSA and ML-DSA, which have none."""
        if alg.hash is None:
            raise ValueError(f"{alg.name} signs the message itself")
        return hashlib.new(alg.hash, self.data).digest()


@dataclass(frozen=True, slots=True)
class Digest:
    """A hash made by the caller, of the length that the key's algorithm signs. Not for EdDSA and ML-DSA."""

    value: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of promise 1 as read back from the module: attributes, and what follows from them.

    `generated_in_module`, `non_extractable` and `sign_only` are True only where the module's own attributes say so.
    `attributes` holds the vendor's names (CKA_…, Origin, …) with booleans, strings or integers.
    """

    attributes: Mapping[str, bool | str | int | None]
    generated_in_module: bool
    non_extractable: bool
    sign_only: bool

    @property
    def holds(self) -> bool:
        """Whether promise 1 is kept."""
        return not self.weaknesses

    @property
    def weaknesses(self) -> tuple[str, ...]:
        """The parts of promise 1 that do not hold, in words. An administrator accepts them or adopts no such key."""
        claims = {
            "it was not generated in the module": self.generated_in_module,
            "it is or was extractable": self.non_extractable,
            "it may do more than sign": self.sign_only,
        }
        return tuple(words for words, holds in claims.items() if not holds)

    def as_dict(self) -> dict[str, object]:
        """The evidence as the registry keeps it."""
        return {
            "attributes": dict(self.attributes),
            "generated_in_module": self.generated_in_module,
            "non_extractable": self.non_extractable,
            "sign_only": self.sign_only,
        }


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key pair that `list_keys` found in the module; the search for orphans uses it."""

    ref: KeyRef
    label: str


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of `ping`: the module that answered, in words (`description`) and as facts."""

    description: str
    facts: Mapping[str, str]


class BackendFactory(Protocol):
    """The object of a third party's entry point in the group `kms_jwks.backends`: it makes a backend and opens nothing.

    `options` are the settings of the section that are not every backend's (TOML values; strings where they come from
    the environment). `management` is the section's table of that name, given to the custodian, which uses its
    credentials instead of the others; it is None in workers and where there is no such table. `state_dir` is this
    node's own folder. Raises `kms_jwks.errors.ConfigurationError` for options it cannot use.
    """

    def __call__(  # noqa: D102
        self, name: str, options: Mapping[str, Any], state_dir: Path, management: Mapping[str, Any] | None
    ) -> Backend: ...


@dataclass(frozen=True, slots=True)
class CallTimeouts:
    """Seconds after which a call other than `sign` is abandoned: one that reads, and one that changes the module."""

    read: float = 300.0
    change: float = 300.0


def timeouts_of(backend: Backend) -> CallTimeouts:
    """The timeouts of a backend's calls. A backend may give its own in an attribute `timeouts`."""
    try:
        timeouts = getattr(backend, "timeouts", None)
    except BackendError:
        timeouts = None
    return timeouts if isinstance(timeouts, CallTimeouts) else CallTimeouts()


MAX_ABANDONED_CALLS: Final = 8
"""Calls that a backend may abandon in its module before the process is replaced, whatever its limits are."""


def stuck_in(backend: Backend) -> int:
    """How many calls a backend has abandoned in its module: it answered them by a deadline, and they did not return.

    A backend that abandons calls counts them in an attribute `stuck`; one without it abandons none.
    """
    try:
        stuck = getattr(backend, "stuck", 0)
    except BackendError:
        return 0
    return stuck if isinstance(stuck, int) else 0


class Backend(Protocol):
    """One module. `deadline` is an instant of `time.monotonic()`."""

    name: str
    kind: str
    """The configuration's `type`, e.g. "pkcs11"."""
    sign_in_place: bool
    """True where signing is so quick that the calling thread may do it; otherwise a thread of the pool does it."""
    recovered_at: float
    """The `time.monotonic()` at which this process last opened or reopened the module, 0.0 before the first opening.
    The service verifies every signature of the second after it."""

    def bind(self, ref: KeyRef) -> None:
        """Learn from the registry which module the keys are in. Another one under the same name is then refused.

        Opens nothing and raises nothing. A module that the configuration names takes precedence; the last call wins.
        """
        ...

    def capabilities(self) -> frozenset[str]:
        """The `alg` names that the module offers. Raises BackendUnavailable, BackendRefused."""
        ...

    def generate(
        self, label: str, alg: Algorithm, *, rsa_bits: int | None = None, purpose: Mapping[str, str] | None = None
    ) -> GeneratedKey:
        """Make a key pair in the module: non-extractable, sign-only, read back. `label` is ASCII, at most 40 bytes.

        `purpose` names what the pair is for (key-set, key, version), for modules that keep tags; others ignore it.
        Raises KeyExists when the label is in use, UnsupportedAlgorithm, BackendRefused, BackendUnavailable.
        """
        ...

    def adopt(self, locator: str, public_jwk: PublicJwk | None = None) -> GeneratedKey:
        """Find a key pair that another program made. The caller judges it by `attributes`.

        `public_jwk` replaces a public half that the module does not hold, and no other; the caller proves by a
        signature that it belongs to the private key. Raises BackendKeyNotFound, UnsupportedAlgorithm, and
        BackendRefused where the locator fits several keys, or the public half cannot be read and none is given.
        """
        ...

    def public_key(self, ref: KeyRef) -> PublicJwk:
        """The public half as the module holds it now. Raises BackendKeyNotFound, BackendUnavailable."""
        ...

    def attributes(self, ref: KeyRef) -> Evidence:
        """The evidence of promise 1. Raises BackendKeyNotFound, BackendUnavailable."""
        ...

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        """The signature in JOSE form: r‖s for ECDSA (RFC 7518 §3.4), PSS with salt length = hash length (§3.5).

        Raises BackendKeyNotFound, UnsupportedAlgorithm, BackendRefused, BackendUnavailable, BackendThrottled,
        BackendTimeout.
        """
        ...

    def distrust(self, ref: KeyRef) -> None:
        """The signature that `sign` last returned to this thread does not verify: its session is not used again.

        Raises nothing. A backend without sessions has nothing to do here.
        """
        ...

    def schedule_destroy(self, ref: KeyRef, days: int) -> bool:
        """Ask the module to destroy the key in `days`, 7 to 30. False where it has no waiting period of its own.

        A further call changes the date where the module allows it. `destroy` is called at the date in either case.
        """
        return False

    def cancel_destroy(self, ref: KeyRef) -> None:
        """Cancel `schedule_destroy`. Where no destruction is scheduled it does nothing."""
        ...

    def destroy(self, ref: KeyRef) -> None:
        """Remove both halves from the module and return when they are gone. Idempotent: a key that is gone is no error.

        In a waiting period it raises BackendUnavailable, with the seconds that are left as `retry_after`.
        """
        ...

    def list_keys(self, label_prefix: str) -> list[StoredKey]:
        """Every private key whose label starts with the prefix; the search for orphans uses it."""
        ...

    def ping(self) -> Health:
        """Check that the module answers. Raises BackendUnavailable, BackendRefused."""
        ...

    def close(self) -> None:
        """Close sessions and end threads. No method is called afterwards."""
        ...
