"""The first schema: everything of one installation."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "clients",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_clients")),
        sa.UniqueConstraint("name", name=op.f("uq_clients_name")),
    )
    op.create_table(
        "custodian",
        sa.Column("single", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column(
            "holder",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("node", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("renewed_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("halted", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.CheckConstraint("single = 1", name=op.f("ck_custodian_single")),
        sa.PrimaryKeyConstraint("single", name=op.f("pk_custodian")),
    )
    op.create_table(
        "epoch",
        sa.Column("single", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column(
            "incarnation",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("single = 1", name=op.f("ck_epoch_single")),
        sa.PrimaryKeyConstraint("single", name=op.f("pk_epoch")),
    )
    op.create_table(
        "installation",
        sa.Column("single", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=8), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("single = 1", name=op.f("ck_installation_single")),
        sa.PrimaryKeyConstraint("single", name=op.f("pk_installation")),
    )
    op.create_table(
        "key_sets",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("issuer", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("access", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("purpose", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("cache_lifetime", sa.BigInteger(), nullable=False),
        sa.Column("stale_if_error", sa.BigInteger(), nullable=False),
        sa.Column("existing_issuer", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("first_published_at", sa.BigInteger(), nullable=True),
        sa.Column("first_activated_at", sa.BigInteger(), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("access IN ('public', 'restricted')", name=op.f("ck_key_sets_access")),
        sa.CheckConstraint("purpose IN ('jwt', 'raw')", name=op.f("ck_key_sets_purpose")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_key_sets")),
        sa.UniqueConstraint("issuer", name=op.f("uq_key_sets_issuer")),
        sa.UniqueConstraint("name", name=op.f("uq_key_sets_name")),
    )
    op.create_table(
        "kids",
        sa.Column("kid", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("owner_kind", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column(
            "owner_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_kids")),
    )
    op.create_table(
        "workers",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("node", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("lease", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("heartbeat_at", sa.BigInteger(), nullable=False),
        sa.Column(
            "confirmed_incarnation",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=True,
        ),
        sa.Column("confirmed_counter", sa.BigInteger(), nullable=True),
        sa.Column("stopped_at", sa.BigInteger(), nullable=True),
        sa.Column("stop_reason", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_index("ix_workers_stopped_at", "workers", ["stopped_at"], unique=False)
    op.create_table(
        "external_keys",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column(
            "key_set_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("kid", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("alg", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("public_jwk", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("remove_at", sa.BigInteger(), nullable=False),
        sa.Column("removed_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["key_set_id"], ["key_sets.id"], name=op.f("fk_external_keys_key_set_id_key_sets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_external_keys")),
    )
    op.create_index("ix_external_keys_key_set_id", "external_keys", ["key_set_id"], unique=False)
    op.create_table(
        "keys",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column(
            "key_set_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("alg", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("rsa_bits", sa.BigInteger(), nullable=True),
        sa.Column("backend", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("policy_rotate_every", sa.BigInteger(), nullable=False),
        sa.Column("policy_publish_lead", sa.BigInteger(), nullable=False),
        sa.Column("policy_allow_unsafe_publish_lead", sa.Boolean(), nullable=False),
        sa.Column("policy_max_token_ttl", sa.BigInteger(), nullable=False),
        sa.Column("policy_clock_skew", sa.BigInteger(), nullable=False),
        sa.Column("policy_handover", sa.BigInteger(), nullable=False),
        sa.Column("policy_destroy_after", sa.BigInteger(), nullable=False),
        sa.Column("profile_name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("profile_typ", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("profile_default_lifetime", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("disabled_at", sa.BigInteger(), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["key_set_id"], ["key_sets.id"], name=op.f("fk_keys_key_set_id_key_sets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("key_set_id", "name", name=op.f("uq_keys_key_set_id_name")),
    )
    op.create_table(
        "tokens",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column(
            "client_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("sha256", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["client_id"], ["clients.id"], name=op.f("fk_tokens_client_id_clients")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("sha256", name=op.f("uq_tokens_sha256")),
    )
    op.create_index("ix_tokens_client_id", "tokens", ["client_id"], unique=False)
    op.create_table(
        "grants",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column(
            "client_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("role", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column(
            "key_set_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=True,
        ),
        sa.Column(
            "key_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=True,
        ),
        sa.Column("deleted_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["client_id"], ["clients.id"], name=op.f("fk_grants_client_id_clients")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_grants_key_id_keys")),
        sa.ForeignKeyConstraint(["key_set_id"], ["key_sets.id"], name=op.f("fk_grants_key_set_id_key_sets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_grants")),
    )
    op.create_index("ix_grants_client_id", "grants", ["client_id"], unique=False)
    op.create_table(
        "versions",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column(
            "key_set_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column(
            "key_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("alg", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("rsa_bits", sa.BigInteger(), nullable=True),
        sa.Column("backend", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("state", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("kid", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("ref", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("public_jwk", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("x5c", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("evidence", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("bounds_max_token_ttl", sa.BigInteger(), nullable=False),
        sa.Column("bounds_clock_skew", sa.BigInteger(), nullable=False),
        sa.Column("bounds_handover", sa.BigInteger(), nullable=False),
        sa.Column("bounds_lease", sa.BigInteger(), nullable=False),
        sa.Column("bounds_cache_lifetime", sa.BigInteger(), nullable=False),
        sa.Column("first_fill", sa.Boolean(), nullable=False),
        sa.Column("published_at", sa.BigInteger(), nullable=True),
        sa.Column("published_epoch", sa.BigInteger(), nullable=True),
        sa.Column("visible_since", sa.BigInteger(), nullable=True),
        sa.Column("activated_at", sa.BigInteger(), nullable=True),
        sa.Column("deactivated_at", sa.BigInteger(), nullable=True),
        sa.Column("retired_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("revoke_reason", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("destroy_at", sa.BigInteger(), nullable=True),
        sa.Column("destroyed_at", sa.BigInteger(), nullable=True),
        sa.Column("breaches", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.CheckConstraint(
            "state IN ('creating', 'published', 'active', 'retiring', 'retired', 'revoked', 'destroyed')",
            name=op.f("ck_versions_state"),
        ),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_versions_key_id_keys")),
        sa.ForeignKeyConstraint(["key_set_id"], ["key_sets.id"], name=op.f("fk_versions_key_set_id_key_sets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_versions")),
        sa.UniqueConstraint("key_id", "number", name=op.f("uq_versions_key_id_number")),
        sa.UniqueConstraint("kid", name=op.f("uq_versions_kid")),
    )
    op.create_index("ix_versions_key_set_id", "versions", ["key_set_id"], unique=False)
    op.create_index("ix_versions_state", "versions", ["state"], unique=False)
    op.create_index(
        "uq_versions_active",
        "versions",
        ["key_id"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "intents",
        sa.Column(
            "id", sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("kind", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column(
            "version_id",
            sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("backend", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("label", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("state", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.CheckConstraint("kind IN ('generate', 'destroy')", name=op.f("ck_intents_kind")),
        sa.CheckConstraint(
            "state IN ('pending', 'started', 'done', 'failed', 'abandoned')", name=op.f("ck_intents_state")
        ),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_intents_version_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_intents")),
        sa.UniqueConstraint("label", name=op.f("uq_intents_label")),
    )
    op.create_index("ix_intents_state", "intents", ["state"], unique=False)
    op.create_index("ix_intents_version_id", "intents", ["version_id"], unique=False)
