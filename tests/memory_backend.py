"""A backend in memory that really signs, for tests of what stands above backends. Never part of the package."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa, utils

from kms_jwks import errors, jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm, Family
from kms_jwks.backends.base import Digest, Evidence, GeneratedKey, Health, KeyRef, Message, PublicJwk, StoredKey

_CURVES: dict[str, Callable[[], ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1,
    "P-384": ec.SECP384R1,
    "P-521": ec.SECP521R1,
    "secp256k1": ec.SECP256K1,
}
_HASHES: dict[str, Callable[[], hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
MlDsaKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | MlDsaKey
_ML_DSA: dict[str, type[MlDsaKey]] = {
    "ML-DSA-44": mldsa.MLDSA44PrivateKey,
    "ML-DSA-65": mldsa.MLDSA65PrivateKey,
    "ML-DSA-87": mldsa.MLDSA87PrivateKey,
}


class MemoryBackend:
    """`fail` is raised by the next calls while it is set; `before` is called with the name of each call; `spoil` makes
    of each signature what is given out.

    Of the keys whose ids are in `imported`, `extractable`, `versatile` or `halved` (no public half) the evidence is
    weak.
    With `puts_off` (seconds) it keeps a calendar of destructions as some modules do, and destroys nothing yet.
    """

    kind = "memory"

    def __init__(
        self,
        name: str = "memory",
        *,
        sign_in_place: bool = True,
        keys: dict[str, tuple[str, PrivateKey]] | None = None,
    ) -> None:
        self.name = name
        self.sign_in_place = sign_in_place
        self.recovered_at = 0.0
        self.distrusted: list[KeyRef] = []
        self.keys: dict[str, tuple[str, PrivateKey]] = {} if keys is None else keys
        self.fail: errors.BackendError | None = None
        self.imported: set[str] = set()
        self.extractable: set[str] = set()
        self.versatile: set[str] = set()
        self.halved: set[str] = set()
        self.offered = frozenset(ALGORITHMS)
        self.before: Callable[[str], None] = lambda _: None
        self.spoil: Callable[[bytes], bytes] = lambda signature: signature
        self.puts_off = 0
        self.told: dict[str, int] = {}
        """The days each key was scheduled to be destroyed in, by the key's id; only with `puts_off`."""
        self._lock = threading.Lock()

    def _enter(self, call: str) -> None:
        self.recovered_at = self.recovered_at or time.monotonic()
        self.before(call)
        if self.fail is not None:
            raise self.fail

    def _key(self, ref: KeyRef) -> PrivateKey:
        if not {"id", "label"} <= ref.as_dict().keys():
            raise errors.BackendRefused("The reference is none of a key in memory.")
        try:
            return self.keys[ref["id"]][1]
        except KeyError:
            raise errors.BackendKeyNotFound from None

    def bind(self, ref: KeyRef) -> None:
        return None

    def capabilities(self) -> frozenset[str]:
        self._enter("capabilities")
        return self.offered

    def generate(
        self, label: str, alg: Algorithm, *, rsa_bits: int | None = None, purpose: Mapping[str, str] | None = None
    ) -> GeneratedKey:
        self._enter("generate")
        if not label.isascii() or not label.isprintable() or not 0 < len(label) <= 40:
            raise errors.BackendRefused("A key's label is 1 to 40 printable ASCII characters.")
        if alg.name not in self.offered or (rsa_bits or 2048) not in (alg.rsa_bits or (2048,)):
            raise errors.UnsupportedAlgorithm
        if any(held == label for held, _ in self.keys.values()):
            raise errors.KeyExists
        key: PrivateKey
        if alg.is_rsa:
            key = rsa.generate_private_key(65537, rsa_bits or 2048)
        elif alg.family is Family.EDDSA:
            key = ed25519.Ed25519PrivateKey.generate()
        elif alg.family is Family.ML_DSA:
            key = _ML_DSA[alg.name].generate()
        else:
            assert alg.crv is not None
            key = ec.generate_private_key(_CURVES[alg.crv]())
        ref = KeyRef.of(id=secrets.token_hex(8), label=label)
        with self._lock:
            self.keys[ref["id"]] = (label, key)
        self.before("generated")
        return GeneratedKey(ref, self.public_key(ref))

    def adopt(self, locator: str, public_jwk: PublicJwk | None = None) -> GeneratedKey:
        self._enter("adopt")
        found = [held for held, (label, _) in self.keys.items() if locator in (label, f"id={held}")]
        if not found:
            raise errors.BackendKeyNotFound
        if len(found) > 1:
            raise errors.BackendRefused("Several keys fit.")
        ref = KeyRef.of(id=found[0], label=self.keys[found[0]][0])
        if found[0] in self.halved and public_jwk is not None:
            return GeneratedKey(KeyRef.of(**ref.as_dict(), public=json.dumps(dict(public_jwk))), public_jwk)
        held = self.public_key(ref)
        if public_jwk is not None and dict(public_jwk) != dict(held):
            raise errors.BackendRefused("The public key that was given is another one.")
        return GeneratedKey(ref, held)

    def public_key(self, ref: KeyRef) -> PublicJwk:
        self._enter("public_key")
        key = self._key(ref)
        if ref["id"] in self.halved:
            if "public" not in ref.as_dict():
                raise errors.BackendRefused("The public half is missing.")
            given: dict[str, str] = json.loads(ref["public"])
            return given
        return jose.public_jwk(key.public_key())

    def attributes(self, ref: KeyRef) -> Evidence:
        self._enter("attributes")
        self._key(ref)
        return Evidence(
            {"memory": True},
            generated_in_module=ref["id"] not in self.imported,
            non_extractable=ref["id"] not in self.extractable,
            sign_only=ref["id"] not in self.versatile,
        )

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        if time.monotonic() >= deadline:
            raise errors.BackendTimeout
        self._enter("sign")
        return self.spoil(self._signature(ref, alg, what))

    def _signature(self, ref: KeyRef, alg: Algorithm, what: Message | Digest) -> bytes:
        key = self._key(ref)
        _check_fits(key, alg, what)
        if isinstance(key, ed25519.Ed25519PrivateKey | MlDsaKey):
            assert isinstance(what, Message)
            return key.sign(what.data)
        digest = what.digest(alg) if isinstance(what, Message) else what.value
        assert alg.hash is not None
        hashed = utils.Prehashed(_HASHES[alg.hash]())
        if isinstance(key, rsa.RSAPrivateKey):
            if alg.family is Family.RSA_PKCS1:
                return key.sign(digest, padding.PKCS1v15(), hashed)
            function = _HASHES[alg.hash]()
            pss = padding.PSS(padding.MGF1(function), function.digest_size)
            return key.sign(digest, pss, hashed)
        r, s = utils.decode_dss_signature(key.sign(digest, ec.ECDSA(hashed)))
        return r.to_bytes(alg.coordinate, "big") + s.to_bytes(alg.coordinate, "big")

    def distrust(self, ref: KeyRef) -> None:
        self.distrusted.append(ref)

    def schedule_destroy(self, ref: KeyRef, days: int) -> bool:
        self._enter("schedule_destroy")
        self._key(ref)
        if self.puts_off:
            self.told[ref["id"]] = days
        return bool(self.puts_off)

    def cancel_destroy(self, ref: KeyRef) -> None:
        self._enter("cancel_destroy")
        self.told.pop(ref["id"], None)

    def destroy(self, ref: KeyRef) -> None:
        self._enter("destroy")
        if self.puts_off and ref["id"] in self.keys:
            raise errors.BackendUnavailable("its waiting period is not over", retry_after=self.puts_off)
        with self._lock:
            self.keys.pop(ref["id"], None)
        self.before("destroyed")

    def list_keys(self, label_prefix: str) -> list[StoredKey]:
        return [
            StoredKey(KeyRef.of(id=held, label=label), label)
            for held, (label, _) in self.keys.items()
            if label.startswith(label_prefix)
        ]

    def ping(self) -> Health:
        self._enter("ping")
        return Health("keys in memory", {"keys": str(len(self.keys))})

    def close(self) -> None:
        return None


def _check_fits(key: PrivateKey, alg: Algorithm, what: Message | Digest) -> None:
    jwk = jose.public_jwk(key.public_key())
    if (jwk["kty"], jwk.get("crv"), jwk.get("alg", alg.name)) != (alg.kty, alg.crv, alg.name):
        raise errors.BackendRefused(f"The key does not sign with {alg.name}.")
    if isinstance(what, Digest) and (alg.hash is None or len(what.value) != len(Message(b"").digest(alg))):
        raise errors.BackendRefused(f"That is no digest for {alg.name}.")
