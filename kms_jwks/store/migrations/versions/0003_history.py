"""The history of the epochs: a link over the chain of changes, so that a registry that went back is recognised."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ID = sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("epoch") as batch:
        batch.add_column(sa.Column("link", sa.String(length=64), nullable=True))
    # Random: two copies of a registry that are upgraded apart have different histories from here on.
    op.execute(sa.text("UPDATE epoch SET link = :link").bindparams(link=secrets.token_hex(32)))
    with op.batch_alter_table("epoch") as batch:
        batch.alter_column("link", existing_type=sa.String(length=64), nullable=False)

    op.create_table(
        "history",
        sa.Column("counter", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("incarnation", _ID, nullable=False),
        sa.Column("link", sa.String(length=64), nullable=False),
        sa.Column("supersedes_incarnation", _ID, nullable=True),
        sa.Column("supersedes_counter", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("counter", name=op.f("pk_history")),
    )
    op.execute("INSERT INTO history (counter, incarnation, link) SELECT counter, incarnation, link FROM epoch")
