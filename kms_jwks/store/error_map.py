"""The drivers' errors as the domain's: which conflict a violated constraint is, and why the database is unavailable."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from kms_jwks import errors

# By the constraint's name (PostgreSQL) or its columns (SQLite).
_CONFLICTS: tuple[tuple[tuple[str, ...], type[errors.Conflict]], ...] = (
    (("pk_kids", "kids.kid"), errors.KidTaken),
    (("uq_versions_key_set_id_kid", "uq_versions_generated_kid", "versions.kid"), errors.KidTaken),
    (("uq_external_keys_published", "external_keys.kid"), errors.KidTaken),
    (("uq_versions_active", "versions.key_id"), errors.TransitionRefused),
    (("uq_key_sets_name", "key_sets.name"), errors.NameTaken),
    (("uq_key_sets_issuer", "key_sets.issuer"), errors.IssuerTaken),
    (("uq_keys_key_set_id_name", "keys.key_set_id, keys.name"), errors.NameTaken),
    (("uq_clients_name", "clients.name"), errors.NameTaken),
)

# undefined_table, undefined_column (PostgreSQL, appendix A), and SQLite's messages of the same meaning.
_OTHER_SCHEMA_STATES = frozenset({"42P01", "42703"})
_OTHER_SCHEMA_MESSAGES = ("no such table", "no such column", "has no column named")

_STOPPING = "is starting or stopping"
_CLOSED = "closed the connection"

# What a server's refusal means, by SQLSTATE (PostgreSQL, appendix A) or, where the driver has none, by its message.
# Any caller may read the cause, so it names no user, host or database.
_CAUSES: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("25006",), ("read-only",), "is read-only: is it a standby?"),
    (("53300",), ("too many clients", "connection slots"), "has no connection left for this program"),
    (("55P03", "57014"), (), "was held up by another transaction for too long"),
    (("25P03",), ("idle-in-transaction",), "ended a transaction that was idle for too long"),
    (("40001", "40P01"), (), "could not make two changes at once"),
    (("57P01", "57P02", "57P03"), ("starting up", "shutting down"), _STOPPING),
    (("28P01", "28000"), ("authentication failed", "no pg_hba.conf entry"), "refuses this user or its password"),
    (("3D000",), ("FATAL:  database",), "does not exist on that server"),
    ((), ("Connection refused", "No such file"), "is not there: nothing listens"),
    (
        (),
        # The last three are libpq's words over TLS.
        (
            "server closed",
            "connection is lost",
            "connection is closed",
            "reset by peer",
            "closed unexpectedly",
            "EOF detected",
            "unexpected eof",
        ),
        _CLOSED,
    ),
    ((), ("timeout",), "did not answer in time"),
    ((), ("resolve host", "could not translate"), "is on a host whose name is not known"),
)

HOW_TO_CREATE = "Run `kms-jwks db upgrade`, or `kms-jwks init` for a new installation."


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise the drivers' and SQLAlchemy's errors as the domain's; every other error passes."""
    try:
        yield
    except IntegrityError as error:
        message = str(error.orig)
        for marks, conflict in _CONFLICTS:
            if any(message.endswith(mark) or f'"{mark}"' in message for mark in marks):
                raise conflict from error
        raise errors.Conflict("The change contradicts what the registry holds.") from error
    except DBAPIError as error:
        message = str(error.orig)
        if getattr(error.orig, "sqlstate", None) in _OTHER_SCHEMA_STATES or message.startswith(_OTHER_SCHEMA_MESSAGES):
            raise errors.SchemaMismatch(
                "The database does not hold the tables this program needs.", next_step=HOW_TO_CREATE
            ) from error
        raise errors.StoreUnavailable(f"The registry's database {_cause(error.orig)}.", retry_after=1) from error
    except sqlite3.Error as error:
        raise errors.StoreUnavailable("The registry's database did not answer as it should.", retry_after=1) from error
    except PoolTimeout as error:
        raise errors.StoreUnavailable(
            "Every connection of this process to the registry's database is in use.", retry_after=1
        ) from error
    except SQLAlchemyError as error:
        raise errors.StoreUnavailable("The registry's database cannot be used.", retry_after=1) from error


def is_session_end(error: DBAPIError) -> bool:
    """Whether the server ended the session, which makes the connection useless. False where it only fell silent."""
    return error.connection_invalidated and _cause(error.orig) in (_STOPPING, _CLOSED)


def _cause(error: object) -> str:
    state, message = getattr(error, "sqlstate", None), str(error)
    found = (cause for states, parts, cause in _CAUSES if state in states or any(part in message for part in parts))
    return next(found, "did not answer as it should")
