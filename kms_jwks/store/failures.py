"""The database's errors as the domain's: which conflict a violated constraint means, and what is merely away."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from kms_jwks import errors

# By the constraint's name (PostgreSQL) or its columns (SQLite).
_CONFLICTS: tuple[tuple[tuple[str, ...], type[errors.Conflict]], ...] = (
    (("pk_kids", "kids.kid"), errors.KidTaken),
    (("uq_versions_kid", "versions.kid"), errors.KidTaken),
    (("uq_versions_active", "versions.key_id"), errors.TransitionRefused),
    (("uq_key_sets_name", "key_sets.name"), errors.NameTaken),
    (("uq_key_sets_issuer", "key_sets.issuer"), errors.IssuerTaken),
    (("uq_keys_key_set_id_name", "keys.key_set_id, keys.name"), errors.NameTaken),
    (("uq_clients_name", "clients.name"), errors.NameTaken),
)

# undefined_table, undefined_column (PostgreSQL, appendix A); what SQLite says of the same.
_OTHER_SCHEMA_STATES = frozenset({"42P01", "42703"})
_OTHER_SCHEMA_WORDS = ("no such table", "no such column", "has no column named")

HOW_TO_MAKE_ONE = "Run `kms-jwks db upgrade`, or `kms-jwks init` for a new installation."


@contextmanager
def translated() -> Iterator[None]:
    """The database's errors as ours; whatever else is raised inside passes."""
    try:
        yield
    except IntegrityError as error:
        said = str(error.orig)
        for marks, conflict in _CONFLICTS:
            if any(said.endswith(mark) or f'"{mark}"' in said for mark in marks):
                raise conflict from error
        raise errors.Conflict("The change contradicts what the registry holds.") from error
    except DBAPIError as error:
        said = str(error.orig)
        if getattr(error.orig, "sqlstate", None) in _OTHER_SCHEMA_STATES or said.startswith(_OTHER_SCHEMA_WORDS):
            raise errors.SchemaMismatch(
                "The database does not hold the tables this program needs.", next_step=HOW_TO_MAKE_ONE
            ) from error
        raise errors.StoreUnavailable("The registry's database did not answer as it should.", retry_after=1) from error
    except sqlite3.Error as error:
        raise errors.StoreUnavailable("The registry's database did not answer as it should.", retry_after=1) from error
    except SQLAlchemyError as error:
        raise errors.StoreUnavailable("The registry's database cannot be used.", retry_after=1) from error
