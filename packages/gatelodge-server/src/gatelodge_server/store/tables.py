"""The tables, the same on every database. Instants are whole milliseconds in a BIGINT, so that they compare exactly everywhere.

``migrations/`` makes them; a test holds the two together. Rows of ``partner`` and ``credential`` are never deleted: ids are not
used again, and a refused holder is told why.
"""

from typing import Any, TypeAlias

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    Text,
    and_,
    text,
)

AnyRow: TypeAlias = Row[*tuple[Any, ...]]
"""A row of a query; its columns are read by name or taken apart."""

NAMED_BY = "named by"
"""Under this name a table whose key is personal says which columns its rows are called by in a message: numbers."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only in a column of exactly this type.
_Sequence = BigInteger().with_variant(Integer, "sqlite")

deployment = Table(
    "deployment",
    metadata,
    # One row: what every credential in here is marked with.
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("environment", String(32), nullable=False),
    Column("brand", String(16), nullable=False),
    Column("audience", String(255), nullable=False),
)

key_check = Table(
    "key_check",
    metadata,
    # One row for each master key that this database has been opened with: what only that key opens. It says nothing else.
    Column("key_id", LargeBinary(4), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
)

issuer = Table(
    "issuer",
    metadata,
    # Every `iss` that tokens were given: those without expiry are good under an old one too.
    Column("url", String(500), primary_key=True),
    Column("used_at", BigInteger, nullable=False),
)

tier = Table(
    "tier",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("requests_per_hour", Integer, nullable=False),
    Column("requests_per_day", Integer, nullable=False),
)

partner = Table(
    "partner",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("contact_email", String(255), nullable=False),
    Column("tier", ForeignKey("tier.name"), nullable=False),
    Column("status", String(16), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("session_epoch", Integer, nullable=False, server_default=text("0")),
    Column("created_at", BigInteger, nullable=False),
    # Of those that registered themselves: the address in the form in which addresses are compared, and what they said.
    Column("registered_address", String(320)),
    Column("organization_name", String(200)),
    Column("website_url", String(500)),
    Column("intended_use", String(1000)),
    Column("agreed_at", BigInteger),
)
_IS_REGISTERED = and_(partner.c.registered_address.is_not(None), partner.c.status != "deactivated")
Index(
    "uq_partner_registered_address",
    partner.c.registered_address,
    unique=True,
    sqlite_where=_IS_REGISTERED,
    postgresql_where=_IS_REGISTERED,
)

_IS_SUSPENDED = partner.c.status == "suspended"
Index("ix_partner_suspended", partner.c.id, sqlite_where=_IS_SUSPENDED, postgresql_where=_IS_SUSPENDED)

company = Table(
    "company",
    metadata,
    # A UUIDv7 in 16 bytes: its order is the order of creation.
    Column("id", LargeBinary(16), primary_key=True),
    Column("partner_id", ForeignKey("partner.id"), nullable=False),
    Column("company_name", String(200), nullable=False),
    Column("country", String(2), nullable=False),
    Column("tax_number", String(64), nullable=False),
    Column("canonical_tax_number", String(64), nullable=False),
    Column("vat_number", String(64)),
    Column("language", String(35)),
    Column("address", String(500)),
    Column("city", String(200)),
    Column("state", String(50)),
    Column("postal_code", String(32)),
    Column("email", String(255)),
    Column("user_email", String(255)),
    Column("iban_number", String(34)),
    Column("bic_number", String(11)),
    Column("created_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),
)
Index("ix_company_partner_id_id", company.c.partner_id, company.c.id)
COMPANY_TAX_NUMBER = Index(
    "uq_company_tax_number",
    company.c.partner_id,
    company.c.country,
    company.c.canonical_tax_number,
    unique=True,
    sqlite_where=company.c.deleted_at.is_(None),
    postgresql_where=company.c.deleted_at.is_(None),
)

credential = Table(
    "credential",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("kind", String(2), nullable=False),
    Column("partner_id", ForeignKey("partner.id"), nullable=False, index=True),
    Column("company_id", ForeignKey("company.id"), index=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("masked", String(128), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("first_used_at", BigInteger),
    Column("ends_at", BigInteger),
    Column("end_cause", String(16)),
    Column("rotated_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("last_used_from", String(45)),
)
Index("ix_credential_partner_id_created_at", credential.c.partner_id, credential.c.created_at)
_HAS_END = credential.c.ends_at.is_not(None)
Index("ix_credential_ends_at", credential.c.ends_at, sqlite_where=_HAS_END, postgresql_where=_HAS_END)

access_token = Table(
    "access_token",
    metadata,
    Column("id", String(22), primary_key=True),
    # The id of the first version: what was rotated into what.
    Column("lineage_id", String(22), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("partner_id", ForeignKey("partner.id"), nullable=False, index=True),
    Column("label", String(200), nullable=False),
    Column("kid", ForeignKey("signing_key.kid"), nullable=False, index=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("rotated_at", BigInteger),
    Column("ends_at", BigInteger),
    Column("end_cause", String(16)),
    Column("last_used_at", BigInteger),
    Column("last_used_from", String(45)),
)

session = Table(
    "session",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),
    Column("credential_id", ForeignKey("credential.id"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("rotated_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("retires_at", BigInteger, nullable=False),
    Column("retry_digest", LargeBinary(32)),
    Column("ended_at", BigInteger),
    Column("end_cause", String(16)),
    sqlite_with_rowid=False,
)

signing_key = Table(
    "signing_key",
    metadata,
    Column("kid", String(64), primary_key=True),
    Column("jwk", Text, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("published_at", BigInteger, nullable=False),
    Column("signs_from", BigInteger),
    Column("signs_until", BigInteger),
    Column("gone_at", BigInteger),
    Column("purpose", String(16), nullable=False, server_default=text("'session'")),
)

replay = Table(
    "replay",
    metadata,
    Column("id", LargeBinary(32), primary_key=True),
    Column("fingerprint", LargeBinary(32), nullable=False),
    Column("credential_id", ForeignKey("credential.id"), nullable=False, index=True),
    Column("company_id", ForeignKey("company.id")),
    Column("sealed", LargeBinary),
    Column("readable_until", BigInteger, nullable=False),
)

verification = Table(
    "verification",
    metadata,
    # One row an address: a new code takes the place of the one before, and what is counted against the address stays.
    Column("address", String(320), primary_key=True),
    Column("contact_email", String(255), nullable=False),
    Column("display_name", String(200), nullable=False),
    Column("organization_name", String(200)),
    Column("website_url", String(500)),
    Column("intended_use", String(1000)),
    Column("partner_id", ForeignKey("partner.id")),
    Column("salt", LargeBinary(16), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("day_starts_at", BigInteger, nullable=False),
    Column("day_failures", Integer, nullable=False),
    Column("credential_id", ForeignKey("credential.id"), index=True),
    Column("sealed", LargeBinary),
    info={NAMED_BY: ("created_at", "expires_at")},
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("recipient", String(320), nullable=False),
    # Of what registration sends: the address in the form in which addresses are compared. Its mails are counted by it.
    Column("address", String(320)),
    Column("facts", Text, nullable=False),
    # What must not lie about readable: a code. Gone as soon as the mail is sent or given up.
    Column("sealed", LargeBinary),
    Column("created_at", BigInteger, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("ended_at", BigInteger),
    Column("outcome", String(16)),
    Column("fault", String(200)),
)
_IS_WAITING = outbox.c.ended_at.is_(None)
Index("ix_outbox_due_at", outbox.c.due_at, sqlite_where=_IS_WAITING, postgresql_where=_IS_WAITING)
Index("ix_outbox_recipient_created_at", outbox.c.recipient, outbox.c.created_at)
Index("ix_outbox_address_created_at", outbox.c.address, outbox.c.created_at)
Index("ix_outbox_created_at", outbox.c.created_at)

quota = Table(
    "quota",
    metadata,
    # One row a partner: the present windows, how much of each has been leased, and the windows that they took the place of.
    # An older one is not needed, unless a clock was wrong.
    Column("partner_id", ForeignKey("partner.id"), primary_key=True),
    Column("hour_starts_at", BigInteger, nullable=False),
    Column("hour_taken", Integer, nullable=False),
    Column("day_starts_at", BigInteger, nullable=False),
    Column("day_taken", Integer, nullable=False),
    Column("hour_left_at", BigInteger, nullable=False, server_default=text("0")),
    Column("hour_left_taken", Integer, nullable=False, server_default=text("0")),
    Column("day_left_at", BigInteger, nullable=False, server_default=text("0")),
    Column("day_left_taken", Integer, nullable=False, server_default=text("0")),
)

usage = Table(
    "usage",
    metadata,
    Column("partner_id", ForeignKey("partner.id"), primary_key=True),
    Column("hour_starts_at", BigInteger, primary_key=True),
    Column("accepted", Integer, nullable=False),
    Column("refused", Integer, nullable=False),
)

change = Table(
    "change",
    metadata,
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
    Column("kind", String(32), nullable=False),
    Column("subject", String(64), nullable=False),
    Column("at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

Index("ix_change_at", change.c.at)

verifier = Table(
    "verifier",
    metadata,
    # One row for each that follows the feed of revocations: which step it has applied, and when it was last heard, and by whose
    # clock that was.
    Column("id", String(64), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Column("clock", String(40), nullable=False, server_default=text("''")),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("action", String(32), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("partner_id", String(64), index=True),
    Column("subject", String(64), nullable=False),
    Column("detail", Text, nullable=False),
    sqlite_autoincrement=True,
)

relocation = Table(
    "relocation",
    metadata,
    # One row at most, in each of the two databases of `database copy`; ``store/relocation.py`` says what its states mean.
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Drawn for each move: by it the two know that they belong together.
    Column("move", LargeBinary(16), nullable=False),
    Column("role", String(8), nullable=False),
    Column("state", String(16), nullable=False),
    # The address of the other one, without its password.
    Column("other", Text, nullable=False),
    # Of the new database: drawn by each run of the command. The last one writes, any other has been overtaken.
    Column("copier", LargeBinary(16)),
    Column("progress", Text),
    Column("changed_at", BigInteger, nullable=False),
)
