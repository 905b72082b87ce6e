"""The first rows of a registry: an administrator, and on request a key set with one key and a client that signs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kms_jwks import authn, errors, wire
from kms_jwks.access import Role
from kms_jwks.model import DAY, DEFAULT_API_TOKEN_LIFETIME, MAX_NAME, ApiToken, Client, Id
from kms_jwks.service.clients import add_client, add_grant, add_token
from kms_jwks.service.control import Control
from kms_jwks.service.definitions import add_key_set
from kms_jwks.store import WriteTx
from kms_jwks.times import format_instant, later

ADMIN = "admin-bootstrap"
"""The client whose token `initialise` writes."""
_KEY = "default"
"""The key of the key set that `initialise` creates."""


def initialise(
    control: Control,
    *,
    key_set: str | None,
    alg: str,
    admin_token_file: Path | None,
    signer_token_file: Path | None,
) -> list[str]:
    """Bring the registry up to date and create what is missing; leave existing objects as they are.

    Works on the node itself and without an API token: write access to the database is all the right it needs. The
    custodian makes the key pair once the service runs. Token files are written with mode 0600. Returns a line for each
    object created or reused.
    """
    store = control.store
    store.upgrade()
    report = [f"registry: {store.url}"]
    with store.write() as tx:
        if admin_token_file is not None:
            report += _ensure_token_file(tx, ADMIN, Role.ADMIN, None, None, admin_token_file)
        if key_set is not None:
            found = tx.key_set(key_set)
            if found is None:
                request = wire.KeySetCreate(name=key_set, keys=[wire.KeyCreate(name=_KEY, alg=alg)])
                found, _ = add_key_set(tx, control, request)
                report.append(f"key set {key_set!r} with key {_KEY!r} ({alg}): created")
            else:
                report.append(f"key set {key_set!r}: reused (issuer {found.issuer})")
            key = tx.key(found.id, _KEY)
            if signer_token_file is not None and (key is None or key.retired_at is not None):
                # A grant on the whole set would reach further than this command says.
                ended = "has no key" if key is None else "has retired its key"
                report.append(f"no token for a signer: key set {key_set!r} {ended} {_KEY!r}")
            elif signer_token_file is not None and key is not None:
                name = f"signer-{key_set}"
                if len(name) > MAX_NAME:
                    # Cut off, the names of two key sets could lead to one client that signs for both.
                    name = f"signer-{found.id}"
                report += _ensure_token_file(tx, name, Role.SIGNER, found.id, key.id, signer_token_file)
    return report


def _ensure_token_file(
    tx: WriteTx, name: str, role: Role, key_set: Id | None, key: Id | None, file: Path
) -> Iterator[str]:
    """Make sure that `file` holds a token of client `name` that is valid for at least one more day.

    Yields what was done, and how to revoke the client's other tokens: a new file does not end them.
    """
    owner = _find_or_add_client(tx, name, (role.value, key_set, key))
    name = owner.name
    add_grant(tx, owner, role, key_set, key)
    now = tx.now()
    others = [t for t in tx.tokens(owner.id) if t.revoked_at is None and t.expires_at > now]
    found = _valid_token(tx, owner, file)
    if found is not None:
        yield f"client {name!r} ({role.value}): token in {file} reused, valid until {format_instant(found.expires_at)}"
        if found.ends_soon(now):
            yield f"  It ends soon. A new one: kms-jwks client token rotate {name} {found.id} --output {file}"
        others.remove(found)
    else:
        made, row = add_token(tx, owner, DEFAULT_API_TOKEN_LIFETIME)
        _write_secret(file, made.token)
        end = format_instant(row.expires_at)
        yield f"client {name!r} ({role.value}): new token in {file}, valid until {end}"
    for token in others:
        yield f"  Another token of {name!r} still works, until {format_instant(token.expires_at)}."
        yield f"  To revoke it: kms-jwks client token revoke {name} {token.id}"


def _find_or_add_client(tx: WriteTx, name: str, role: tuple[str, Id | None, Id | None]) -> Client:
    """The client `name`; where that was deleted, the first of `name-2`, `name-3`, … that is free or has the role.

    `role` is the role and its scope, by the ids of key set and key.

    A deleted client's name stays taken, and `init` must stay a way back in when every other token has ended.
    """
    found = tx.client(name)
    number = 1
    while found is None:
        try:
            return add_client(tx, name if number == 1 else f"{name[: MAX_NAME - 4]}-{number}")
        except errors.NameTaken:
            number += 1
            other = tx.client(f"{name[: MAX_NAME - 4]}-{number}")
            if other is not None and any((g.role, g.key_set_id, g.key_id) == role for g in tx.grants(other.id)):
                found = other
    return found


def _valid_token(tx: WriteTx, owner: Client, file: Path) -> ApiToken | None:
    """The token that `file` holds, if it is the owner's and valid for at least one more day."""
    try:
        sha256 = authn.parse(file.read_text().strip())
    except (OSError, errors.CredentialsMalformed, UnicodeDecodeError):
        return None
    row = tx.token_by_sha256(sha256)
    tomorrow = later(tx.now(), DAY)
    good = row is not None and row.client_id == owner.id and row.revoked_at is None and row.expires_at > tomorrow
    return row if good else None


def _write_secret(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
