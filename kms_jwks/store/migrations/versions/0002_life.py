"""Scheduled rotation, adopted keys, destruction on the module's own schedule, reports of workers and custodian."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("keys") as batch:
        batch.add_column(sa.Column("policy_rotate_jitter", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("policy_rotate_window", _TEXT, nullable=True))
        batch.add_column(sa.Column("policy_hold_until", sa.BigInteger(), nullable=True))
    op.execute("UPDATE keys SET policy_rotate_jitter = 3600, policy_rotate_window = ''")
    with op.batch_alter_table("keys") as batch:
        batch.alter_column("policy_rotate_jitter", existing_type=sa.BigInteger(), nullable=False)
        batch.alter_column("policy_rotate_window", existing_type=_TEXT, nullable=False)

    with op.batch_alter_table("versions") as batch:
        batch.add_column(sa.Column("origin", _TEXT, nullable=True))
        batch.add_column(sa.Column("weaknesses", _TEXT, nullable=True))
        batch.add_column(sa.Column("emergency", sa.Boolean(create_constraint=False), nullable=True))
        batch.add_column(sa.Column("destroy_told", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("absence", _TEXT, nullable=True))
    op.execute(
        sa.text("UPDATE versions SET origin = 'generated', weaknesses = '[]', emergency = :no").bindparams(no=False)
    )
    with op.batch_alter_table("versions") as batch:
        batch.alter_column("origin", existing_type=_TEXT, nullable=False)
        batch.alter_column("weaknesses", existing_type=_TEXT, nullable=False)
        batch.alter_column("emergency", existing_type=sa.Boolean(create_constraint=False), nullable=False)
        batch.create_check_constraint(op.f("ck_versions_origin"), "origin IN ('generated', 'adopted')")

    rebuild: Literal["always", "never"] = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("workers", recreate=rebuild) as batch:
        batch.add_column(sa.Column("backends", _TEXT, nullable=True))

    with op.batch_alter_table("custodian", recreate=rebuild) as batch:
        batch.add_column(sa.Column("since", sa.BigInteger(), nullable=True))

    with op.batch_alter_table("intents") as batch:
        batch.drop_constraint(op.f("ck_intents_kind"), type_="check")
        batch.create_check_constraint(op.f("ck_intents_kind"), "kind IN ('generate', 'destroy', 'tell')")
