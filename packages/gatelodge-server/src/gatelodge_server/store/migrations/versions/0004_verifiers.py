"""Who follows the feed of revocations, and what it is read by.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "verifier",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_verifier")),
    )
    op.create_index("ix_change_at", "change", ["at"], unique=False)
    for name, table, column, where in (
        ("ix_credential_ends_at", "credential", "ends_at", "ends_at IS NOT NULL"),
        ("ix_partner_suspended", "partner", "id", "status = 'suspended'"),
    ):
        op.create_index(name, table, [column], unique=False, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
