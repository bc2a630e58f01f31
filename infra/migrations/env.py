"""Alembic's entry: one transaction per upgrade, on the database that `infra.migrate` names."""

from alembic import context

from perennial.infra.db import Base, Database

database = Database(context.config.attributes["url"])
with database.engine.begin() as connection:
    if database.dialect == "sqlite":
        # Its driver begins nothing by itself, and half an upgrade can be neither used nor repeated.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=database.dialect == "sqlite",
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()
database.dispose()
