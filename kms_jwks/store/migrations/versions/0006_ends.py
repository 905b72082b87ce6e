"""The end of keys and key sets: retirement, deletion with a tombstone, and why a key pair was never made."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_LIVING = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    for table, names in (("key_sets", (("name",), ("issuer",))), ("keys", (("key_set_id", "name"),))):
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("retired_at", sa.BigInteger(), nullable=True))
            batch.add_column(sa.Column("deleted_at", sa.BigInteger(), nullable=True))
            for columns in names:
                batch.drop_constraint(op.f(f"uq_{table}_{'_'.join(columns)}"), type_="unique")
        # Only living rows have unique names: a tombstone leaves its name to others.
        for columns in names:
            op.create_index(
                f"uq_{table}_{'_'.join(columns)}",
                table,
                list(columns),
                unique=True,
                sqlite_where=_LIVING,
                postgresql_where=_LIVING,
            )
    rebuild: Literal["always", "never"] = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("versions", recreate=rebuild) as batch:
        batch.add_column(sa.Column("failure", _TEXT, nullable=True))
