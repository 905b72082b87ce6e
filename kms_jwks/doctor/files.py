"""Checks of files and folders: whether they exist, and whether other users can access them."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kms_jwks.config import Pkcs11Options, Settings
from kms_jwks.doctor.checks import Check, State
from kms_jwks.errors import ConfigurationError

_EXPOSED = ": every user gets at it"


def registry_file(settings: Settings) -> Path | None:
    """The file of an SQLite registry; None for a database server."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", settings.database_url)
    return Path(match[1]) if match else None


def files(settings: Settings) -> Iterator[Check]:
    """Check the public URL, the state directory, the registry, the TLS key, and each backend's PIN file and module."""
    yield from _public_url(settings)
    yield from _folder("state directory", settings.state_dir)
    file = registry_file(settings)
    if file is not None:
        for path in _registry_files(file):
            yield _private("registry file", path)
    for name, path in _secrets(settings):
        yield _private(name, path)
    yield from _shared_folders(settings)
    if settings.routes == "public":
        return
    locks = settings.state_dir / "pkcs11"
    if locks.exists():
        yield from _folder("lock directory", locks)
    for name, options in settings.backends.items():
        if not isinstance(options, Pkcs11Options):
            continue
        if not options.module.is_file():
            yield Check(
                f"module file of {name}",
                State.FAILURE,
                f"{options.module} is no file",
                f"Install the module, or correct backends.{name}.module.",
            )


def refuse_exposed(settings: Settings) -> None:
    """Raise ConfigurationError for what `serve` does not start on.

    Every user could read or write a PIN file, the TLS key or the registry's file, or replace one of them, or write to
    the state directory.
    """
    file = registry_file(settings)
    named = [("registry file", path) for path in _registry_files(file)] if file is not None else []
    found = [
        check
        for check in (*(_private(name, path) for name, path in (*named, *_secrets(settings)) if path.is_file()),)
        if check.state is State.FAILURE and check.detail.endswith(_EXPOSED)
    ]
    found += _shared_folders(settings)
    if found:
        raise ConfigurationError(
            "; ".join(f"{check.name}: {check.detail}" for check in found) + ".",
            next_step="; ".join(dict.fromkeys(check.next_step for check in found)),
        )


def _registry_files(file: Path) -> list[Path]:
    """The files of an SQLite registry that are there."""
    files = (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm"))
    return [path for path in files if path.exists()]


def _secrets(settings: Settings) -> Iterator[tuple[str, Path]]:
    """The files that hold a secret of this node."""
    if settings.tls_key is not None:
        yield "TLS key", settings.tls_key
    for name, options in settings.backends.items() if settings.routes != "public" else ():
        if not isinstance(options, Pkcs11Options):
            continue
        if options.management is not None and options.management.pin_file is not None:
            yield f"custodian's PIN file of {name}", options.management.pin_file
        if options.pin_file is not None:
            yield f"PIN file of {name}", options.pin_file


def _shared_folders(settings: Settings) -> Iterator[Check]:
    """The folders in which every user may replace a file of this node, or the state directory itself.

    In a folder with the sticky bit only the owner of a file may.
    """
    file = registry_file(settings)
    inside = [("registry file", file)] if file is not None else []
    inside += [*_secrets(settings), ("state directory", settings.state_dir)]
    seen = set()
    for name, path in inside:
        folder = path.absolute().parent
        try:
            mode = folder.stat().st_mode
        except OSError:
            continue
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX and folder not in seen:
            seen.add(folder)
            yield Check(
                f"folder of the {name}",
                State.FAILURE,
                f"every user may replace what is in {folder}",
                f"chmod o-w {folder}",
            )


def _public_url(settings: Settings) -> Iterator[Check]:
    """Whether verifiers reach the service over TLS, as far as this node's settings say."""
    url = urlsplit(settings.public_url)
    open_to_others = [address for address in settings.bind if not _is_local(address)]
    if url.scheme == "http" and (open_to_others or not _is_local(f"{url.hostname}:80")):
        where = f", and this node listens on {', '.join(open_to_others)}" if open_to_others else ""
        yield Check(
            "public URL",
            State.WARNING,
            f"{settings.public_url} is not encrypted{where}: on the way a JWKS can be replaced and a token read",
            "Use an https URL: set tls_cert and tls_key, or put a proxy with TLS in front.",
        )
    behind_proxy = settings.forwarded_allow_ips or all(address.startswith("unix:") for address in settings.bind)
    if url.scheme == "https" and settings.tls_cert is None and not behind_proxy:
        yield Check(
            "public URL",
            State.WARNING,
            f"{settings.public_url} is https, and this node has neither a certificate nor a proxy that it trusts",
            "Set tls_cert and tls_key; or name the proxy with TLS in front in forwarded_allow_ips.",
        )


def _is_local(address: str) -> bool:
    """Whether an address to listen on, or a host with a port, is of this machine alone."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
        return Check(name, State.FAILURE, f"{shown}{_EXPOSED}", f"chmod {right:o} {path}")
    if mode & 0o070:
        return Check(name, State.WARNING, f"{shown}: its group gets at it", f"chmod {right:o} {path}")
    if facts.st_uid not in (os.geteuid(), 0):
        return Check(name, State.WARNING, f"{path} belongs to another user", f"chown {_me()} {path}")
    return Check(name, State.OK, shown)


def _me() -> str:
    return str(os.geteuid())
