"""Feedback that was joined with an erased answer waits: the empty row has no task to give it."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "UPDATE feedback SET status = 'pending', task = NULL, interaction_id = NULL,"
        " joined_at = NULL WHERE task = ''"
    )


def downgrade() -> None:
    pass  # the rows are right under the older code too
