"""A quota keeps the window that the present one took the place of.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name, kind in (
        ("hour_left_at", sa.BigInteger()),
        ("hour_left_taken", sa.Integer()),
        ("day_left_at", sa.BigInteger()),
        ("day_left_taken", sa.Integer()),
    ):
        op.add_column("quota", sa.Column(name, kind, server_default=sa.text("0"), nullable=False))
