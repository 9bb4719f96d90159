"""The first four tables: study, attempt, report and measurement."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "cs_study",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("definition", sa.JSON(), nullable=False),
        sa.Column("identity", sa.JSON(), nullable=False),
        sa.Column("space_hash", sa.String(64), nullable=False),
        sa.Column("subject", sa.JSON(), nullable=False),
        sa.Column("reference", sa.JSON(), nullable=False),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("driver", sa.JSON(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_cs_study"),
        sa.UniqueConstraint("name", name="uq_cs_study_name"),
    )
    op.create_table(
        "cs_attempt",
        *_of_a_trial("cs_attempt", "trial", "attempt"),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("baseline", sa.String(64), nullable=True),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("recipe_key", sa.String(64), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("intervals", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.JSON(), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=True),
        sa.Column("failure", sa.JSON(), nullable=True),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("provisional", sa.Boolean(), nullable=False),
        sa.Column("started", sa.DateTime(), nullable=False),
        sa.Column("ended", sa.DateTime(), nullable=True),
    )
    op.create_table(
        "cs_report",
        *_of_a_trial("cs_report", "trial", "rung"),
        sa.Column("rung", sa.Integer(), nullable=False),
        sa.Column("peer_group", sa.String(64), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("kept", sa.Boolean(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
    )
    op.create_table(
        "cs_measurement",
        *_of_a_trial("cs_measurement", "trial", "kind"),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
    )


def _of_a_trial(table: str, *key: str) -> list[sa.schema.SchemaItem]:
    """What the tables of trials have in common: whose row it is, and that there is one for each key."""
    return [
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("trial", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.ForeignKeyConstraint(["study_id"], ["cs_study.id"], name=f"fk_{table}_study_id", ondelete="CASCADE"),
        sa.UniqueConstraint("study_id", *key, name=f"uq_{table}_study_id_{'_'.join(key)}"),
    ]


def downgrade() -> None:
    """Drop the tables."""
    for table in ("cs_measurement", "cs_report", "cs_attempt", "cs_study"):
        op.drop_table(table)
