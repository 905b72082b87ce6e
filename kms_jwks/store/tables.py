"""The registry's tables (SQLAlchemy Core). Ids and names are text compared byte by byte, instants are microseconds."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from kms_jwks.model import Access, IntentKind, IntentState, Origin, Purpose, VersionState

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# PostgreSQL compares text by the database's locale unless told otherwise; SQLite's BINARY is its default.
_TEXT = Text().with_variant(Text(collation="C"), "postgresql")
_ID = String(36).with_variant(String(36, collation="C"), "postgresql")
_LINK = String(64)


def _id(name: str = "id", *, primary: bool = True) -> Column[str]:
    return Column(name, _ID, primary_key=primary, nullable=False)


def _refers(name: str, table: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, _ID, ForeignKey(f"{table}.id"), nullable=nullable)


def _text(name: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, _TEXT, nullable=nullable)


def _instant(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean(create_constraint=False), nullable=False)


def _one_of(
    column: str, values: type[Access | Purpose | VersionState | Origin | IntentKind | IntentState]
) -> CheckConstraint:
    listed = ", ".join(f"'{value.value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def _single() -> Column[int]:
    """The key of a table with one row."""
    return Column(
        "single", Integer, CheckConstraint("single = 1", name="single"), primary_key=True, autoincrement=False
    )


installation = Table(
    "installation",
    metadata,
    _single(),
    Column("id", String(8), nullable=False),
    _instant("created_at"),
)

epoch = Table(
    "epoch",
    metadata,
    _single(),
    _id("incarnation", primary=False),
    _number("counter"),
    Column("link", _LINK, nullable=False),
)

history = Table(
    "history",
    metadata,
    Column("counter", BigInteger, primary_key=True, autoincrement=False),
    _id("incarnation", primary=False),
    Column("link", _LINK, nullable=False),
    Column("supersedes_incarnation", _ID, nullable=True),
    _number("supersedes_counter", nullable=True),
)
"""The epochs of the past, one row each. A row with `supersedes_…` is the first of an incarnation that was announced to
every node that had confirmed at most that epoch."""

key_sets = Table(
    "key_sets",
    metadata,
    _id(),
    _text("name"),
    _text("issuer"),
    _text("access"),
    _text("purpose"),
    _number("cache_lifetime"),
    _number("stale_if_error"),
    _flag("existing_issuer"),
    _instant("created_at"),
    _instant("updated_at"),
    _instant("first_published_at", nullable=True),
    _instant("first_activated_at", nullable=True),
    _number("revision"),
    _instant("retired_at", nullable=True),
    _instant("deleted_at", nullable=True),
    _one_of("access", Access),
    _one_of("purpose", Purpose),
)

keys = Table(
    "keys",
    metadata,
    _id(),
    _refers("key_set_id", "key_sets"),
    _text("name"),
    _text("alg"),
    _number("rsa_bits", nullable=True),
    _text("backend"),
    _number("policy_rotate_every"),
    _number("policy_publish_lead"),
    _flag("policy_allow_unsafe_publish_lead"),
    _number("policy_max_token_ttl"),
    _number("policy_clock_skew"),
    _number("policy_handover"),
    _number("policy_destroy_after"),
    _number("policy_rotate_jitter"),
    _text("policy_rotate_window"),
    _instant("policy_hold_until", nullable=True),
    _text("profile_name"),
    _text("profile_typ"),
    _number("profile_default_lifetime"),
    _instant("created_at"),
    _instant("updated_at"),
    _instant("disabled_at", nullable=True),
    _number("revision"),
    _instant("retired_at", nullable=True),
    _instant("deleted_at", nullable=True),
)

versions = Table(
    "versions",
    metadata,
    _id(),
    _refers("key_set_id", "key_sets"),
    _refers("key_id", "keys"),
    _number("number"),
    _text("alg"),
    _number("rsa_bits", nullable=True),
    _text("backend"),
    _text("state"),
    _instant("created_at"),
    _text("kid", nullable=True),
    _text("ref", nullable=True),
    _text("public_jwk", nullable=True),
    _text("x5c"),
    _text("evidence", nullable=True),
    _number("bounds_max_token_ttl"),
    _number("bounds_clock_skew"),
    _number("bounds_handover"),
    _number("bounds_lease"),
    _number("bounds_cache_lifetime"),
    _flag("first_fill"),
    _instant("published_at", nullable=True),
    _number("published_epoch", nullable=True),
    _instant("visible_since", nullable=True),
    _instant("activated_at", nullable=True),
    _instant("deactivated_at", nullable=True),
    _instant("retired_at", nullable=True),
    _instant("revoked_at", nullable=True),
    _text("revoke_reason", nullable=True),
    _instant("destroy_at", nullable=True),
    _instant("destroyed_at", nullable=True),
    _text("breaches"),
    _text("origin"),
    _text("weaknesses"),
    _flag("emergency"),
    _instant("destroy_told", nullable=True),
    _text("absence", nullable=True),
    _text("failure", nullable=True),
    UniqueConstraint("key_id", "number"),
    UniqueConstraint("key_set_id", "kid"),
    _one_of("state", VersionState),
    _one_of("origin", Origin),
    Index("ix_versions_state", "state"),
    Index("ix_versions_key_set_id", "key_set_id"),
)
# The database itself refuses a second active version of a key.
ONE_ACTIVE = Index(
    "uq_versions_active",
    versions.c.key_id,
    unique=True,
    sqlite_where=versions.c.state == VersionState.ACTIVE.value,
    postgresql_where=versions.c.state == VersionState.ACTIVE.value,
)

# The kid of a pair that was made here is unique over the whole installation, in every state of its version.
GENERATED_KID = Index(
    "uq_versions_generated_kid",
    versions.c.kid,
    unique=True,
    sqlite_where=versions.c.origin == Origin.GENERATED.value,
    postgresql_where=versions.c.origin == Origin.GENERATED.value,
)


def _unique_unless_deleted(table: Table, *columns: str) -> Index:
    """An index that keeps a name unique among the rows that are no tombstones."""
    living = table.c.deleted_at.is_(None)
    name = f"uq_{table.name}_{'_'.join(columns)}"
    return Index(name, *(table.c[c] for c in columns), unique=True, sqlite_where=living, postgresql_where=living)


_unique_unless_deleted(key_sets, "name")
_unique_unless_deleted(key_sets, "issuer")
_unique_unless_deleted(keys, "key_set_id", "name")

# Every kid that a key set ever had, and the one public key that it is bound to for ever.
kids = Table(
    "kids",
    metadata,
    Column("key_set_id", _ID, ForeignKey("key_sets.id"), primary_key=True, nullable=False),
    Column("kid", _TEXT, primary_key=True),
    _text("thumbprint"),
    _flag("computed"),
    Index("ix_kids_kid", "kid"),
    Index("ix_kids_thumbprint", "thumbprint"),
)

external_keys = Table(
    "external_keys",
    metadata,
    _id(),
    _refers("key_set_id", "key_sets"),
    _text("kid"),
    _text("alg"),
    _text("public_jwk"),
    _instant("created_at"),
    _instant("remove_at"),
    _instant("removed_at", nullable=True),
    _text("created_by", nullable=True),
    _instant("revoked_at", nullable=True),
    _text("revoke_reason", nullable=True),
    _text("changes"),
    Index("ix_external_keys_key_set_id", "key_set_id"),
)
# A key set publishes one external key under a kid at a time.
PUBLISHED_EXTERNAL = Index(
    "uq_external_keys_published",
    external_keys.c.key_set_id,
    external_keys.c.kid,
    unique=True,
    sqlite_where=external_keys.c.removed_at.is_(None),
    postgresql_where=external_keys.c.removed_at.is_(None),
)

clients = Table(
    "clients",
    metadata,
    _id(),
    _text("name"),
    _instant("created_at"),
    _instant("deleted_at", nullable=True),
    UniqueConstraint("name"),
)

tokens = Table(
    "tokens",
    metadata,
    _id(),
    _refers("client_id", "clients"),
    _text("sha256"),
    _instant("created_at"),
    _instant("expires_at"),
    _instant("revoked_at", nullable=True),
    _instant("last_used_at", nullable=True),
    _refers("replaced_by", "tokens", nullable=True),
    UniqueConstraint("sha256"),
    Index("ix_tokens_client_id", "client_id"),
)

grants = Table(
    "grants",
    metadata,
    _id(),
    _refers("client_id", "clients"),
    _text("role"),
    _instant("created_at"),
    _refers("key_set_id", "key_sets", nullable=True),
    _refers("key_id", "keys", nullable=True),
    _instant("deleted_at", nullable=True),
    _text("created_by", nullable=True),
    _flag("accepted_combined_duties"),
    Index("ix_grants_client_id", "client_id"),
)

workers = Table(
    "workers",
    metadata,
    _id(),
    _text("node"),
    _number("pid"),
    _number("lease"),
    _instant("started_at"),
    _instant("heartbeat_at"),
    Column("confirmed_incarnation", _ID, nullable=True),
    _number("confirmed_counter", nullable=True),
    _instant("stopped_at", nullable=True),
    _text("stop_reason", nullable=True),
    _text("backends", nullable=True),
    Index("ix_workers_stopped_at", "stopped_at"),
)

intents = Table(
    "intents",
    metadata,
    _id(),
    _text("kind"),
    _refers("version_id", "versions"),
    _text("backend"),
    _text("label"),
    _text("state"),
    _instant("created_at"),
    _instant("not_before"),
    _number("attempt"),
    _number("term", nullable=True),
    _instant("finished_at", nullable=True),
    _text("error", nullable=True),
    UniqueConstraint("label"),
    _one_of("kind", IntentKind),
    _one_of("state", IntentState),
    Index("ix_intents_state", "state"),
    Index("ix_intents_version_id", "version_id"),
)

idempotency_records = Table(
    "idempotency_records",
    metadata,
    _id(),
    _refers("client_id", "clients"),
    _text("key"),
    _text("call"),
    _id("created_id", primary=False),
    _instant("created_at"),
    _instant("expires_at"),
    UniqueConstraint("client_id", "key"),
    Index("ix_idempotency_records_expires_at", "expires_at"),
)

custodian = Table(
    "custodian",
    metadata,
    _single(),
    _number("term"),
    _id("holder", primary=False),
    _text("node"),
    _instant("renewed_at"),
    _instant("expires_at"),
    _instant("since", nullable=True),
    _text("halted", nullable=True),
)
