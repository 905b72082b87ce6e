"""Keys for JWT libraries that take cryptography's private keys, whose private half stays in the module.

`remote_key(client, key_set, key)` reads the active version once and pins its kid. `sign()` sends the JWS signing input
to the service, which holds header and claims to the key's profile and signs exactly these bytes. After a rotation the
pinned kid is refused (KidNotActive, once its handover is over): make a new key and encode again.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from jwt import PyJWK

from kms_jwks.client import Client

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview[int]


class _Pinned:
    """Where the private half is, and under which kid."""

    def __init__(self, client: Client, key_set: str, key: str, kid: str, public: Any) -> None:
        self.kid = kid
        self._client, self._key_set, self._key, self._public = client, key_set, key, public

    def _signature(self, data: Buffer) -> bytes:
        """In JOSE form."""
        text = self._client.sign_input(self._key_set, self._key, bytes(data).decode("ascii"), self.kid).signature
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

    def public_key(self) -> Any:
        return self._public

    def _stays(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the private key is in the module and stays there")

    private_bytes = private_bytes_raw = private_numbers = decrypt = exchange = _stays

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self


class RemoteRSA(_Pinned, rsa.RSAPrivateKey):
    """For RS256 … PS512: padding and hash are the service's business, and the signing input says which."""

    @property
    def key_size(self) -> int:
        """Bits."""
        size: int = self._public.key_size
        return size

    def sign(self, data: Buffer, padding: object, algorithm: object) -> bytes:
        return self._signature(data)


class RemoteEC(_Pinned, ec.EllipticCurvePrivateKey):
    """For ES256 … ES256K. cryptography's signatures are DER (RFC 3279 §2.2.3), JOSE's are r‖s."""

    @property
    def curve(self) -> ec.EllipticCurve:
        found: ec.EllipticCurve = self._public.curve
        return found

    @property
    def key_size(self) -> int:
        """Bits."""
        size: int = self._public.key_size
        return size

    def sign(self, data: Buffer, signature_algorithm: object) -> bytes:
        both = self._signature(data)
        half = len(both) // 2
        return encode_dss_signature(int.from_bytes(both[:half], "big"), int.from_bytes(both[half:], "big"))


class RemoteEd25519(_Pinned, ed25519.Ed25519PrivateKey):
    """For EdDSA."""

    def sign(self, data: Buffer) -> bytes:
        return self._signature(data)


_BY_KTY: dict[str, type[RemoteRSA | RemoteEC | RemoteEd25519]] = {
    "RSA": RemoteRSA,
    "EC": RemoteEC,
    "OKP": RemoteEd25519,
}


def remote_key(client: Client, key_set: str, key: str) -> RemoteRSA | RemoteEC | RemoteEd25519:
    """The key's active version as a private key of cryptography's."""
    active = client.active(key_set, key)
    public = PyJWK(active.public_jwk, algorithm=active.alg).key
    return _BY_KTY[active.public_jwk["kty"]](client, key_set, key, active.kid, public)
