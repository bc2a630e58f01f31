"""When a row's content was erased."""

import sqlalchemy as sa
from alembic import op

from perennial.infra.db import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("interactions", sa.Column("erased_at", UtcDateTime(), nullable=True))
    op.add_column("feedback", sa.Column("erased_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("feedback", "erased_at")
    op.drop_column("interactions", "erased_at")
