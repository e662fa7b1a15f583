"""Companies and their keys."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from uuid import UUID

from sqlalchemy import Connection, or_, select, update

from gatelodge_server.core.companies import canonical_tax_number
from gatelodge_server.core.credentials import judge_standing
from gatelodge_server.core.model import Company, CompanyDetails, Credential, EndCause, Instant
from gatelodge_server.core.ports import CompanyOutcome, Created, Done, Refused, Replay, Replayed
from gatelodge_server.core.refusals import CompanyExists, CompanyNotFound, IdempotencyKeySpent
from gatelodge_server.store.keys import CREDENTIALS, credential_of, end_keys, find_keys, insert_key
from gatelodge_server.store.races import insert_unless_there
from gatelodge_server.store.replays import find_replay, keep_replay
from gatelodge_server.store.tables import COMPANY_TAX_NUMBER, AnyRow, company, credential, partner
from gatelodge_server.store.trail import append_audit, append_change

_DETAILS = tuple(field.name for field in fields(CompanyDetails))
_COMPANY = select(company.c.id, company.c.partner_id, company.c.created_at, *(company.c[name] for name in _DETAILS)).where(
    company.c.deleted_at.is_(None)
)


def _company_of(row: AnyRow) -> Company:
    id_, partner_id, created_at, *details = row
    return Company(UUID(bytes=id_), partner_id, CompanyDetails(**dict(zip(_DETAILS, details, strict=True))), created_at)


def _find_replay(connection: Connection, asked: Replay | None, now: Instant) -> Replayed | Refused | None:
    known = find_replay(connection, asked, now)
    if known is None or isinstance(known, Refused):
        return known
    made = find_keys(connection, [known.credential_id])[0]
    if made is None or judge_standing(made, now) is not None:
        return Refused(IdempotencyKeySpent)  # a key that lets nobody in is not worth telling
    return Replayed(UUID(bytes=known.company_id), known.sealed)


def create_company(connection: Connection, new: Company, key: Credential, asked: Replay | None, by: str) -> CompanyOutcome:
    """Add a company with its first key, or say what was made when the same was asked before."""
    known = _find_replay(connection, asked, new.created_at)
    if known is not None:
        return known
    row = {
        "id": new.id.bytes,
        "partner_id": new.partner_id,
        "created_at": new.created_at,
        "canonical_tax_number": canonical_tax_number(new.details.tax_number),
        **asdict(new.details),
    }
    if not insert_unless_there(connection, company, row, rule=COMPANY_TAX_NUMBER):
        # Perhaps the same request, done by another node since it was looked for.
        return _find_replay(connection, asked, new.created_at) or Refused(CompanyExists)
    insert_key(connection, key)
    keep_replay(connection, asked, key, new.created_at)
    now, subject = new.created_at, str(new.id)
    append_audit(connection, "company.created", now=now, by=by, subject=subject, partner_id=new.partner_id, detail=key.masked)
    return Created(new.id, append_change(connection, "company", subject, now))


def find_company(connection: Connection, partner_id: str, company_id: UUID) -> Company | None:
    """The partner's company with this id."""
    query = _COMPANY.where(company.c.id == company_id.bytes, company.c.partner_id == partner_id)
    row = connection.execute(query).one_or_none()
    return _company_of(row) if row is not None else None


def list_companies(connection: Connection, partner_id: str, before: UUID | None, limit: int) -> Sequence[Company]:
    """A page of the partner's companies, newest first: their ids are in the order of their creation."""
    query = _COMPANY.where(company.c.partner_id == partner_id)
    if before is not None:
        query = query.where(company.c.id < before.bytes)
    return [_company_of(row) for row in connection.execute(query.order_by(company.c.id.desc()).limit(limit))]


def roll_company_key(
    connection: Connection,
    company_id: UUID,
    replacement: Credential,
    ends_at: Instant,
    asked: Replay | None,
    now: Instant,
    by: str,
) -> CompanyOutcome:
    """Give a company a new key and let those that it has end."""
    known = _find_replay(connection, asked, now)
    if known is not None:
        return known
    if not _lock_company(connection, replacement.partner_id, company_id):
        return Refused(CompanyNotFound)
    live = _keys_alive(connection, company_id, ends_at)
    insert_key(connection, replacement)
    keep_replay(connection, asked, replacement, now)
    detail = replacement.masked
    end_keys(connection, live, ends_at=ends_at, cause=EndCause.ROTATED, now=now, by=by, detail=detail)
    return Created(company_id, append_change(connection, "company", str(company_id), now))


def delete_company(connection: Connection, partner_id: str, company_id: UUID, now: Instant, by: str) -> Done | Refused:
    """End a company with its keys."""
    if not _lock_company(connection, partner_id, company_id):
        return Refused(CompanyNotFound)
    connection.execute(update(company).where(company.c.id == company_id.bytes).values(deleted_at=now))
    end_keys(connection, _keys_alive(connection, company_id, now), ends_at=now, cause=EndCause.REVOKED, now=now, by=by)
    subject = str(company_id)
    append_audit(connection, "company.deleted", now=now, by=by, subject=subject, partner_id=partner_id)
    return Done(append_change(connection, "company", subject, now))


def _lock_company(connection: Connection, partner_id: str, company_id: UUID) -> bool:
    # The partner first: to add a key is to hold it, and `roll_key` locks a partner before a company of it.
    connection.execute(select(partner.c.id).where(partner.c.id == partner_id).with_for_update(read=True, key_share=True))
    query = select(company.c.id).where(
        company.c.id == company_id.bytes, company.c.partner_id == partner_id, company.c.deleted_at.is_(None)
    )
    return connection.execute(query.with_for_update()).one_or_none() is not None


def _keys_alive(connection: Connection, company_id: UUID, then: Instant) -> Sequence[Credential]:
    # Not those that have ended: each rotation would tell of every key that the company ever had.
    query = CREDENTIALS.where(
        credential.c.company_id == company_id.bytes, or_(credential.c.ends_at.is_(None), credential.c.ends_at > then)
    )
    return [credential_of(row) for row in connection.execute(query)]
