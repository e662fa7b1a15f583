"""Where a database stands while a deployment moves into another one.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "relocation",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("move", sa.LargeBinary(length=16), nullable=False),
        sa.Column("role", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("other", sa.Text(), nullable=False),
        sa.Column("copier", sa.LargeBinary(length=16), nullable=True),
        sa.Column("progress", sa.Text(), nullable=True),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_relocation")),
    )
