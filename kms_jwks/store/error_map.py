"""The drivers' errors as the domain's: which conflict a violated constraint is, and why the database is unavailable."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

# character_not_in_repertoire, untranslatable_character, and psycopg's words for U+0000, which it does not send.
_UNSTORABLE_STATES = frozenset({"22021", "22P05"})
_UNSTORABLE_MESSAGE = "NUL (0x00)"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the database cannot be used.

    `name` is for programs, `words` follow "The registry's database", `next_step` is for the node's operator. Any caller
    may read them, so they name no user, host, file or database.
    """

    name: str
    words: str
    next_step: str
    states: tuple[str, ...] = ()
    """SQLSTATEs (PostgreSQL, appendix A)."""
    parts: tuple[str, ...] = ()
    """Parts of a message, for errors that carry no code: those of a connection that is not made, and a pooler's."""
    codes: tuple[int, ...] = ()
    """SQLite's primary result codes."""

    def explains(self, error: object) -> bool:
        """Whether this is the cause of a driver's error."""
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in self.codes:
            return True
        return getattr(error, "sqlstate", None) in self.states or any(part in str(error) for part in self.parts)


_REACH = "Start the database, and check the network and database_url."

_DISK_FULL = Cause(
    "disk_full",
    "has no space left on its disk",
    "Free space on the disk that holds the database, or enlarge it. The service continues by itself.",
    states=("53100",),
    parts=("disk is full", "No space left on device"),
    codes=(sqlite3.SQLITE_FULL,),
)
_READ_ONLY = Cause(
    "read_only",
    "is read-only",
    "Name the primary in database_url, not a standby server. For an SQLite file: let the service's user write to the "
    "file and its folder, on a file system that is mounted writable.",
    states=("25006",),
    parts=("read-only", "readonly"),
    codes=(sqlite3.SQLITE_READONLY,),
)
_CANNOT_OPEN = Cause(
    "cannot_open",
    "cannot be opened",
    "Let the service's user read and write the registry's file and its folder.",
    parts=("unable to open database file",),
    codes=(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH),
)
_STOPPING = Cause(
    "stopping",
    "is starting or stopping",
    "Wait until the database has started: the service continues by itself.",
    states=("57P01", "57P02", "57P03"),
    # "the database system is not yet accepting connections", "… is in recovery mode", "… is shutting down"
    parts=("starting up", "shutting down", "accepting connections", "in recovery mode"),
)
_IDLE_SESSION = Cause(
    "idle_session",
    "ended a session that was idle for too long",
    "Repeat the call. Set idle_session_timeout to 0 for the service's user, or the pooler's limit for idle clients.",
    states=("57P05",),
    parts=("idle-session timeout", "client_idle_timeout"),
)
_CLOSED = Cause(
    "connection_closed",
    "closed the connection",
    f"Repeat the call. If it lasts: look at the database's log. {_REACH}",
    # The words from "closed unexpectedly" to "unexpected eof" are libpq's over TLS, the last is PgBouncer's.
    parts=(
        "server closed",
        "connection is lost",
        "connection is closed",
        "reset by peer",
        "closed unexpectedly",
        "EOF detected",
        "unexpected eof",
        "server conn crashed",
    ),
)

