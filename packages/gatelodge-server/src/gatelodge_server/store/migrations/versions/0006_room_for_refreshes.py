"""Pages of sessions keep room for the next version of their rows: a refresh then touches one page, and no index.

Revision ID: 0006
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite writes a row anew where it stands.
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE session SET (fillfactor = 80)")
