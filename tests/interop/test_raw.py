"""Key sets with purpose `raw`: detached JWS and plain signatures, verified with joserfc and cryptography."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import joserfc.jws
import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from joserfc.errors import BadSignatureError
from joserfc.jwk import KeySet

from kms_jwks import errors, wire
from tests.interop.conftest import Issuer, MakeIssuer
from tests.interop.verifiers import fetch

DATA = b"any bytes at all \x00\xff" * 20


@pytest.fixture(scope="module")
def raw_es256(shared_issuer: MakeIssuer) -> Issuer:
    return shared_issuer("ES256", None, "raw")


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# --- JWS --------------------------------------------------------------------------------------------------------------


def test_joserfc_verifies_a_detached_jws_with_its_payload_and_with_no_other(raw_es256: Issuer) -> None:
    jws = raw_es256.client.sign_jws(raw_es256.name, "main", DATA, detached=True, cty="application/octet-stream").jws
    head, between, _ = jws.split(".")
    assert between == ""
    assert head
    keys = KeySet.import_key_set(fetch(raw_es256.jwks_uri))

    joserfc.jws.deserialize_compact(jws, keys, algorithms=["ES256"], payload=DATA)
    with pytest.raises(BadSignatureError):
        joserfc.jws.deserialize_compact(jws, keys, algorithms=["ES256"], payload=DATA + b"!")


def test_joserfc_verifies_a_whole_jws(raw_es256: Issuer) -> None:
    jws = raw_es256.client.sign_jws(raw_es256.name, "main", DATA).jws
    keys = KeySet.import_key_set(fetch(raw_es256.jwks_uri))
    assert joserfc.jws.deserialize_compact(jws, keys, algorithms=["ES256"]).payload == DATA


# --- plain signatures -------------------------------------------------------------------------------------------------


def _ecdsa(hash_: hashes.HashAlgorithm) -> Callable[[Any, bytes, bytes], None]:
    def verify(key: Any, signature: bytes, data: bytes) -> None:
        half = len(signature) // 2
        r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hash_))

    return verify


def _pkcs1(key: Any, signature: bytes, data: bytes) -> None:
    key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())


def _pss(key: Any, signature: bytes, data: bytes) -> None:
    """RFC 7518 §3.5: MGF1 with the same hash, and a salt exactly as long as the hash."""
    key.verify(signature, data, padding.PSS(padding.MGF1(hashes.SHA384()), hashes.SHA384.digest_size), hashes.SHA384())


def _eddsa(key: Any, signature: bytes, data: bytes) -> None:
    key.verify(signature, data)


VERIFIERS: dict[str, tuple[Callable[[Any, bytes, bytes], None], str | None]] = {
    "ES256": (_ecdsa(hashes.SHA256()), "sha256"),
    "ES512": (_ecdsa(hashes.SHA512()), "sha512"),
    "ES256K": (_ecdsa(hashes.SHA256()), "sha256"),
    "RS256": (_pkcs1, "sha256"),
    "PS384": (_pss, "sha384"),
    "EdDSA": (_eddsa, None),
}


@pytest.mark.parametrize("alg", VERIFIERS)
def test_cryptography_verifies_signatures_of_inputs_and_of_digests(shared_issuer: MakeIssuer, alg: str) -> None:
    verify, hash_name = VERIFIERS[alg]
    issuer = shared_issuer(alg, 2048 if alg in ("RS256", "PS384") else None, "raw")
    (key,) = [jwt.PyJWK(key).key for key in fetch(issuer.jwks_uri)["keys"] if key["kid"] == issuer.kid()]

    signatures = [issuer.client.sign_raw(issuer.name, "main", DATA)]
    if hash_name is None:
        with pytest.raises(errors.InvalidDigest):
            issuer.client.sign_raw(issuer.name, "main", digest=hashlib.sha512(DATA).digest())
    else:
        digest = hashlib.new(hash_name, DATA).digest()
        signatures.append(issuer.client.sign_raw(issuer.name, "main", digest=digest, kid=issuer.kid()))
        with pytest.raises(errors.InvalidDigest):
            issuer.client.sign_raw(issuer.name, "main", digest=digest[:-1])

    for signed in signatures:
        assert (signed.alg, signed.kid) == (alg, issuer.kid())
        verify(key, decoded(signed.signature), DATA)
        with pytest.raises(InvalidSignature):
            verify(key, decoded(signed.signature), DATA + b"!")


def test_a_raw_key_set_signs_no_jwt_and_a_jwt_key_set_nothing_else(raw_es256: Issuer, es256: Issuer) -> None:
    """Verifiers trust every kid of a set, so what may be signed is a matter of the set."""
    with pytest.raises((errors.PurposeMismatch, errors.Forbidden)):
        raw_es256.client.sign_jwt(raw_es256.name, "main", {"sub": "alice"})
    with pytest.raises((errors.PurposeMismatch, errors.Forbidden)):
        es256.client.sign_jws(es256.name, "main", DATA)
    with pytest.raises(errors.InvalidField):
        es256.client.sign_raw(es256.name, "main", DATA)


def test_a_batch_answers_good_items_beside_bad_ones(raw_es256: Issuer) -> None:
    items = [wire.JwsRequest(payload="aGVsbG8"), wire.JwsRequest(payload="not base64url!")]
    good, bad = raw_es256.client.sign_jws_batch(raw_es256.name, "main", items)
    assert isinstance(good, wire.SignedJws)
    assert isinstance(bad, errors.InvalidPayload)
    keys = KeySet.import_key_set(fetch(raw_es256.jwks_uri))
    assert joserfc.jws.deserialize_compact(good.jws, keys, algorithms=["ES256"]).payload == b"hello"