# The first that explains an error is its cause.
_CAUSES: tuple[Cause, ...] = (
    Cause(
        "pooler_parameter",
        "refuses a startup parameter: probably a pooler is before it",
        "Take `options` and other parameters of the server out of database_url, or let the pooler pass them "
        "(PgBouncer: ignore_startup_parameters).",
        parts=("unsupported startup parameter",),
    ),
    Cause(
        "parameter",
        "refuses a parameter of the connection",
        "Correct the parameters after the question mark in database_url.",
        parts=("invalid value for parameter", "unrecognized configuration parameter", "invalid connection option"),
    ),
    Cause(
        "pooler_has_no_server",
        "is not reached by its pooler",
        "Start the database, and let the pooler open as many connections as all processes need "
        "(PgBouncer: default_pool_size).",
        parts=("query_wait_timeout", "server login", "server_login_retry", "cannot connect to server"),
    ),
    _DISK_FULL,
    _READ_ONLY,
    Cause(
        "locked",
        "is locked by another process",
        "Repeat the call. If it lasts: end the transaction of the other program that has the file open "
        "(`fuser FILE` names it): a backup, a shell of sqlite3.",
        parts=("database is locked", "table is locked"),
        codes=(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
    ),
    _CANNOT_OPEN,
    Cause(
        "damaged",
        "is damaged, or is not a database",
        "Stop the service and bring the registry back from its backup (docs/lifecycle.md, after a restore).",
        states=("XX001", "XX002"),
        parts=("file is not a database", "is malformed"),
        codes=(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB),
    ),
    Cause(
        "disk_failing",
        "cannot read or write its files",
        "Look at the disk that holds the database: it may be full or failing.",
        states=("58030",),
        parts=("disk I/O error",),
        codes=(sqlite3.SQLITE_IOERR,),
    ),
    Cause(
        "no_write_ahead_log",
        "is on a file system that cannot hold a write-ahead log",
        "Put the registry's file on a local disk.",
        parts=("cannot hold a write-ahead log",),
    ),
    Cause(
        "no_connection_left",
        "has no connection left for this program",
        "Raise the server's max_connections or the pooler's max_client_conn, or lower database_pool_size.",
        states=("53300",),
        parts=("too many clients", "too many connections", "connection slots", "no more connections allowed"),
    ),
    Cause(
        "out_of_memory",
        "has no memory left",
        "Look at the database server's memory.",
        states=("53200",),
        codes=(sqlite3.SQLITE_NOMEM,),
    ),
    Cause(
        "cancelled",
        "had a statement cancelled by its administrator",
        "Repeat the call.",
        parts=("due to user request",),
    ),
    Cause(
        "lock_timeout",
        "was held up by another transaction for too long",
        "Repeat the call. If it lasts: end long transactions in the database (pg_stat_activity shows them).",
        states=("55P03",),
    ),
    Cause(
        "statement_timeout",
        "ended a statement that took too long, or was held up by another transaction",
        "Repeat the call. If it lasts: look at the database's load and for long transactions, or raise "
        "database_timeout_ms.",
        states=("57014",),
    ),
    Cause(
        "idle_transaction",
        "ended a transaction that was idle or open for too long",
        "Repeat the call. If it lasts: look at the load of this node.",
        states=("25P03", "25P04"),
        parts=("idle-in-transaction", "idle transaction timeout"),
    ),
    Cause(
        "serialization",
        "could not make two changes at once",
        "Repeat the call.",
        states=("40001", "40P01"),
    ),
    _STOPPING,
    _IDLE_SESSION,
    Cause(
        "login_refused",
        "refuses this user or its password",
        "Correct user and password in database_url, or the server's pg_hba.conf.",
        states=("28P01", "28000"),
        parts=("authentication failed", "no pg_hba.conf entry", "no such user"),
    ),
    Cause(
        "no_permission",
        "does not let this user do that",
        "Make the user of database_url the owner of the registry's tables.",
        states=("42501",),
        parts=("permission denied for",),
    ),
    Cause(
        "no_database",
        "does not exist on that server",
        "Correct the database's name in database_url, or create the database.",
        states=("3D000", "57P04"),
        parts=("FATAL:  database", "no such database"),
    ),
    Cause(
        "connection_refused",
        "is not there: nothing listens",
        _REACH,
        parts=("Connection refused", "No such file"),
    ),
    _CLOSED,
    Cause(
        "tls",
        "and this node agree on no TLS connection",
        "Correct sslmode, sslrootcert and the certificates in database_url and on the server.",
        parts=("certificate", "SSL"),
    ),
    Cause("timeout", "did not answer in time", _REACH, parts=("timeout expired", "timeout: ", "timed out")),
    Cause("unreachable", "cannot be reached over the network", _REACH, parts=("No route to host", "is unreachable")),
    Cause(
        "unknown_host",
        "is on a host whose name is not known",
        "Correct the host in database_url, or the name service of this machine.",
        parts=("resolve host", "could not translate"),
    ),
)
_UNKNOWN = Cause("unknown", "did not answer as it should", "Look at the database's own log.")

_OF_THE_SYSTEM = {
    errno.ENOSPC: ("disk_full", "Free space on that disk, or enlarge it. The service continues by itself."),
    errno.EDQUOT: ("disk_full", "Raise the quota of the service's user. The service continues by itself."),
    errno.EROFS: ("read_only", "Mount that file system writable."),
    errno.EACCES: ("cannot_open", "Let the service's user read and write there."),
    errno.EPERM: ("cannot_open", "Let the service's user read and write there."),
}

CAUSE_NAMES = frozenset(
    {
        *(cause.name for cause in (*_CAUSES, _UNKNOWN)),
        *(name for name, _ in _OF_THE_SYSTEM.values()),
        # What this program finds out by itself.
        *("lost", "no_file", "pool_busy", "pooler_mode", "writers_busy"),
    }
)
"""Every value of `cause` in a StoreUnavailable. docs/troubleshooting.md has a row for each."""

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
    except DBAPIError as last:
        first = _first_of(last).orig
        message, state = str(first), getattr(first, "sqlstate", None)
        if state in _OTHER_SCHEMA_STATES or message.startswith(_OTHER_SCHEMA_MESSAGES):
            raise errors.SchemaMismatch(
                "The database does not hold the tables this program needs.", next_step=HOW_TO_CREATE
            ) from last
        if state in _UNSTORABLE_STATES or _UNSTORABLE_MESSAGE in message:
            raise errors.InvalidField("A text holds a character that the registry's database cannot store.") from last
        raise unavailable(first) from last
    except sqlite3.Error as error:
        raise unavailable(error) from error
    except PoolTimeout as error:
        raise errors.StoreUnavailable(
            "Every connection of this process to the registry's database is in use.",
            retry_after=1,
            next_step="Repeat the call. If it lasts: raise database_pool_size.",
            fields={"cause": "pool_busy"},
        ) from error
    except SQLAlchemyError as error:
        raise errors.StoreUnavailable("The registry's database cannot be used.", retry_after=1) from error


def unavailable(error: object) -> errors.StoreUnavailable:
    """A driver's error as the domain's, with its cause in `fields`."""
    cause = _cause(error)
    code = getattr(error, "sqlstate", None) or getattr(error, "sqlite_errorname", None)
    words = f"{cause.words} ({code})" if cause is _UNKNOWN and code else cause.words
    return errors.StoreUnavailable(
        f"The registry's database {words}.", retry_after=1, next_step=cause.next_step, fields={"cause": cause.name}
    )


def unavailable_file(what: str, error: OSError) -> errors.StoreUnavailable:
    """An error of the operating system about a file that the registry or its worker needs; `what` begins a sentence."""
    cause, step = _OF_THE_SYSTEM.get(error.errno or 0, (_UNKNOWN.name, None))
    return errors.StoreUnavailable(f"{what}: {error.strerror}.", retry_after=1, next_step=step, fields={"cause": cause})


def is_session_end(error: DBAPIError) -> bool:
    """Whether the server ended the session, which makes the connection useless. False where it only fell silent."""
    return error.connection_invalidated and _cause(error.orig) in (_STOPPING, _CLOSED, _IDLE_SESSION)


def _first_of(error: DBAPIError) -> DBAPIError:
    """The error that a failed savepoint hides: SQLite ends the whole transaction by itself where its disk is full."""
    before = error.orig.__context__ if error.orig is not None else None
    return before if str(error.orig).startswith("no such savepoint") and isinstance(before, DBAPIError) else error


def _cause(error: object) -> Cause:
    return next((cause for cause in _CAUSES if cause.explains(error)), _UNKNOWN)
