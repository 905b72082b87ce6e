"""JOSE with public keys: base64url, JWS assembly, JWKs, thumbprints, PEM and DER, signature verification.

Everywhere base64url is without padding (RFC 7515 §2) and an ECDSA signature is r‖s (RFC 7518 §3.4). A public JWK here
is `kty` and its parameters, all strings. The libraries joserfc and cryptography do the cryptography. profiles.py and
verification.py decide which claims are valid.
"""

from __future__ import annotations

import binascii
import hashlib
import math
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature, encode_dss_signature
from joserfc.jwa import JWS_ALGORITHMS
from joserfc.jwk import ECKey, OKPKey, RSAKey
from joserfc.jwk import thumbprint as _rfc7638

from kms_jwks import strictjson
from kms_jwks.algorithms import (
    ALGORITHMS,
    COORDINATES,
    JWK_PARAMETERS,
    PRIVATE_MEMBERS,
    Algorithm,
    Family,
    repair_jwk,
)
from kms_jwks.errors import InvalidJwk, TokenSignatureInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MlDsaPublicKey: TypeAlias = mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey
PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | Ed25519PublicKey | MlDsaPublicKey

# --- base64url and JWS ------------------------------------------------------------------------------------------------

_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
# Characters of base64 that base64url does not have become a byte that the strict decoder refuses.
_FROM_URL: Final = bytes.maketrans(b"-_+/=", b"+/\0\0\0")
_LAST_OF_TWO: Final = frozenset("AQgw")
_LAST_OF_THREE: Final = frozenset("AEIMQUYcgkosw048")


def b64u_encode(data: bytes) -> str:
    """Bytes as base64url without padding (RFC 7515 §2)."""
    return binascii.b2a_base64(data, newline=False).translate(_TO_URL).rstrip(b"=").decode("ascii")


def b64u_decode(text: str) -> bytes:
    """Bytes of base64url without padding (RFC 7515 §2). One text per value.

    Raises ValueError for padding, characters outside the alphabet (white space too), an impossible length, and
    trailing bits that are not zero. The message never repeats the text.
    """
    tail = len(text) % 4
    if tail == 1:
        raise ValueError(f"base64url is never {len(text)} characters long")
    if (tail == 2 and text[-1] not in _LAST_OF_TWO) or (tail == 3 and text[-1] not in _LAST_OF_THREE):
        raise ValueError(_alphabet_problem(text) or "the trailing bits of the base64url are not zero")
    try:
        return binascii.a2b_base64(
            text.encode("ascii").translate(_FROM_URL) + b"=="[: -len(text) % 4], strict_mode=True
        )
    except ValueError:  # UnicodeEncodeError and binascii.Error both are
        raise ValueError(_alphabet_problem(text) or "not base64url") from None


def _alphabet_problem(text: str) -> str | None:
    if "=" in text:
        return "base64url has no padding here (RFC 7515 §2)"
    wrong = re.search(r"[^A-Za-z0-9_-]", text)
    return wrong and f"character {wrong.start()} is outside the base64url alphabet"


def header_segment(*, alg: str, kid: str, typ: str | None, cty: str | None = None) -> str:
    """The encoded JOSE header: alg, kid, and typ and cty where given, in this order (RFC 7515 §4.1)."""
    header = {"alg": alg, "kid": kid}
    if typ is not None:
        header["typ"] = typ
    if cty is not None:
        header["cty"] = cty
    return b64u_encode(strictjson.dumps(header))


def signing_input(header_segment: str, payload: bytes) -> bytes:
    """``header.payload`` as the ASCII bytes that are signed (RFC 7515 §5.1)."""
    return f"{header_segment}.{b64u_encode(payload)}".encode("ascii")


def compact(signing_input: bytes, signature: bytes, *, detached: bool = False) -> str:
    """The compact serialisation (RFC 7515 §7.1); with `detached` the payload is left out (appendix F)."""
    text = signing_input.decode("ascii")
    if detached:
        text = text[: text.index(".") + 1]
    return f"{text}.{b64u_encode(signature)}"


# --- public keys ------------------------------------------------------------------------------------------------------

