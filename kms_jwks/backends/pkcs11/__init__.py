"""Keys in a PKCS#11 token: SoftHSM, or any HSM whose vendor ships such a module."""

from kms_jwks.backends.pkcs11.backend import Pkcs11Backend
from kms_jwks.backends.pkcs11.opening import PinSource

__all__ = ["PinSource", "Pkcs11Backend"]
