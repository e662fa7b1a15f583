"""Access tokens, registration, mails, quotas and usage.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _extend()
    op.create_table(
        "deployment",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("environment", sa.String(length=32), nullable=False),
        sa.Column("brand", sa.String(length=16), nullable=False),
        sa.Column("audience", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployment")),
    )
    op.create_table(
        "issuer",
        sa.Column("url", sa.String(length=500), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("url", name=op.f("pk_issuer")),
    )
    op.create_table(
        "access_token",
        sa.Column("id", sa.String(length=22), nullable=False),
        sa.Column("lineage_id", sa.String(length=22), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("partner_id", sa.String(length=64), nullable=False),
        sa.Column("label", sa.String(length=200), nullable=False),
        sa.Column("kid", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("rotated_at", sa.BigInteger(), nullable=True),
        sa.Column("ends_at", sa.BigInteger(), nullable=True),
        sa.Column("end_cause", sa.String(length=16), nullable=True),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.Column("last_used_from", sa.String(length=45), nullable=True),
        sa.ForeignKeyConstraint(["kid"], ["signing_key.kid"], name=op.f("fk_access_token_kid")),
        sa.ForeignKeyConstraint(["partner_id"], ["partner.id"], name=op.f("fk_access_token_partner_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_access_token")),
    )
    op.create_index(op.f("ix_access_token_kid"), "access_token", ["kid"], unique=False)
    op.create_index(op.f("ix_access_token_lineage_id"), "access_token", ["lineage_id"], unique=False)
    op.create_index(op.f("ix_access_token_partner_id"), "access_token", ["partner_id"], unique=False)
    op.create_table(
        "verification",
        sa.Column("address", sa.String(length=320), nullable=False),
        sa.Column("contact_email", sa.String(length=255), nullable=False),
        sa.Column("display_name", sa.String(length=200), nullable=False),
        sa.Column("organization_name", sa.String(length=200), nullable=True),
        sa.Column("website_url", sa.String(length=500), nullable=True),
        sa.Column("intended_use", sa.String(length=1000), nullable=True),
        sa.Column("partner_id", sa.String(length=64), nullable=True),
        sa.Column("salt", sa.LargeBinary(length=16), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("day_starts_at", sa.BigInteger(), nullable=False),
        sa.Column("day_failures", sa.Integer(), nullable=False),
        sa.Column("credential_id", sa.String(length=12), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["credential_id"], ["credential.id"], name=op.f("fk_verification_credential_id")),
        sa.ForeignKeyConstraint(["partner_id"], ["partner.id"], name=op.f("fk_verification_partner_id")),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_verification")),
    )
    op.create_index(op.f("ix_verification_credential_id"), "verification", ["credential_id"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("id", sa.LargeBinary(length=16), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("recipient", sa.String(length=320), nullable=False),
        sa.Column("address", sa.String(length=320), nullable=True),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("due_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("fault", sa.String(length=200), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(
        "ix_outbox_due_at",
        "outbox",
        ["due_at"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_index("ix_outbox_recipient_created_at", "outbox", ["recipient", "created_at"], unique=False)
    op.create_index("ix_outbox_address_created_at", "outbox", ["address", "created_at"], unique=False)
    op.create_index("ix_outbox_created_at", "outbox", ["created_at"], unique=False)
    op.create_table(
        "quota",
        sa.Column("partner_id", sa.String(length=64), nullable=False),
        sa.Column("hour_starts_at", sa.BigInteger(), nullable=False),
        sa.Column("hour_taken", sa.Integer(), nullable=False),
        sa.Column("day_starts_at", sa.BigInteger(), nullable=False),
        sa.Column("day_taken", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["partner_id"], ["partner.id"], name=op.f("fk_quota_partner_id")),
        sa.PrimaryKeyConstraint("partner_id", name=op.f("pk_quota")),
    )
    op.create_table(
        "usage",
        sa.Column("partner_id", sa.String(length=64), nullable=False),
        sa.Column("hour_starts_at", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.Integer(), nullable=False),
        sa.Column("refused", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["partner_id"], ["partner.id"], name=op.f("fk_usage_partner_id")),
        sa.PrimaryKeyConstraint("partner_id", "hour_starts_at", name=op.f("pk_usage")),
    )


def _extend() -> None:
    for name, kind in (
        ("registered_address", sa.String(length=320)),
        ("organization_name", sa.String(length=200)),
        ("website_url", sa.String(length=500)),
        ("intended_use", sa.String(length=1000)),
        ("agreed_at", sa.BigInteger()),
    ):
        op.add_column("partner", sa.Column(name, kind, nullable=True))
    is_registered = sa.text("registered_address IS NOT NULL AND status != 'deactivated'")
    op.create_index(
        "uq_partner_registered_address",
        "partner",
        ["registered_address"],
        unique=True,
        sqlite_where=is_registered,
        postgresql_where=is_registered,
    )
    for name, kind in (
        ("rotated_at", sa.BigInteger()),
        ("last_used_at", sa.BigInteger()),
        ("last_used_from", sa.String(length=45)),
    ):
        op.add_column("credential", sa.Column(name, kind, nullable=True))
    op.create_index("ix_credential_partner_id_created_at", "credential", ["partner_id", "created_at"], unique=False)
    op.add_column(
        "signing_key", sa.Column("purpose", sa.String(length=16), server_default=sa.text("'session'"), nullable=False)
    )
    with op.batch_alter_table("replay") as replay:  # SQLite cannot change a column: the table is made anew
        replay.alter_column("company_id", existing_type=sa.LargeBinary(length=16), nullable=True)