EC_CURVES: Final[Mapping[str, ec.EllipticCurve]] = MappingProxyType(
    {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1(), "secp256k1": ec.SECP256K1()}
)
"""The curves of EC keys by their `crv` value (RFC 7518 §6.2.1.1, RFC 8812 §3.1)."""
_CRV_OF_CURVE: Final = {curve.name: crv for crv, curve in EC_CURVES.items()}
_SIGNING_USES: Final = ("sig", "jwt-svid")
"""Values of `use` of keys that verify tokens (RFC 7517 §4.2; SPIFFE Trust Domain and Bundle §4.2.2)."""
_ML_DSA: Final[Mapping[str, type[MlDsaPublicKey]]] = MappingProxyType(
    {
        "ML-DSA-44": mldsa.MLDSA44PublicKey,
        "ML-DSA-65": mldsa.MLDSA65PublicKey,
        "ML-DSA-87": mldsa.MLDSA87PublicKey,
    }
)
"""The class of an AKP key by its `alg` value (RFC 9964 §3)."""

RSA_MODULUS_BITS: Final = (2048, 8192)
"""The smallest and largest modulus `check_public_jwk` accepts, in bits."""
RSA_EXPONENT_BITS: Final = 64
"""The longest exponent, in bits; OpenSSL refuses longer ones once the modulus exceeds 3072 bits."""


def thumbprint(jwk: Mapping[str, object]) -> str:
    """The JWK's SHA-256 thumbprint in base64url (RFC 7638 §3), over its key parameters alone.

    The `alg` of an AKP key is one of them (RFC 9964 §6).
    """
    parameters = dict(_required(jwk))
    if parameters["kty"] == "AKP":
        canonical = strictjson.dumps({name: parameters[name] for name in sorted(parameters)})
        return b64u_encode(hashlib.sha256(canonical).digest())
    return _rfc7638(parameters)


def public_key(jwk: Mapping[str, object]) -> PublicKey:
    """The key object of a public JWK. Raises InvalidJwk for a JWK that is malformed or not on its curve."""
    parameters = _required(jwk)
    if parameters["kty"] == "RSA":
        return _rsa_key(_unsigned(parameters, "n"), _unsigned(parameters, "e"))
    if parameters["kty"] == "EC":
        return _ec_key(parameters)
    if parameters["kty"] == "AKP":
        return _ml_dsa_key(parameters)
    return _ed25519_key(parameters)


