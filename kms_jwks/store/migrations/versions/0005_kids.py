"""A kid is bound to one public key within its key set; external keys keep their changes, and can be revoked."""

from __future__ import annotations

import base64
import hashlib
import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_ID = sa.String(36).with_variant(sa.String(36, collation="C"), "postgresql")


def upgrade() -> None:
    _rebuild_kids()
    with op.batch_alter_table("versions") as batch:
        batch.drop_constraint(op.f("uq_versions_kid"), type_="unique")
        batch.create_unique_constraint(op.f("uq_versions_key_set_id_kid"), ["key_set_id", "kid"])
    made_here = sa.text("origin = 'generated'")
    op.create_index(
        "uq_versions_generated_kid",
        "versions",
        ["kid"],
        unique=True,
        sqlite_where=made_here,
        postgresql_where=made_here,
    )

    with op.batch_alter_table("external_keys") as batch:
        batch.add_column(sa.Column("revoked_at", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("revoke_reason", _TEXT, nullable=True))
        batch.add_column(sa.Column("changes", _TEXT, nullable=True))
    op.execute("UPDATE external_keys SET changes = '[]'")
    with op.batch_alter_table("external_keys") as batch:
        batch.alter_column("changes", existing_type=_TEXT, nullable=False)
    published = sa.text("removed_at IS NULL")
    op.create_index(
        "uq_external_keys_published",
        "external_keys",
        ["key_set_id", "kid"],
        unique=True,
        sqlite_where=published,
        postgresql_where=published,
    )


def _rebuild_kids() -> None:
    op.drop_table("kids")
    kids = op.create_table(
        "kids",
        sa.Column("key_set_id", _ID, nullable=False),
        sa.Column("kid", _TEXT, nullable=False),
        sa.Column("thumbprint", _TEXT, nullable=False),
        sa.Column("computed", sa.Boolean(create_constraint=False), nullable=False),
        sa.ForeignKeyConstraint(["key_set_id"], ["key_sets.id"], name=op.f("fk_kids_key_set_id_key_sets")),
        sa.PrimaryKeyConstraint("key_set_id", "kid", name=op.f("pk_kids")),
    )
    op.create_index("ix_kids_kid", "kids", ["kid"])
    op.create_index("ix_kids_thumbprint", "kids", ["thumbprint"])
    bind = op.get_bind()
    versions = bind.execute(
        sa.text("SELECT key_set_id, kid, public_jwk, origin FROM versions WHERE kid IS NOT NULL")
    ).all()
    externals = bind.execute(sa.text("SELECT key_set_id, kid, public_jwk, '' AS origin FROM external_keys")).all()
    rows = [
        {
            "key_set_id": row.key_set_id,
            "kid": row.kid,
            "thumbprint": _thumbprint(row.public_jwk),
            "computed": row.origin == "generated",
        }
        for row in (*versions, *externals)
    ]
    if rows:
        op.bulk_insert(kids, rows)


def _thumbprint(public_jwk: str) -> str:
    """RFC 7638: the registry keeps the required members alone."""
    canonical = json.dumps(json.loads(public_jwk), sort_keys=True, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()
