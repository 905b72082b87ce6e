"""The registry's schema: bring it up to date, or say why this program cannot work with it.

A process that serves, signs or runs the custodian only checks the schema; Alembic is imported where migrations run.
"""

from __future__ import annotations

import base64
import secrets
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, column, insert, inspect, select, table

from kms_jwks import errors
from kms_jwks.model import Instant
from kms_jwks.store import tables as t
from kms_jwks.store.error_map import HOW_TO_CREATE

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
_ALEMBIC_VERSION: Any = table("alembic_version", column("version_num"))
"""Alembic's own table, with one row once a migration has run."""


def needed_revision() -> str:
    """The revision this program was written for."""
    return _revisions()[-1]


def check(connection: Connection) -> None:
    """Raise SchemaMismatch, with both revisions and the next step, unless the schema is the needed one."""
    found, needed = _current_revision(connection), needed_revision()
    if found == needed:
        return
    fields = {"found": found, "needed": needed}
    if found is None:
        raise errors.SchemaMismatch(
            f"The database holds no registry; revision {needed} is needed.",
            fields=fields,
            next_step=HOW_TO_CREATE,
        )
    if found in _revisions():
        raise errors.SchemaMismatch(f"The registry is at revision {found}; {needed} is needed.", fields=fields)
    raise errors.SchemaMismatch(
        f"The registry is at revision {found}, which this program does not know; it needs {needed}.",
        fields=fields,
        next_step="Install the newer program that upgraded the registry, or restore a backup.",
    )


def upgrade(connection: Connection, now: Instant) -> None:
    """Run the missing migrations and write the first rows. Raises SchemaMismatch for a schema of a newer program."""
    from alembic import command

    found = _current_revision(connection)
    if found is not None and found not in _revisions():
        check(connection)
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    _write_first_rows(connection, now)


def _write_first_rows(connection: Connection, now: Instant) -> None:
    if connection.execute(select(t.installation.c.id)).first() is None:
        name = base64.b32encode(secrets.token_bytes(5)).decode().lower()
        connection.execute(insert(t.installation).values(single=1, id=name, created_at=now))
    if connection.execute(select(t.epoch.c.counter)).first() is None:
        first = {"incarnation": str(uuid.uuid4()), "counter": 1, "link": secrets.token_hex(32)}
        connection.execute(insert(t.epoch).values(single=1, **first))
        connection.execute(insert(t.history).values(**first))


def alembic_config() -> Config:
    """Alembic's configuration: where the migrations are."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _revisions() -> list[str]:
    """The revisions, oldest first. A migration's file is named `REVISION_subject.py`, with ascending revisions."""
    return sorted(path.stem.partition("_")[0] for path in (MIGRATIONS / "versions").glob("*.py"))


def _current_revision(connection: Connection) -> str | None:
    """The revision that the database is at; None where no migration has run."""
    if not inspect(connection).has_table(_ALEMBIC_VERSION.name):
        return None
    revision: str | None = connection.scalar(select(_ALEMBIC_VERSION.c.version_num))
    return revision
