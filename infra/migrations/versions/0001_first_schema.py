"""first schema."""

import sqlalchemy as sa
from alembic import op

from perennial.infra.db import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant", sa.String(length=256), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "checks",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("window_since", UtcDateTime(), nullable=False),
        sa.Column("window_until", UtcDateTime(), nullable=False),
        sa.Column("reference_since", UtcDateTime(), nullable=True),
        sa.Column("reference_until", UtcDateTime(), nullable=True),
        sa.Column("num_current", sa.Integer(), nullable=False),
        sa.Column("num_reference", sa.Integer(), nullable=False),
        sa.Column("num_new_examples", sa.Integer(), nullable=False),
        sa.Column("drift_distance", sa.Float(), nullable=True),
        sa.Column("drift_p_value", sa.Float(), nullable=True),
        sa.Column("thumbs_down_rate", sa.Float(), nullable=True),
        sa.Column("correction_rate", sa.Float(), nullable=True),
        sa.Column("decision", sa.String(), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("report_path", sa.String(), nullable=True),
        sa.Column("inputs_digest", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("task", "window_until", "inputs_digest", name="uq_checks_natural_key"),
    )
    with op.batch_alter_table("checks", schema=None) as batch_op:
        batch_op.create_index("ix_checks_task_id", ["task", "id"], unique=False)

    op.create_table(
        "evaluation_rows",
        sa.Column("round_id", sa.String(length=64), nullable=False),
        sa.Column("suite", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=80), nullable=False),
        sa.Column("row_id", sa.String(length=128), nullable=False),
        sa.Column("cluster", sa.String(length=255), nullable=False),
        sa.Column("score", sa.Float(), nullable=True),
        sa.Column("nll", sa.Float(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("scored_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("round_id", "suite", "version", "row_id"),
    )
    op.create_table(
        "interactions",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("tenant", sa.String(length=256), nullable=False),
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=256), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("completion", sa.Text(), nullable=False),
        sa.Column("model_version", sa.String(length=256), nullable=False),
        sa.Column("route_role", sa.String(length=256), nullable=False),
        sa.Column("subject", sa.String(length=256), nullable=True),
        sa.Column("session", sa.String(length=256), nullable=True),
        sa.Column("trace_id", sa.String(length=256), nullable=True),
        sa.Column("num_prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("num_completion_tokens", sa.Integer(), nullable=True),
        sa.Column("latency_ms", sa.Float(), nullable=True),
        sa.Column("finish_reason", sa.String(length=256), nullable=True),
        sa.Column("received_at", UtcDateTime(), nullable=False),
        sa.Column("occurred_at", UtcDateTime(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=300), nullable=True),
        sa.Column("payload_sha256", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("tenant", "id", name="uq_interactions_tenant_id"),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_interactions_tenant_key"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("interactions", schema=None) as batch_op:
        batch_op.create_index(
            "ix_interactions_task_received_at", ["task", "received_at"], unique=False
        )
        batch_op.create_index(
            "ix_interactions_tenant_trace_id", ["tenant", "trace_id"], unique=False
        )

    op.create_table(
        "live_log",
        sa.Column("decision_id", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("row_version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("version", sa.String(length=80), nullable=True),
        sa.Column("previous", sa.String(length=80), nullable=True),
        sa.Column("decided_by", sa.String(length=255), nullable=False),
        sa.Column("evidence_digest", sa.String(length=64), nullable=True),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("decision_id"),
        sa.UniqueConstraint("task", "row_version"),
    )
    with op.batch_alter_table("live_log", schema=None) as batch_op:
        batch_op.create_index("ix_live_log_task_at", ["task", "at"], unique=False)

    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("decision_id", sa.String(length=128), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("done_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("decision_id"),
    )
    op.create_table(
        "rounds",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("inputs_digest", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("opened_at", UtcDateTime(), nullable=False),
        sa.Column("closed_at", UtcDateTime(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=True),
        sa.Column("lease_until", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("task", "inputs_digest"),
        sa.UniqueConstraint("task", "number"),
    )
    op.create_table(
        "feedback",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("tenant", sa.String(length=256), nullable=False),
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=256), nullable=True),
        sa.Column("target_interaction_id", sa.String(length=128), nullable=True),
        sa.Column("target_trace_id", sa.String(length=256), nullable=True),
        sa.Column("target_messages", sa.JSON(), nullable=False),
        sa.Column("target_completion", sa.Text(), nullable=True),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("signal", sa.JSON(), nullable=False),
        sa.Column("source_kind", sa.String(length=32), nullable=False),
        sa.Column("source_id", sa.String(length=256), nullable=True),
        sa.Column("subject", sa.String(length=256), nullable=True),
        sa.Column("may_train", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("interaction_id", sa.String(length=128), nullable=True),
        sa.Column("received_at", UtcDateTime(), nullable=False),
        sa.Column("joined_at", UtcDateTime(), nullable=True),
        sa.Column("occurred_at", UtcDateTime(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=300), nullable=True),
        sa.Column("payload_sha256", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant", "interaction_id"],
            ["interactions.tenant", "interactions.id"],
            name="fk_feedback_interaction",
        ),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("tenant", "id", name="uq_feedback_tenant_id"),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_feedback_tenant_key"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("feedback", schema=None) as batch_op:
        batch_op.create_index(
            "ix_feedback_target_interaction",
            ["tenant", "status", "target_interaction_id"],
            unique=False,
        )
        batch_op.create_index(
            "ix_feedback_target_trace", ["tenant", "status", "target_trace_id"], unique=False
        )
        batch_op.create_index("ix_feedback_task_joined_at", ["task", "joined_at"], unique=False)
        batch_op.create_index(
            "ix_feedback_tenant_interaction_id", ["tenant", "interaction_id"], unique=False
        )

    op.create_table(
        "round_steps",
        sa.Column("round_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.String(length=64), nullable=False),
        sa.Column("inputs_digest", sa.String(length=64), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["round_id"],
            ["rounds.id"],
        ),
        sa.PrimaryKeyConstraint("round_id", "step", "inputs_digest"),
    )
    op.create_table(
        "versions",
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("adapter_digest", sa.String(length=64), nullable=False),
        sa.Column("adapter_path", sa.Text(), nullable=False),
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.Column("round_id", sa.String(length=64), nullable=False),
        sa.Column("parent", sa.String(length=80), nullable=True),
        sa.Column("dataset_digest", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["parent"],
            ["versions.name"],
        ),
        sa.ForeignKeyConstraint(
            ["round_id"],
            ["rounds.id"],
        ),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("round_id", "adapter_digest"),
        sa.UniqueConstraint("task", "number"),
    )
    op.create_table(
        "approvals",
        sa.Column("version", sa.String(length=80), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("round_id", sa.String(length=64), nullable=False),
        sa.Column("expected", sa.String(length=80), nullable=True),
        sa.Column("evidence_digest", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("requested_at", UtcDateTime(), nullable=False),
        sa.Column("decided_at", UtcDateTime(), nullable=True),
        sa.Column("decided_by", sa.String(length=255), nullable=True),
        sa.Column("channel", sa.String(length=32), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["version"],
            ["versions.name"],
        ),
        sa.PrimaryKeyConstraint("version"),
    )
    with op.batch_alter_table("approvals", schema=None) as batch_op:
        batch_op.create_index("ix_approvals_task_state", ["task", "state"], unique=False)

    op.create_table(
        "champions",
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=80), nullable=True),
        sa.Column("row_version", sa.Integer(), nullable=False),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version"],
            ["versions.name"],
        ),
        sa.PrimaryKeyConstraint("task"),
    )
    op.create_table(
        "membership",
        sa.Column("version", sa.String(length=80), nullable=False),
        sa.Column("event_id", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(
            ["version"],
            ["versions.name"],
        ),
        sa.PrimaryKeyConstraint("version", "event_id"),
    )
    with op.batch_alter_table("membership", schema=None) as batch_op:
        batch_op.create_index("ix_membership_event", ["event_id"], unique=False)
        batch_op.create_index("ix_membership_subject", ["subject"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("membership", schema=None) as batch_op:
        batch_op.drop_index("ix_membership_subject")
        batch_op.drop_index("ix_membership_event")

    op.drop_table("membership")
    op.drop_table("champions")
    with op.batch_alter_table("approvals", schema=None) as batch_op:
        batch_op.drop_index("ix_approvals_task_state")

    op.drop_table("approvals")
    op.drop_table("versions")
    op.drop_table("round_steps")
    with op.batch_alter_table("feedback", schema=None) as batch_op:
        batch_op.drop_index("ix_feedback_tenant_interaction_id")
        batch_op.drop_index("ix_feedback_task_joined_at")
        batch_op.drop_index("ix_feedback_target_trace")
        batch_op.drop_index("ix_feedback_target_interaction")

    op.drop_table("feedback")
    op.drop_table("rounds")
    op.drop_table("outbox")
    with op.batch_alter_table("live_log", schema=None) as batch_op:
        batch_op.drop_index("ix_live_log_task_at")

    op.drop_table("live_log")
    with op.batch_alter_table("interactions", schema=None) as batch_op:
        batch_op.drop_index("ix_interactions_tenant_trace_id")
        batch_op.drop_index("ix_interactions_task_received_at")

    op.drop_table("interactions")
    op.drop_table("evaluation_rows")
    with op.batch_alter_table("checks", schema=None) as batch_op:
        batch_op.drop_index("ix_checks_task_id")

    op.drop_table("checks")
    op.drop_table("api_keys")
