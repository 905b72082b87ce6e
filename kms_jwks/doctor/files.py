"""Checks of files and folders: whether they exist, and whether other users can access them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kms_jwks.config import Pkcs11Options, Settings
from kms_jwks.doctor.checks import Check, State


def registry_file(settings: Settings) -> Path | None:
    """The file of an SQLite registry; None for a database server."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", settings.database_url)
    return Path(match[1]) if match else None


def files(settings: Settings) -> Iterator[Check]:
    """Check the state directory, the registry, the TLS key, and for each backend its PIN file and its module."""
    yield from _folder("state directory", settings.state_dir)
    file = registry_file(settings)
    if file is not None:
        for path in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
            if path.exists():
                yield _private("registry file", path)
    if settings.tls_key is not None:
        yield _private("TLS key", settings.tls_key)
    if settings.routes == "public":
        return
    locks = settings.state_dir / "pkcs11"
    if locks.exists():
        yield from _folder("lock directory", locks)
    for name, options in settings.backends.items():
        if not isinstance(options, Pkcs11Options):
            continue
        if options.management is not None and options.management.pin_file is not None:
            yield _private(f"custodian's PIN file of {name}", options.management.pin_file)
        if options.pin_file is not None:
            yield _private(f"PIN file of {name}", options.pin_file)
        if not options.module.is_file():
            yield Check(
                f"module file of {name}",
                State.FAILURE,
                f"{options.module} is no file",
                f"Install the module, or correct backends.{name}.module.",
            )


def _folder(name: str, path: Path) -> Iterator[Check]:
    yield (check := _private(name, path))
    if check.state is not State.FAILURE and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Check(name, State.FAILURE, f"this user may not write to {path}", f"chown {_me()} {path}")


def _private(name: str, path: Path) -> Check:
    """Whether users other than the owner can access a file or folder."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return Check(name, State.FAILURE, f"{path} is not there", "Run `kms-jwks init`, or correct the settings.")
    except OSError as error:
        return Check(name, State.FAILURE, f"{path}: {error.strerror}", f"Let this user ({_me()}) read it.")
    mode = stat.S_IMODE(facts.st_mode)
    right = 0o700 if stat.S_ISDIR(facts.st_mode) else 0o600
    shown = f"{path} has mode {mode:04o}"
    if mode & 0o007:
        return Check(name, State.FAILURE, f"{shown}: every user gets at it", f"chmod {right:o} {path}")
    if mode & 0o070:
        return Check(name, State.WARNING, f"{shown}: its group gets at it", f"chmod {right:o} {path}")
    if facts.st_uid not in (os.geteuid(), 0):
        return Check(name, State.WARNING, f"{path} belongs to another user", f"chown {_me()} {path}")
    return Check(name, State.OK, shown)


def _me() -> str:
    return str(os.geteuid())
