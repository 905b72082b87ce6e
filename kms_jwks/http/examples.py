"""An example of every body, for OpenAPI and the docs page: one key set `shop` with its key `main`, and its callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kms_jwks import wire
from kms_jwks.http.exchange import Empty

if TYPE_CHECKING:
    from collections.abc import Mapping

_KID = "cn-I_WNMClehiVp51i_0VpOENW1upEerA8sEam5hn-s"
_STANDBY_KID = "oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U"
_POINT = {
    "kty": "EC",
    "crv": "P-256",
    "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
}
_OLD_POINT = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}
_JWK = {**_POINT, "use": "sig", "alg": "ES256", "kid": _KID}
_MADE, _VISIBLE, _NOW = "2026-11-02T09:00:00.250000Z", "2026-11-02T09:00:01.500000Z", "2026-11-20T14:30:00Z"
_ROTATES, _DESTROYS, _EXPIRES = "2027-01-31T09:00:01.750000Z", "2027-03-02T10:05:01.750000Z", "2027-02-01T09:00:00Z"
_ID = "019ad3c1-6f8e-7b3a-9c54-2f1d8e07a6b1"
_TOKEN_ID = "019ad3c1-7a20-7d11-8f6b-5c0e9a3b4d72"  # noqa: S105 - the id of a token, not a token
_WORKER = "019ad3c0-11aa-7c5e-a0b4-93d27f60c158"
_HEADER = "eyJ0eXAiOiJKV1QiLCJhbGciOiJFUzI1NiIsImtpZCI6ImNuLUlfV05NQ2xlaGlWcDUxaV8wVnBPRU5XMXVwRWVyQThzRWFtNWhuLXMifQ"
_PAYLOAD = "eyJzdWIiOiJhbGljZSIsImF1ZCI6InNob3AifQ"
_SIGNATURE = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
_TOKEN = f"{_HEADER}.{_PAYLOAD}.{_SIGNATURE}"

_POLICY = {
    "rotate_every": 7_776_000,
    "publish_lead": 86_400,
    "allow_unsafe_publish_lead": False,
    "max_token_ttl": 3600,
    "clock_skew": 300,
    "handover": 60,
    "destroy_after": 2_592_000,
    "rotate_jitter": 3600,
    "rotate_window": "mon-thu 09:00-16:00",
    "hold_until": None,
}


def _version(**fields: Any) -> dict[str, Any]:
    return {
        "kid": _KID,
        "number": 1,
        "state": "active",
        "alg": "ES256",
        "public_jwk": _JWK,
        "created_at": _MADE,
        "backend": "softhsm",
        "trouble": None,
        "published_at": _MADE,
        "visible_since": _VISIBLE,
        "usable_at": None,
        "activated_at": _VISIBLE,
        "deactivated_at": None,
        "retired_at": None,
        "revoked_at": None,
        "revoke_reason": None,
        "destroy_at": None,
        "destroyed_at": None,
        "breaches": [],
        "origin": "generated",
        "weaknesses": [],
        "emergency": False,
        "absence": None,
    } | fields


_ACTIVE = _version()
_STANDBY = _version(
    kid=_STANDBY_KID,
    number=2,
    state="published",
    public_jwk={**_OLD_POINT, "use": "sig", "alg": "ES256", "kid": _STANDBY_KID},
    usable_at="2026-11-03T09:00:01.500000Z",
    activated_at=None,
)
_REVOKED = _version(state="revoked", deactivated_at=_NOW, revoked_at=_NOW, revoke_reason="found in a core dump")
_SUCCESSOR = _STANDBY | {"state": "active", "usable_at": None, "activated_at": _NOW, "emergency": True}

_KEY = {
    "name": "main",
    "key_set": "shop",
    "alg": "ES256",
    "rsa_bits": None,
    "backend": "softhsm",
    "enabled": True,
    "active_kid": _KID,
    "policy": _POLICY,
    "profile": {"name": "default", "typ": "JWT", "default_lifetime": 300},
    "warnings": [],
    "created_at": _MADE,
    "updated_at": _MADE,
    "revision": 1,
    "retired_at": None,
    "versions": [_ACTIVE, _STANDBY],
}
_KEY_SET = {
    "name": "shop",
    "issuer": "https://keys.example.com/shop",
    "access": "public",
    "purpose": "jwt",
    "cache_lifetime": 300,
    "stale_if_error": 3600,
    "existing_issuer": False,
    "jwks_uri": "https://keys.example.com/shop/.well-known/jwks.json",
    "jwks_pq_uri": None,
    "first_published_at": _MADE,
    "created_at": _MADE,
    "updated_at": _MADE,
    "revision": 2,
    "retired_at": None,
    "warnings": [],
}
_EXTERNAL = {
    "kid": "2025-old",
    "alg": "ES256",
    "public_jwk": {**_OLD_POINT, "use": "sig", "alg": "ES256", "kid": "2025-old"},
    "created_at": _MADE,
    "remove_at": "2035-01-01T00:00:00Z",
    "removed_at": None,
    "created_by": "admin",
    "warnings": [],
    "changes": [{"what": "added", "at": _MADE, "remove_at": "2035-01-01T00:00:00Z", "who": "admin"}],
    "ignored": [],
}
_EXPOSURE = {
    "withdrawn_at": "2026-11-20T14:30:00.400000Z",
    "cache_lifetime": 300,
    "stale_if_error": 3600,
    "trusted_until": "2026-11-21T02:30:00.400000Z",
    "unbounded": ["go-oidc v3"],
    "second_rotation_not_before": "2026-11-21T14:30:01Z",
    "verifiers": [
        {
            "verifier": "panva/jose 6",
            "source": "jose 6.0, jwks/remote.js",
            "keeps": 600,
            "trusts_until": "2026-11-20T14:40:00.400000Z",
            "trusts_until_behind_cache": "2026-11-20T14:45:00.400000Z",
            "ends": "expiry",
            "learns": "knows",
            "learns_by": None,
            "words": "It keeps a JWKS for 10 minutes.",
            "cured_by_second_rotation": True,
        }
    ],
}
_CHECKS = [
    {
        "invariant": "I1",
        "holds": True,
        "statement": "It may sign 86400 s after every worker published it.",
        "left": _NOW,
        "right": "2026-11-03T09:00:01.500000Z",
    }
]
_UNCONFIRMED = {"worker": _WORKER, "node": "node-2", "heartbeat_at": "2026-11-20T14:29:51Z"}

EXAMPLES: Final[Mapping[type | str, dict[str, Any]]] = {
    # requests
    Empty: {},
    wire.KeySetCreate: {
        "name": "shop",
        "access": "public",
        "cache_lifetime": 300,
        "keys": [{"name": "main", "alg": "ES256", "policy": {"max_token_ttl": 3600}}],
    },
    wire.KeySetPatch: {"cache_lifetime": 600},
    wire.KeyCreate: {"name": "reports", "alg": "RS256", "rsa_bits": 3072, "policy": {"rotate_every": 2_592_000}},
    wire.KeyPatch: {"policy": {"rotate_window": "mon-thu 09:00-16:00"}, "profile": {"default_lifetime": 600}},
    wire.RotateRequest: {"expected_kid": _KID},
    wire.VersionCreate: {"adopt": {"locator": "id=5f3a", "kid": "2025-key"}},
    wire.ActivateRequest: {"break_glass": True, "reason": "the active key is in the wrong hands"},
    wire.RetireRequest: {"break_glass": False},
    wire.RevokeRequest: {"reason": "found in a core dump", "dry_run": True},
    wire.RevocationCreate: {"backend": "softhsm", "reason": "its PIN was on a slide", "dry_run": True},
    wire.DestroyRequest: {"destroy_at": "2035-01-01T00:00:00Z"},
    wire.ExternalKeyCreate: {"kid": "2025-old", "alg": "ES256", "remove_at": "2035-01-01T00:00:00Z", "jwk": _OLD_POINT},
    wire.ExternalKeyPatch: {"remove_at": "2035-06-30T00:00:00Z"},
    wire.JwtRequest: {"claims": {"sub": "alice", "aud": ["shop", "stock"], "scope": "read"}, "expires_in": 600},
    wire.SigningInputRequest: {"signing_input": f"{_HEADER}.{_PAYLOAD}", "kid": _KID},
    wire.JwsRequest: {"payload": "aGVsbG8", "detached": True, "cty": "text/plain"},
    wire.RawSignatureRequest: {"input": "aGVsbG8"},
    wire.VerifyRequest: {"token": _TOKEN, "audience": "shop"},
    wire.ClientCreate: {"name": "shop-issuer"},
    wire.TokenCreate: {"expires_in": 2_592_000},
    wire.TokenRotate: {"overlap": 604_800, "expires_in": 2_592_000},
    wire.GrantCreate: {"client": "shop-issuer", "role": "signer", "scope": {"key_set": "shop", "key": "main"}},
    # key sets, keys, versions
    wire.KeySet: {**_KEY_SET, "keys": [_KEY], "external_keys": [_EXTERNAL], "external_keys_removed": 0},
    wire.KeySetSummary: {
        **_KEY_SET,
        "keys": [{"name": "main", "alg": "ES256", "enabled": True, "active_kid": _KID}],
        "external_keys": [{member: _EXTERNAL[member] for member in ("kid", "alg", "remove_at", "created_by")}],
    },
    wire.Key: _KEY,
    wire.Version: _ACTIVE,
    wire.ExternalKey: _EXTERNAL,
    wire.Timeline: {
        "key_set": "shop",
        "key": "main",
        "enabled": True,
        "now": _NOW,
        "until": "2027-11-20T14:30:00Z",
        "versions": [
            {
                "number": 1,
                "kid": _KID,
                "state": "active",
                "spans": [
                    {"state": "active", "start": _VISIBLE, "end": _ROTATES, "planned": False},
                    {"state": "retiring", "start": _ROTATES, "end": None, "planned": True},
                ],
                "checks": _CHECKS,
                "next": "it is rotated out",
                "next_at": _ROTATES,
            }
        ],
        "steps": [
            {
                "kind": "activate",
                "due": _ROTATES,
                "number": 2,
                "reason": "rotate_every 7776000 s ends",
                "waits_for": "",
                "breach": None,
            }
        ],
    },
    wire.Safety: {
        "kid": _KID,
        "state": "active",
        "now": _NOW,
        "checks": _CHECKS,
        "next": "it is rotated out",
        "next_at": _ROTATES,
        "external_keys": [],
        "external_keys_removed": 0,
        "warnings": [],
    },
    wire.Attributes: {
        "kid": _KID,
        "backend": "softhsm",
        "generated_in_module": True,
        "non_extractable": True,
        "sign_only": True,
        "attributes": {"CKA_LOCAL": True, "CKA_NEVER_EXTRACTABLE": True, "CKA_SIGN": True},
        "recorded": {"attributes": {"CKA_LOCAL": True, "CKA_NEVER_EXTRACTABLE": True, "CKA_SIGN": True}},
    },
    wire.Revoked: {
        "version": _REVOKED,
        "successor": _SUCCESSOR,
        "successor_visible_for": 1_574_999,
        "without_successor": False,
        "changed": True,
        "unconfirmed": [_UNCONFIRMED],
        "exposure": _EXPOSURE,
        "dry_run": False,
        "external_keys": [],
        "same_key": [],
    },
    wire.Revocation: {
        "external_keys": [],
        "same_key": [],
        "reason": "its PIN was on a slide",
        "versions": [
            {
                "key_set": "shop",
                "key": "main",
                "version": _REVOKED,
                "successor": _SUCCESSOR,
                "successor_visible_for": 1_574_999,
                "changed": True,
            }
        ],
        "disabled": [{"key_set": "shop", "key": "main"}],
        "without_successor": [],
        "unconfirmed": [],
        "exposures": [{"key_set": "shop", "exposure": _EXPOSURE}],
        "dry_run": True,
    },
    # signing and verifying
    wire.SignedJwt: {
        "token": _TOKEN,
        "kid": _KID,
        "alg": "ES256",
        "jti": "019ad3c2-0b6e-7f10-b7a5-61d0c2e9f384",
        "expires_at": "2026-11-20T14:40:00Z",
    },
    wire.SignedJws: {"jws": f"{_HEADER}..{_SIGNATURE}", "kid": _KID, "alg": "ES256"},
    wire.Signature: {"signature": _SIGNATURE, "kid": _KID, "alg": "ES256"},
    wire.Active: {
        "kid": _KID,
        "alg": "ES256",
        "public_jwk": _JWK,
        "next": {"kid": _STANDBY_KID, "not_before": _ROTATES},
        "refresh_after": "2026-11-20T14:31:00Z",
    },
    wire.Verified: {
        "header": {"typ": "JWT", "alg": "ES256", "kid": _KID},
        "claims": {"sub": "alice", "aud": "shop", "iss": "https://keys.example.com/shop", "exp": 1_795_185_600},
        "kid": _KID,
    },
    # callers
    wire.Client: {"name": "shop-issuer", "id": _ID, "created_at": _MADE},
    wire.TokenCreated: {
        "token": "kj_EXAMPLE-this-is-no-token",
        "id": _TOKEN_ID,
        "expires_at": _EXPIRES,
    },
    wire.TokenRotated: {
        "token": "kj_EXAMPLE-this-is-no-token",
        "id": _ID,
        "expires_at": _EXPIRES,
        "replaces": _TOKEN_ID,
        "replaced_expires_at": "2026-11-27T14:30:00Z",
    },
    wire.Token: {
        "id": _TOKEN_ID,
        "client": "shop-issuer",
        "created_at": _MADE,
        "expires_at": _EXPIRES,
        "revoked_at": None,
        "last_used_at": _NOW,
        "replaced_by": None,
        "warnings": [],
    },
    wire.Grant: {
        "id": _ID,
        "client": "shop-issuer",
        "role": "signer",
        "scope": {"key_set": "shop", "key": "main"},
        "created_at": _MADE,
        "created_by": "admin",
        "combined_with": [],
        "accepted_combined_duties": False,
    },
    # operation
    wire.Node: {
        "worker": _WORKER,
        "node": "node-1",
        "pid": 4711,
        "started_at": _MADE,
        "heartbeat_at": _NOW,
        "epoch": 42,
        "lag": 0,
        "lease": 10,
        "lease_left": 9,
        "live": True,
        "backends": {"softhsm": "ok"},
    },
    wire.Custodian: {
        "acting": True,
        "holder": _ID,
        "node": "node-1",
        "term": 3,
        "since": _MADE,
        "renewed_at": _NOW,
        "expires_at": "2026-11-20T14:30:10Z",
        "halted": None,
    },
    wire.Backend: {
        "name": "softhsm",
        "type": "pkcs11",
        "default": True,
        "sign_in_place": True,
        "state": "ok",
        "detail": "SoftHSM, token kms-jwks",
        "algorithms": ["ES256", "RS256"],
        "counters": {"checked": 120, "bad": 0, "timeouts": 0, "refused": 0, "stuck": 0},
        "recycled": 0,
    },
    wire.Readiness: {
        "status": "ok",
        "dependencies": [{"name": "registry", "state": "ok", "cause": "", "detail": "", "next_step": ""}],
    },
    # documents
    "Jwk": _JWK,
    "Jwks": {"keys": [_JWK]},
    "IssuerMetadata": {
        "issuer": "https://keys.example.com/shop",
        "jwks_uri": "https://keys.example.com/shop/.well-known/jwks.json",
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    },
    "OpenApi": {"openapi": "3.1.0"},
}
"""By struct, and by the name of a schema that no struct has. The requests are such that a service takes them."""
