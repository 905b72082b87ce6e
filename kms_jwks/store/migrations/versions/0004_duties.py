"""Who added an external key and who gave a grant, accepted combinations of duties, and rotated API tokens."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_ID = sa.String(36).with_variant(sa.String(36, collation="C"), "postgresql")


def upgrade() -> None:
    # Adding a column alone would leave SQLite's own text of the table different from that of a new one.
    rebuild: Literal["always", "never"] = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("external_keys", recreate=rebuild) as batch:
        batch.add_column(sa.Column("created_by", _TEXT, nullable=True))

    with op.batch_alter_table("tokens") as batch:
        batch.add_column(sa.Column("replaced_by", _ID, nullable=True))
        batch.create_foreign_key(op.f("fk_tokens_replaced_by_tokens"), "tokens", ["replaced_by"], ["id"])

    with op.batch_alter_table("grants") as batch:
        batch.add_column(sa.Column("created_by", _TEXT, nullable=True))
        batch.add_column(sa.Column("accepted_combined_duties", sa.Boolean(create_constraint=False), nullable=True))
    op.execute(sa.text("UPDATE grants SET accepted_combined_duties = :no").bindparams(no=False))
    with op.batch_alter_table("grants") as batch:
        batch.alter_column(
            "accepted_combined_duties", existing_type=sa.Boolean(create_constraint=False), nullable=False
        )
