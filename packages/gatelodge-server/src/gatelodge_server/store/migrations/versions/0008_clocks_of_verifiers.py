"""By whose clock a verifier was seen: a database that takes the place of another has its own.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("verifier", sa.Column("clock", sa.String(length=40), server_default=sa.text("''"), nullable=False))
