"""Sound values of the model with one field changed at a time: what the tests of the pure core build with."""

from __future__ import annotations

from typing import Any

from kms_jwks.model import (
    SECOND,
    Access,
    Bounds,
    ExternalKey,
    Id,
    Instant,
    Key,
    KeySet,
    KeyVersion,
    Policy,
    Purpose,
    SigningProfile,
    VersionState,
)

T0 = Instant(1_800_000_000 * SECOND)


def at(seconds: float) -> Instant:
    """`seconds` after T0."""
    return Instant(T0 + int(seconds * SECOND))


def key_set(**changes: Any) -> KeySet:
    fields: dict[str, Any] = {
        "id": Id("set-1"),
        "name": "main",
        "issuer": "https://issuer.example/main",
        "access": Access.PUBLIC,
        "purpose": Purpose.JWT,
        "cache_lifetime": 300,
        "stale_if_error": 3600,
        "existing_issuer": False,
        "created_at": T0,
        "updated_at": T0,
    }
    return KeySet(**(fields | changes))


def key(**changes: Any) -> Key:
    fields: dict[str, Any] = {
        "id": Id("key-1"),
        "key_set_id": Id("set-1"),
        "name": "default",
        "alg": "ES256",
        "rsa_bits": None,
        "backend": "softhsm",
        "policy": Policy(),
        "profile": SigningProfile(),
        "created_at": T0,
        "updated_at": T0,
    }
    return Key(**(fields | changes))


def version(number: int, state: VersionState, **changes: Any) -> KeyVersion:
    fields: dict[str, Any] = {
        "id": Id(f"version-{number}"),
        "key_set_id": Id("set-1"),
        "key_id": Id("key-1"),
        "number": number,
        "alg": "ES256",
        "rsa_bits": None,
        "backend": "softhsm",
        "state": state,
        "created_at": T0,
        "kid": f"kid-{number}",
        "ref": {"label": f"label-{number}"},
        "public_jwk": {"kty": "EC", "crv": "P-256", "x": "AA", "y": f"AA{number}"},
        "bounds": Bounds(3600, 300, 60, 10, 300),
    }
    return KeyVersion(**(fields | changes))


def external(**changes: Any) -> ExternalKey:
    fields: dict[str, Any] = {
        "id": Id("external-1"),
        "key_set_id": Id("set-1"),
        "kid": "old",
        "alg": "ES256",
        "public_jwk": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        "created_at": T0,
        "remove_at": at(3600),
    }
    return ExternalKey(**(fields | changes))
