"""Wycheproof: every case of the signature files through `verify_signature`, of the JOSE files through `authenticate`.

`authenticate` is all of `verify` up to the claims; the payloads of these files are no claims. Cases whose verdict is
not ours stand in a table with the reason. Test ids show how many cases each test ran.
"""

import json
from typing import Any

import pytest

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm
from kms_jwks.errors import InvalidJwk, TokenMalformed, TokenRejected, TokenSignatureInvalid
from kms_jwks.verification import VerifyKey, authenticate
from tests.vectors.support import VECTORS, load, needs_vectors

pytestmark = needs_vectors

SIGNATURES = {
    "rsa_signature_2048_sha256_test": ("RS256",),
    "rsa_pss_2048_sha256_mgf1_32_test": ("PS256",),
    "ecdsa_secp256r1_sha256_p1363_test": ("ES256",),
    "ecdsa_secp384r1_sha384_p1363_test": ("ES384",),
    "ecdsa_secp521r1_sha512_p1363_test": ("ES512",),
    "ecdsa_secp256k1_sha256_p1363_test": ("ES256K",),
    "ed25519_test": ("EdDSA", "Ed25519"),
}

ACCEPTABLE = {
    # PKCS #1 v1.5 with the NULL of the hash's parameters left out: RFC 8017 §9.2 requires it, so it is refused.
    ("rsa_signature_2048_sha256_test", 8): False,
}


def cases(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(group, case) for group in load(f"wycheproof/{name}.json")["testGroups"] for case in group["tests"]]


def counted(name: str) -> str:
    if not VECTORS.is_dir():
        return name
    results = [case["result"] for _, case in cases(name)]
    return f"{name}: " + ", ".join(f"{results.count(r)} {r}" for r in sorted(set(results), reverse=True))


