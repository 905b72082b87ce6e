"""The registry's schema: bring it up to date, or say why this program cannot work with it."""

from __future__ import annotations

import base64
import secrets
import uuid
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, select

from kms_jwks import errors
from kms_jwks.model import Instant
from kms_jwks.store import tables as t
from kms_jwks.store.failures import HOW_TO_MAKE_ONE


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def needed() -> str:
    """The revision this program was written for."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def check(connection: Connection) -> None:
    """Raise SchemaMismatch, naming both revisions and what mends it, unless the schema is the needed one."""
    found = MigrationContext.configure(connection).get_current_revision()
    wanted = needed()
    if found == wanted:
        return
    fields = {"found": found, "needed": wanted}
    if found is None:
        raise errors.SchemaMismatch(
            f"The database holds no registry; revision {wanted} is needed.",
            fields=fields,
            next_step=HOW_TO_MAKE_ONE,
        )
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found in known:
        raise errors.SchemaMismatch(f"The registry is at revision {found}; {wanted} is needed.", fields=fields)
    raise errors.SchemaMismatch(
        f"The registry is at revision {found}, which this program does not know; it needs {wanted}.",
        fields=fields,
        next_step="Install the newer program that upgraded the registry, or restore a backup.",
    )


def upgrade(connection: Connection, now: Instant) -> None:
    """Run the missing migrations and write the first rows. Raises SchemaMismatch for a schema of a newer program."""
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in {s.revision for s in ScriptDirectory.from_config(_config()).walk_revisions()}:
        check(connection)
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    if connection.execute(select(t.installation.c.id)).first() is None:
        name = base64.b32encode(secrets.token_bytes(5)).decode().lower()
        connection.execute(insert(t.installation).values(single=1, id=name, created_at=now))
    if connection.execute(select(t.epoch.c.counter)).first() is None:
        connection.execute(insert(t.epoch).values(single=1, incarnation=str(uuid.uuid4()), counter=1))