def public_jwk(key: object) -> dict[str, str]:
    """The JWK of a public key: `kty` and its parameters alone (RFC 7518 §6, RFC 8037 §2).

    Raises InvalidJwk for a key type or curve the service does not know.
    """
    if isinstance(key, rsa.RSAPublicKey):
        rsa_numbers = key.public_numbers()
        return {"kty": "RSA", "n": _encode_unsigned(rsa_numbers.n), "e": _encode_unsigned(rsa_numbers.e)}
    if isinstance(key, ec.EllipticCurvePublicKey):
        crv = _CRV_OF_CURVE.get(key.curve.name)
        if crv is None:
            raise InvalidJwk(f"The curve {key.curve.name} is none of {', '.join(EC_CURVES)}.")
        size = COORDINATES[crv]
        numbers = key.public_numbers()
        x, y = (b64u_encode(value.to_bytes(size, "big")) for value in (numbers.x, numbers.y))
        return {"kty": "EC", "crv": crv, "x": x, "y": y}
    if isinstance(key, Ed25519PublicKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": b64u_encode(key.public_bytes_raw())}
    for name, kind in _ML_DSA.items():
        if isinstance(key, kind):
            return {"kty": "AKP", "alg": name, "pub": b64u_encode(key.public_bytes_raw())}
    raise InvalidJwk(f"A {type(key).__name__} is not an RSA, EC, Ed25519 or ML-DSA public key.")


def to_pem(jwk: Mapping[str, object]) -> str:
    """SubjectPublicKeyInfo as PEM (RFC 7468 §13). Raises InvalidJwk."""
    return _spki(jwk, serialization.Encoding.PEM).decode("ascii")


def to_der(jwk: Mapping[str, object]) -> bytes:
    """SubjectPublicKeyInfo as DER (RFC 5280 §4.1). Raises InvalidJwk."""
    return _spki(jwk, serialization.Encoding.DER)


def _spki(jwk: Mapping[str, object], encoding: serialization.Encoding) -> bytes:
    return public_key(jwk).public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


_PEM_LABEL: Final = re.compile(r"-----BEGIN ([^-\r\n]{1,64})-----")


def jwk_from_pem(pem: str) -> dict[str, str]:
    """The public JWK of exactly one PEM block, ``PUBLIC KEY`` or ``RSA PUBLIC KEY``.

    Raises InvalidJwk for anything else, with a message of its own for a private key and for a certificate, whose
    validity and key usage would be lost.
    """
    labels = _PEM_LABEL.findall(pem)
    if any("PRIVATE" in label for label in labels):
        raise InvalidJwk(
            "The PEM holds a private key.",
            next_step="Treat the key as compromised: it has been sent. Send the public key of a new one.",
        )
    if len(labels) != 1:
        raise InvalidJwk(f"One PEM block is expected, {len(labels)} were found.")
    if "CERTIFICATE" in labels[0]:
        raise InvalidJwk(
            "The PEM holds a certificate, not a public key.",
            next_step="Extract the key: openssl x509 -in cert.pem -pubkey -noout",
        )
    if labels[0] not in ("PUBLIC KEY", "RSA PUBLIC KEY"):
        raise InvalidJwk(f"A PEM block labelled {labels[0]!r} is not a public key.")
    try:
        key = serialization.load_pem_public_key(pem.encode("utf-8"))
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidJwk("The PEM block does not hold a readable public key.") from None
    return public_jwk(key)


def check_public_jwk(jwk: Mapping[str, object], alg: Algorithm) -> dict[str, str]:
    """The validated parameters (`kty` first) of a public JWK that is to verify `alg`; other members are dropped.

    Raises InvalidJwk for private members, a kty or crv that is not the algorithm's, `use`, `key_ops` or `alg` that
    contradict it, missing, mistyped or non-canonical parameters (RFC 7518 §6.2.1, §6.3.1), points off the curve or of
    small order, and weak RSA keys: modulus outside 2048 to 8192 bits, even or with small factors, exponent below
    3, even or beyond 64 bits, or with the ROCA fingerprint (CVE-2017-15361).
    """
    for name in PRIVATE_MEMBERS:
        if name in jwk:
            raise InvalidJwk(
                f"The JWK holds the private member {name!r}.",
                next_step="Treat the key as compromised: it has been sent. Send the public part of a new one.",
            )
    _check_purpose(jwk, alg)
    parameters = _required(jwk)
    if parameters["kty"] != alg.kty:
        raise InvalidJwk(f"{alg.name} needs kty {alg.kty}, not {parameters['kty']}.")
    if alg.crv is not None and parameters["crv"] != alg.crv:
        raise InvalidJwk(f"{alg.name} needs crv {alg.crv}, not {_shown(parameters['crv'])}.")
    if alg.is_post_quantum and parameters["alg"] != alg.name:
        raise InvalidJwk(f"{alg.name} needs a key of its own parameter set, not {_shown(parameters['alg'])}.")
    key = public_key(parameters)
    if isinstance(key, rsa.RSAPublicKey):
        _check_rsa_strength(key.public_numbers())
    return parameters


def ignored_members(jwk: Mapping[str, object]) -> list[str]:
    """The members of a public JWK that are neither checked nor published, such as x5c, x5t and x5u."""
    return [name for name in jwk if name not in _TAKEN and name not in JWK_PARAMETERS.get(str(jwk.get("kty")), ())]


_TAKEN: Final = frozenset({"kty", "use", "key_ops", "alg", "kid"})


_REPAIR: Final = (
    "Repair the encoding, and send the result: kms-jwks external-key repair --jwk @key.json > repaired.json "
    "(it takes a JWK or a JWKS, and does not change the key)."
)


def _check_purpose(jwk: Mapping[str, object], alg: Algorithm) -> None:
    if "use" in jwk and jwk["use"] not in _SIGNING_USES:
        raise InvalidJwk(
            f"The JWK's use is {_shown(jwk['use'])}, not 'sig'.",
            next_step="Leave this key out: it is not one that verifies the signatures of tokens.",
        )
    if "alg" in jwk and jwk["alg"] != alg.name:
        raise InvalidJwk(f"The JWK's alg is {_shown(jwk['alg'])}, not {alg.name!r}.")
    if "key_ops" in jwk:
        operations = jwk["key_ops"]
        if not isinstance(operations, list) or not all(isinstance(name, str) for name in operations):
            raise InvalidJwk("The JWK's key_ops is not an array of strings.")
        if "verify" not in operations or len(set(operations)) != len(operations):
            raise InvalidJwk("The JWK's key_ops does not hold 'verify', or holds an operation twice.")


def _required(jwk: Mapping[str, object]) -> dict[str, str]:
    """`kty` and the parameters it requires, as strings."""
    kty = jwk.get("kty")
    if kty == "oct":
        raise InvalidJwk("A symmetric key (kty oct) is not a public key.")
    names = JWK_PARAMETERS.get(kty) if isinstance(kty, str) else None
    if names is None or not isinstance(kty, str):
        raise InvalidJwk(f"The JWK's kty is {_shown(kty)}, not one of {', '.join(JWK_PARAMETERS)}.")
    parameters = {"kty": kty}
    for name in names:
        value = jwk.get(name)
        if not isinstance(value, str):
            raise InvalidJwk(f"The JWK's {name} is {'missing' if name not in jwk else 'not a string'}.")
        parameters[name] = value
    return parameters


def _octets(jwk: Mapping[str, str], name: str) -> bytes:
    try:
        return b64u_decode(jwk[name])
    except ValueError as error:
        raise InvalidJwk(f"The JWK's {name}: {error}.", next_step=_repair_step(jwk, name)) from None


def _repair_step(jwk: Mapping[str, str], name: str) -> str | None:
    """The next step for a parameter that is not canonical: the command that repairs it, where one can."""
    repaired = str(repair_jwk(jwk)[name])
    size = COORDINATES.get(jwk.get("crv", ""))
    helps = repaired not in ("", jwk[name]) and (size is None or len(repaired) == len(b64u_encode(bytes(size))))
    return _REPAIR if helps else None


def _coordinate(jwk: Mapping[str, str], name: str) -> bytes:
    octets, size = _octets(jwk, name), COORDINATES[jwk["crv"]]
    if len(octets) != size:
        raise InvalidJwk(
            f"The JWK's {name} has {len(octets)} octets; {jwk['crv']} needs exactly {size}.",
            next_step=_repair_step(jwk, name),
        )
    return octets


def _unsigned(jwk: Mapping[str, str], name: str) -> int:
    """A Base64urlUInt: no leading zero octet (RFC 7518 §2)."""
    octets = _octets(jwk, name)
    if not octets or octets[0] == 0:
        raise InvalidJwk(
            f"The JWK's {name} is empty, zero, or begins with a zero octet.", next_step=_repair_step(jwk, name)
        )
    return int.from_bytes(octets, "big")


def _encode_unsigned(value: int) -> str:
    return b64u_encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def _rsa_key(n: int, e: int) -> rsa.RSAPublicKey:
    if n.bit_length() > RSA_MODULUS_BITS[1]:
        raise InvalidJwk(f"The modulus has {n.bit_length()} bits, more than {RSA_MODULUS_BITS[1]}.")
    if e < 3 or e % 2 == 0 or e.bit_length() > RSA_EXPONENT_BITS:
        raise InvalidJwk(f"The exponent is even, below 3, or longer than {RSA_EXPONENT_BITS} bits.")
    try:
        return rsa.RSAPublicNumbers(e, n).public_key()
    except ValueError:
        raise InvalidJwk("The modulus and exponent do not form an RSA public key.") from None


def _ec_key(jwk: Mapping[str, str]) -> ec.EllipticCurvePublicKey:
    curve = EC_CURVES.get(jwk["crv"])
    if curve is None:
        raise InvalidJwk(f"The JWK's crv is {_shown(jwk['crv'])}, not one of {', '.join(EC_CURVES)}.")
    x, y = (int.from_bytes(_coordinate(jwk, name), "big") for name in ("x", "y"))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise InvalidJwk(f"The point is not on {jwk['crv']}.") from None


_ED25519_P: Final = 2**255 - 19
_ED25519_D: Final = -121665 * pow(121666, -1, _ED25519_P) % _ED25519_P


def _ed25519_key(jwk: Mapping[str, str]) -> Ed25519PublicKey:
    if jwk["crv"] != "Ed25519":
        raise InvalidJwk(f"The JWK's crv is {_shown(jwk['crv'])}, not Ed25519.")
    octets = _coordinate(jwk, "x")
    # OpenSSL checks the point only when it verifies, and never checks its order: a key of small order would verify
    # forged signatures. 0, ±1 and the roots of d·y⁴ + 2y² = 1 are the y of the eight points of small order.
    y = int.from_bytes(octets, "little") & (1 << 255) - 1
    y2 = y * y % _ED25519_P
    x2 = (y2 - 1) * pow(_ED25519_D * y2 + 1, -1, _ED25519_P) % _ED25519_P
    on_curve = y < _ED25519_P and pow(x2, (_ED25519_P - 1) // 2, _ED25519_P) in (0, 1)
    if not on_curve:
        raise InvalidJwk("The point is not on Ed25519, or not encoded canonically (RFC 8032 §5.1.3).")
    if y2 in (0, 1) or (_ED25519_D * y2 * y2 + 2 * y2 - 1) % _ED25519_P == 0:
        raise InvalidJwk("The point is of small order.")
    return Ed25519PublicKey.from_public_bytes(octets)


def _ml_dsa_key(jwk: Mapping[str, str]) -> MlDsaPublicKey:
    """The key object of an AKP JWK; any octets of the right length are a key (FIPS 204 §4, algorithm 23)."""
    kind = _ML_DSA.get(jwk["alg"])
    if kind is None:
        raise InvalidJwk(f"The JWK's alg is {_shown(jwk['alg'])}, not one of {', '.join(_ML_DSA)}.")
    octets, size = _octets(jwk, "pub"), ALGORITHMS[jwk["alg"]].public_bytes
    if len(octets) != size:
        raise InvalidJwk(f"The JWK's pub has {len(octets)} octets; {jwk['alg']} needs exactly {size}.")
    return kind.from_public_bytes(octets)


# --- weak RSA keys ----------------------------------------------------------------------------------------------------


def _primes_below(limit: int) -> tuple[int, ...]:
    return tuple(n for n in range(2, limit) if all(n % d for d in range(2, math.isqrt(n) + 1)))


_SMALL_FACTORS: Final = math.prod(_primes_below(752))
"""The product of the primes that SP 800-56B §6.4.2.2 tests a modulus against."""


def _powers_of_65537(prime: int) -> frozenset[int]:
    powers, value = set(), 1
    while value not in powers:
        powers.add(value)
        value = value * 65537 % prime
    return frozenset(powers)


_ROCA_RESIDUES: Final = tuple((prime, _powers_of_65537(prime)) for prime in _primes_below(168) if prime > 2)


def _check_rsa_strength(numbers: rsa.RSAPublicNumbers) -> None:
    bits = numbers.n.bit_length()
    if bits < RSA_MODULUS_BITS[0]:
        raise InvalidJwk(f"The modulus has {bits} bits, fewer than {RSA_MODULUS_BITS[0]}.")
    if math.gcd(numbers.n, _SMALL_FACTORS) != 1:
        raise InvalidJwk("The modulus has a small factor.")
    # A weak modulus is a power of 65537 modulo each of these primes; a sound one is with a probability of 2^-27.
    if all(numbers.n % prime in residues for prime, residues in _ROCA_RESIDUES):
        raise InvalidJwk("The modulus has the ROCA fingerprint (CVE-2017-15361): its private key can be computed.")


# --- JWKS documents ------------------------------------------------------------------------------------------------


def published_jwk(public_jwk: Mapping[str, str], *, alg: str, kid: str, x5c: Sequence[str] = ()) -> dict[str, object]:
    """A JWK as a JWKS publishes it: exactly kty, use, alg, kid, the parameters, and x5c where there is a chain."""
    jwk: dict[str, object] = {"kty": public_jwk["kty"], "use": "sig", "alg": alg, "kid": kid}
    jwk.update((name, public_jwk[name]) for name in JWK_PARAMETERS[public_jwk["kty"]])
    if x5c:
        jwk["x5c"] = list(x5c)
    return jwk


def jwks_document(jwks: Sequence[Mapping[str, object]]) -> bytes:
    """The JWKS as compact JSON, keys in the order given (RFC 7517 §5)."""
    return strictjson.dumps({"keys": [dict(jwk) for jwk in jwks]})


# --- signatures -------------------------------------------------------------------------------------------------------

_VERIFIERS: Final = MappingProxyType({model.name: model for model in JWS_ALGORITHMS})
_HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = MappingProxyType(
    {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
)


def der_to_raw(alg: Algorithm, signature: bytes) -> bytes:
    """An ECDSA signature from DER to r‖s, each of the coordinate's length (RFC 7518 §3.4). Raises ValueError."""
    r, s = decode_dss_signature(signature)
    try:
        return r.to_bytes(alg.coordinate, "big") + s.to_bytes(alg.coordinate, "big")
    except OverflowError:
        raise ValueError(f"r or s does not fit {alg.name}") from None


def raw_to_der(alg: Algorithm, signature: bytes) -> bytes:
    """An ECDSA signature from r‖s to DER. Raises ValueError when its length is not the algorithm's."""
    size = alg.coordinate
    if alg.family is not Family.ECDSA or len(signature) != 2 * size:
        raise ValueError(f"{len(signature)} bytes are not an r‖s of {alg.name}")
    return encode_dss_signature(int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big"))


class Verifier:
    """One public key as a verifier of one algorithm, for repeated use. Immutable, thread-safe.

    Raises InvalidJwk where the JWK is not a key of `alg`.
    """

    __slots__ = ("_alg", "_key", "_wrapped")

    def __init__(self, alg: Algorithm, jwk: Mapping[str, object]) -> None:
        key = public_key(jwk)
        if jwk["kty"] != alg.kty or (alg.crv is not None and jwk["crv"] != alg.crv):
            raise InvalidJwk(f"The JWK is not a key of {alg.name}.")
        if alg.is_post_quantum and jwk["alg"] != alg.name:
            raise InvalidJwk(f"The JWK is not a key of {alg.name}.")
        self._alg = alg
        self._key = key
        self._wrapped: RSAKey | ECKey | OKPKey | None = None
        if isinstance(key, rsa.RSAPublicKey):
            self._wrapped = RSAKey.import_key(key)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            self._wrapped = ECKey.import_key(key)
        elif isinstance(key, Ed25519PublicKey):
            self._wrapped = OKPKey.import_key(key)

    def verify(self, signing_input: bytes, signature: bytes) -> None:
        """Return when `signature` (JOSE form) is the key's over `signing_input`; raise TokenSignatureInvalid otherwise.

        RSA signatures are exactly as long as the modulus, ECDSA ones exactly r‖s, PSS salts exactly as long as the hash
        (RFC 7518 §3.5).
        """
        if isinstance(self._key, MlDsaPublicKey):
            try:
                self._key.verify(signature, signing_input)
            except InvalidSignature:
                raise TokenSignatureInvalid from None
        elif not _VERIFIERS[self._alg.name].verify(signing_input, signature, self._wrapped):
            raise TokenSignatureInvalid

    def verify_digest(self, digest: bytes, signature: bytes) -> None:
        """Like `verify`, with the digest that the caller computed.

        Raises TokenSignatureInvalid also for a digest of the wrong length and for an algorithm that signs no digest.
        """
        alg, key = self._alg, self._key
        if alg.hash is None:
            raise TokenSignatureInvalid
        hash_ = _HASHES[alg.hash]
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(raw_to_der(alg, signature), digest, ec.ECDSA(Prehashed(hash_)))
            elif isinstance(key, rsa.RSAPublicKey):
                scheme = (
                    padding.PSS(padding.MGF1(hash_), hash_.digest_size)
                    if alg.family is Family.RSA_PSS
                    else padding.PKCS1v15()
                )
                key.verify(signature, digest, scheme, Prehashed(hash_))
            else:
                raise TokenSignatureInvalid
        except (InvalidSignature, ValueError):
            raise TokenSignatureInvalid from None


def verify_signature(alg: Algorithm, jwk: Mapping[str, object], signing_input: bytes, signature: bytes) -> None:
    """`Verifier(alg, jwk).verify(…)`, for a key that is used once. `alg` is the key's own, never that of the token.

    Raises TokenSignatureInvalid, and InvalidJwk where the JWK is not a key of this algorithm.
    """
    Verifier(alg, jwk).verify(signing_input, signature)


def _shown(value: object) -> str:
    """A value for a message: cut to 32 characters, and only when it is text."""
    if not isinstance(value, str):
        return "missing" if value is None else "not a string"
    return repr(value if len(value) <= 32 else value[:32] + "…")