def verifies(alg: Algorithm, jwk: dict[str, str], message: bytes, signature: bytes) -> bool:
    try:
        jose.verify_signature(alg, jwk, message, signature)
    except TokenSignatureInvalid:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "alg"),
    [
        pytest.param(name, ALGORITHMS[alg], id=f"{alg}: {counted(name)}")
        for name, algs in SIGNATURES.items()
        for alg in algs
    ],
)
def test_signatures(name: str, alg: Algorithm) -> None:
    wrong, seen = [], {True: 0, False: 0}
    key: tuple[str, dict[str, str]] = ("", {})
    for group, case in cases(name):
        if key[0] != group["publicKeyPem"]:
            key = group["publicKeyPem"], jose.jwk_from_pem(group["publicKeyPem"])
            assert jose.check_public_jwk(key[1], alg) == key[1]
            if "publicKeyJwk" in group:
                assert key[1] == {name: group["publicKeyJwk"][name] for name in key[1]}
        expected = ACCEPTABLE.get((name, case["tcId"]), case["result"] == "valid")
        seen[expected] += 1
        if verifies(alg, key[1], bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"])) is not expected:
            wrong.append((case["tcId"], case["result"], case["comment"], case["flags"]))
    assert wrong == []
    assert all(seen.values())


def test_every_acceptable_case_is_explained() -> None:
    acceptable = {
        (name, case["tcId"]) for name in SIGNATURES for _, case in cases(name) if case["result"] == "acceptable"
    }
    assert acceptable == set(ACCEPTABLE)


# --- JSON Web Signature and JSON Web Key ------------------------------------------------------------------------------

NOT_OURS = {
    # The JWK's alg is not the token's: "ES521" is no algorithm at all, and a PS256 key is no PS384 key
    # (RFC 7517 §4.4). Wycheproof calls the four valid; a key here has one algorithm. Each verifies once the JWK's alg
    # is corrected, see test_the_four_verify_once_their_alg_is_corrected.
    346: "PS256 key, PS384 token",
    347: "ES521 key, ES512 token",
    350: "PS256 key, PS384 token",
    351: "ES521 key, ES512 token",
}


def keyset(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The public keys of a group; a symmetric group has only `private`, and nothing of it is public."""
    found = group.get("public", group["private"])
    keys: list[dict[str, Any]] = found.get("keys", [found])
    return keys


def symmetric(group: dict[str, Any]) -> bool:
    return all(jwk["kty"] == "oct" for jwk in keyset(group))


def registry(group: dict[str, Any]) -> dict[str, VerifyKey]:
    """What of a key set the service would take in as external keys; the alg is the JWK's, as an operator reads it."""
    keys = {}
    for jwk in keyset(group):
        named = ALGORITHMS.get(jwk.get("alg", ""))
        for alg in [named] if named else list(ALGORITHMS.values()):
            try:
                keys[jwk["kid"]] = VerifyKey(alg.name, jose.check_public_jwk(jwk, alg))
                break
            except InvalidJwk:
                continue
    return keys


def accepts(token: object, keys: dict[str, VerifyKey]) -> bool:
    try:
        authenticate(str(token), keys=keys)
    except TokenRejected:
        return False
    return True


def jose_groups(name: str) -> list[Any]:
    if not VECTORS.is_dir():
        return [pytest.param({}, id="no vectors")]
    params = []
    for index, group in enumerate(load(f"wycheproof/{name}.json")["testGroups"]):
        results = [case["result"] for case in group["tests"]]
        kind = "symmetric, not applicable" if symmetric(group) else "applied"
        counts = f"{results.count('valid')} valid, {results.count('invalid')} invalid"
        params.append(pytest.param(group, id=f"{index} {group['comment']}, {kind}: {counts}"))
    return params


@pytest.mark.parametrize("group", jose_groups("json_web_signature_test") + jose_groups("json_web_key_test"))
def test_jose(group: dict[str, Any]) -> None:
    """Valid cases pass and invalid ones do not.

    Symmetric groups do not apply: the service has no symmetric keys. No such key is taken in, and every token of
    theirs is refused, the valid ones too, even where its kid is that of a public key.
    """
    keys = registry(group)
    if symmetric(group):
        assert keys == {}
        es256 = VerifyKey("ES256", RFC7515_A3)
        keys = {jwk["kid"]: es256 for jwk in keyset(group)}
    wrong = []
    for case in group["tests"]:
        expected = case["result"] == "valid" and not symmetric(group) and case["tcId"] not in NOT_OURS
        if accepts(case["jws"], keys) is not expected:
            wrong.append((case["tcId"], case["result"], case["comment"], case["flags"]))
    assert wrong == []


RFC7515_A3 = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


def test_the_base64_group_is_refused_for_its_spelling() -> None:
    """Its keys are symmetric; its spellings apply all the same.

    367 and 370 are labelled as wrong padding, but their text is that of the valid case 357.
    """
    spelled_well = {357, 358, 359, 367, 370, 376, 377}
    for group, case in cases("json_web_signature_test"):
        if group["comment"] == "base64":
            expected = TokenSignatureInvalid if case["tcId"] in spelled_well else TokenMalformed
            with pytest.raises(expected):
                authenticate(case["jws"], keys={"hs256-key": VerifyKey("ES256", RFC7515_A3)})


def test_the_four_verify_once_their_alg_is_corrected() -> None:
    corrected = 0
    for group, case in cases("json_web_signature_test"):
        if case["tcId"] not in NOT_OURS:
            continue
        (jwk,) = keyset(group)
        alg = json.loads(jose.b64u_decode(case["jws"].partition(".")[0]))["alg"]
        with pytest.raises(InvalidJwk, match="alg is"):
            jose.check_public_jwk(jwk, ALGORITHMS[alg])
        good = jose.check_public_jwk({**jwk, "alg": alg}, ALGORITHMS[alg])
        assert accepts(case["jws"], {jwk["kid"]: VerifyKey(alg, good)})
        corrected += 1
    assert corrected == len(NOT_OURS)


# json_web_key_test: tcId → the reason for which the key itself is refused when it comes in.
KEYS_REFUSED = {
    6: "alg is 'RSA1_5'|use is 'enc'",
    7: "ROCA",
    8: "1024 bits",
    9: "below 3",
    19: "alg is 'ES521'",
    20: "alg is 'ES224'",
    21: "use is 'enc'",
    22: "not on P-256",
    23: "needs crv P-256",
    24: "n is missing",
}


@pytest.mark.parametrize("tc", KEYS_REFUSED)
def test_bad_keys_are_refused_for_the_right_reason(tc: int) -> None:
    (group,) = (group for group, case in cases("json_web_key_test") if case["tcId"] == tc)
    (jwk,) = keyset(group)
    alg = ALGORITHMS["RS256" if "n" in jwk else "ES256"]
    with pytest.raises(InvalidJwk, match=KEYS_REFUSED[tc]):
        jose.check_public_jwk(jwk, alg)


def test_every_key_case_is_accounted_for() -> None:
    """26 cases: 10 bad keys above, one good RSA key (5), one mixed set (1), and 14 symmetric ones."""
    ids = {case["tcId"] for _, case in cases("json_web_key_test")}
    oct_only = {case["tcId"] for group, case in cases("json_web_key_test") if symmetric(group)}
    assert ids == set(KEYS_REFUSED) | {1, 5} | oct_only
