"""Run Alembic's migrations on a given connection, in batch mode where SQLite needs it."""

from __future__ import annotations

from alembic import context

from kms_jwks.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
context.run_migrations()
