"""ML-DSA of PKCS#11 v3.2, as far as it can be tested without a module: rows, parameter sets, public keys."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import mldsa
from pkcs11 import KeyType, Mechanism

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Digest, Message
from kms_jwks.backends.pkcs11 import mechanisms
from kms_jwks.backends.pkcs11.mechanisms import ROWS, prepare, supported_algorithms
from kms_jwks.errors import BackendRefused, UnsupportedAlgorithm

MlDsaKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
KINDS: dict[int, type[MlDsaKey]] = {1: mldsa.MLDSA44PrivateKey, 2: mldsa.MLDSA65PrivateKey, 3: mldsa.MLDSA87PrivateKey}
NAMES = {1: "ML-DSA-44", 2: "ML-DSA-65", 3: "ML-DSA-87"}
BOTH = {Mechanism.ML_DSA_KEY_PAIR_GEN, Mechanism.ML_DSA}


def test_the_numbers_are_those_of_the_standard() -> None:
    """PKCS#11 v3.2: CKM_ML_DSA_KEY_PAIR_GEN, CKM_ML_DSA, CKK_ML_DSA, CKP_ML_DSA_44 to _87."""
    assert (Mechanism.ML_DSA_KEY_PAIR_GEN, Mechanism.ML_DSA, KeyType.ML_DSA) == (0x1C, 0x1D, 0x4A)
    assert dict(mechanisms.PARAMETER_SETS) == NAMES


def test_it_is_offered_where_both_mechanisms_are() -> None:
    assert supported_algorithms(BOTH) == set(NAMES.values())
    for one in BOTH:
        assert supported_algorithms({one}) == set()


@pytest.mark.parametrize("number", KINDS)
def test_a_public_key_is_read(number: int) -> None:
    public = KINDS[number].generate().public_key()
    jwk = mechanisms.ml_dsa_jwk(number, public.public_bytes_raw())
    assert jwk == jose.public_jwk(public)
    alg = ALGORITHMS[NAMES[number]]
    assert mechanisms.matches(alg, jwk)
    for other in set(NAMES.values()) - {alg.name} | {"ES256", "RS256", "EdDSA"}:
        assert not mechanisms.matches(ALGORITHMS[other], jwk)


@pytest.mark.parametrize(("number", "size"), [(1, 1311), (1, 1952), (2, 1312), (3, 0)])
def test_a_public_key_of_another_length_is_refused(number: int, size: int) -> None:
    with pytest.raises(BackendRefused, match=f"{size} bytes"):
        mechanisms.ml_dsa_jwk(number, bytes(size))


@pytest.mark.parametrize("number", [0, 4, 99])
def test_a_parameter_set_that_is_none_is_refused(number: int) -> None:
    with pytest.raises(UnsupportedAlgorithm, match="CKA_PARAMETER_SET"):
        mechanisms.ml_dsa_jwk(number, bytes(1312))


@pytest.mark.parametrize("name", NAMES.values())
def test_the_message_itself_goes_to_the_module(name: str) -> None:
    alg = ALGORITHMS[name]
    assert prepare(alg, Message(b"message"), BOTH) == (b"message", Mechanism.ML_DSA)
    assert ROWS[name].signing == (Mechanism.ML_DSA,)
    with pytest.raises(BackendRefused, match="the message itself"):
        prepare(alg, Digest(bytes(64)), BOTH)
    with pytest.raises(UnsupportedAlgorithm):
        prepare(alg, Message(b"message"), {Mechanism.ECDSA})
