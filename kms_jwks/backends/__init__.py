"""The explicit table of backends: one row per kind of module that comes with the package. Others are third parties'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kms_jwks import errors
from kms_jwks.backends.base import Backend
from kms_jwks.backends.third_party import make_third_party


def _pkcs11(name: str, options: Any, state_dir: Path, management: bool) -> Backend:
    from kms_jwks.backends.pkcs11 import Pkcs11Backend

    own = options.for_custodian() if management else options
    try:
        return Pkcs11Backend(name, own, lock_dir=state_dir / "pkcs11")
    except ValueError as error:
        # The options contradict each other, which shows once the URI is parsed.
        raise errors.ConfigurationError(f"backends.{name}: {error}.") from None


def _aws_kms(name: str, options: Any, state_dir: Path, management: bool) -> Backend:
    try:
        from kms_jwks.backends.aws_kms import AwsKmsBackend
    except ModuleNotFoundError as error:
        raise errors.ConfigurationError(
            f"backends.{name}: AWS KMS needs the Python package {error.name!r}, which is not installed.",
            next_step="Install kms-jwks with its extra: pip install 'kms-jwks[aws]'.",
        ) from error
    return AwsKmsBackend(name, options.for_custodian() if management else options)


BACKENDS: Mapping[str, Callable[[str, Any, Path, bool], Backend]] = {
    "pkcs11": _pkcs11,
    "aws-kms": _aws_kms,
}
"""The configuration's `type` → how its backend is made of (name, options, state_dir, management). Opens nothing."""


def make_backend(name: str, options: Any, state_dir: Path, *, management: bool = False) -> Backend:
    """The backend that a configuration section describes; with `management`, for the custodian: by its own credentials.

    Raises ConfigurationError for a type that nobody offers and for a third party's that cannot be used.
    """
    return BACKENDS.get(options.type, make_third_party)(name, options, state_dir, management)
