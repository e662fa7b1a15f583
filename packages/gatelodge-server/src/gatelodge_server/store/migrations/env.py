"""Alembic's entry: runs the migrations over the connection that ``store/migrate.py`` hands it, in its transaction."""

from alembic import context

from gatelodge_server.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
