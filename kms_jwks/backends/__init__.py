"""The explicit table of backends: one row per kind of module that comes with the package. Others are third parties'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kms_jwks import errors
from kms_jwks.backends.base import Backend
from kms_jwks.backends.third_party import make_third_party


def _pkcs11(name: str, options: Any, state_dir: Path, management: bool) -> Backend:
    from kms_jwks.backends.pkcs11 import PinSource, Pkcs11Backend, Pkcs11Options
    from kms_jwks.backends.pkcs11.uri import parse

    source = options.management if management and options.management is not None else options
    if source.pin_file is not None:
        pin = PinSource.from_file(source.pin_file)
    elif source.pin_env is not None:
        pin = PinSource.from_env(source.pin_env)
    else:
        pin = _pin_of_standard_input()
    try:
        checked = Pkcs11Options(
            module=options.module,
            token_label=options.token_label,
            token_serial=options.token_serial,
            slot=options.slot,
            uri=None if options.uri is None else parse(options.uri),
            expected_serial=options.expected_serial,
            pin=pin,
            sessions=options.sessions,
            locking=options.locking,
            sign_in_place=options.sign_in_place,
            lock_dir=state_dir / "pkcs11",
            environment=options.environment,
        )
    except ValueError as error:
        # What contradicts itself only once the URI is read.
        raise errors.ConfigurationError(f"backends.{name}: {error}.") from None
    return Pkcs11Backend(name, checked)


def _aws_kms(name: str, options: Any, state_dir: Path, management: bool) -> Backend:
    from kms_jwks.backends.aws_kms import AwsKmsBackend

    return AwsKmsBackend(name, options.for_custodian() if management else options)


@cache
def _pin_of_standard_input() -> Any:
    """Read once per process tree: a child of a fork finds it here."""
    from kms_jwks.backends.pkcs11 import PinSource

    return PinSource.from_stdin()


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
