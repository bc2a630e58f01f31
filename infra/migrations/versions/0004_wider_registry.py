"""The registry holds every id and subject that the API accepts."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("membership", schema=None) as batch_op:
        batch_op.alter_column("event_id", type_=sa.String(length=128), existing_nullable=False)
        batch_op.alter_column("subject", type_=sa.String(length=256), existing_nullable=True)
    with op.batch_alter_table("evaluation_rows", schema=None) as batch_op:
        batch_op.alter_column("row_id", type_=sa.String(length=192), existing_nullable=False)
        batch_op.alter_column("cluster", type_=sa.String(length=256), existing_nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("evaluation_rows", schema=None) as batch_op:
        batch_op.alter_column("cluster", type_=sa.String(length=255), existing_nullable=False)
        batch_op.alter_column("row_id", type_=sa.String(length=128), existing_nullable=False)
    with op.batch_alter_table("membership", schema=None) as batch_op:
        batch_op.alter_column("subject", type_=sa.String(length=255), existing_nullable=True)
        batch_op.alter_column("event_id", type_=sa.String(length=64), existing_nullable=False)
