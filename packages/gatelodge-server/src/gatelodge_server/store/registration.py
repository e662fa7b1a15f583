"""Registrations, between the asking for a code and its coming back.

What the caller may not learn, an idle transaction must not tell either: a verb that has nothing to write writes all the same
(``_write_nothing``), since a commit that waits for the disk takes longer than one that does not.
"""

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, and_, case, delete, func, or_, select, update

from gatelodge_server.core.credentials import judge_standing
from gatelodge_server.core.mails import NOTICE_TTL
from gatelodge_server.core.model import DAY, HOUR, EndCause, Instant, MailKind, Origin, Partner, PartnerStatus, Tier
from gatelodge_server.core.ports import (
    Begun,
    Challenge,
    Confirmation,
    Confirmed,
    Limited,
    Mail,
    MailLimits,
    Recovery,
    Refused,
    Registrant,
    Registration,
)
from gatelodge_server.core.ports.registration import LimitName
from gatelodge_server.core.refusals import InvalidVerificationCode, PartnerIdTaken, TierNotFound
from gatelodge_server.core.registration import CODE_ATTEMPTS, DAY_FAILURES
from gatelodge_server.store.clock import time_of
from gatelodge_server.store.keys import CREDENTIALS, credential_of, end_keys, find_keys, insert_key
from gatelodge_server.store.outbox import purge_mails, queue_mail, queue_notice
from gatelodge_server.store.races import Turn, insert_unless_there, unheld, wait_for_turn
from gatelodge_server.store.tables import AnyRow, change, credential, outbox, partner, tier, verification
from gatelodge_server.store.trail import append_audit, append_change

_TO_NEW = (MailKind.VERIFICATION.value,)
_TO_KNOWN = (MailKind.RECOVERY.value, MailKind.SUSPENDED.value)
"""What registration sends to whoever is named: the only mails that its limits count."""
_REGISTERED = select(
    partner.c.id, partner.c.name, partner.c.contact_email, partner.c.status, partner.c.registered_address
).where(partner.c.status != PartnerStatus.DEACTIVATED.value)
_TIER = select(tier.c.name, tier.c.requests_per_hour, tier.c.requests_per_day)
_REGISTRANT = select(
    partner.c.id,
    partner.c.name,
    partner.c.contact_email,
    partner.c.status,
    partner.c.origin,
    partner.c.created_at,
    tier.c.name.label("tier"),
    tier.c.requests_per_hour,
    tier.c.requests_per_day,
).select_from(partner.join(tier, tier.c.name == partner.c.tier))


def begin_registration(connection: Connection, asked: Registration, limits: MailLimits, recovery: Recovery) -> Begun | Limited:
    """Keep a new code in the place of the one before and queue its mail; or do as much to no effect."""
    wait_for_turn(connection, Turn.COUNTING_MAILS)
    found = _lock(connection, asked.address)
    asked = asked.at(time_of(connection, asked.now))
    holder = connection.execute(_REGISTERED.where(partner.c.registered_address == asked.address)).one_or_none()
    is_active = holder is not None and holder.status == PartnerStatus.ACTIVE
    past = _limit_past(connection, asked, limits, _TO_NEW if holder is None else _TO_KNOWN)
    if past is None and is_active and recovery == "off":
        past = "recovery"
    if past is not None:
        _write_nothing(connection, asked.address)
        return Limited(past)
    if holder is not None and not is_active:
        mail = _mail(asked, MailKind.SUSPENDED, holder)
    else:
        _keep_code(connection, asked, found, holder.id if holder is not None else None)
        mail = _mail(asked, MailKind.VERIFICATION if holder is None else MailKind.RECOVERY, holder)
    queue_mail(connection, mail, address=asked.address)
    return Begun(mail.kind)


def _mail(asked: Registration, kind: MailKind, holder: AnyRow | None) -> Mail:
    """What is mailed. To a partner that there is, in its own words and to its own address, whatever the asker has said."""
    if holder is None:
        facts = {"displayName": asked.display_name, "organizationName": asked.organization_name or ""}
    else:
        facts = {"displayName": holder.name, "partnerId": holder.id}
    return Mail(
        id=asked.mail_id,
        kind=kind,
        recipient=asked.contact_email if holder is None else holder.contact_email,
        facts=facts,
        sealed=None if kind is MailKind.SUSPENDED else asked.mail_secret,
        created_at=asked.now,
        expires_at=asked.now + NOTICE_TTL if kind is MailKind.SUSPENDED else asked.expires_at,
    )


def _limit_past(connection: Connection, asked: Registration, limits: MailLimits, kinds: tuple[str, ...]) -> LimitName | None:
    """Which limit keeps this mail back, if any. All are counted in any case, so that it takes equally long.

    ``kinds``: what counts against the overall limit. Against an address counts all that registration has sent to it.
    """
    of_address = select(func.count(case((outbox.c.created_at > asked.now - HOUR, 1))), func.count())
    of_address = of_address.where(outbox.c.address == asked.address, outbox.c.created_at > asked.now - DAY)
    of_hour, of_day = connection.execute(of_address).one()
    of_all = select(func.count()).select_from(outbox).where(outbox.c.created_at > asked.now - HOUR, outbox.c.kind.in_(kinds))
    overall = connection.execute(of_all).scalar_one()
    if overall >= limits.overall:
        return "mails_overall"
    if of_hour >= limits.per_address:
        return "mails_per_address"
    return "mails_per_address_daily" if of_day >= limits.per_address_daily else None


def _keep_code(connection: Connection, asked: Registration, found: AnyRow | None, partner_id: str | None) -> None:
    fresh: dict[str, Any] = {
        "contact_email": asked.contact_email,
        "display_name": asked.display_name,
        "organization_name": asked.organization_name,
        "website_url": asked.website_url,
        "intended_use": asked.intended_use,
        "partner_id": partner_id,
        "salt": asked.salt,
        "digest": asked.digest,
        "created_at": asked.now,
        "expires_at": asked.expires_at,
        "attempts": 0,
        "credential_id": None,
        "sealed": None,
    }
    if found is None:
        counted = {"day_starts_at": _day_of(asked.now), "day_failures": 0}
        insert_unless_there(connection, verification, {"address": asked.address, **fresh, **counted})
    # What was counted against the address today stays (ASVS 6.6.3).
    connection.execute(update(verification).where(verification.c.address == asked.address).values(fresh))


def _write_nothing(connection: Connection, address: str) -> None:
    """Leave everything as it is, in a transaction that has to be written to the disk like any other."""
    if _go_there_and_back(connection, address):
        return
    decoy = {
        "address": address,
        "contact_email": "",
        "display_name": "",
        "salt": b"",
        "digest": b"",
        "created_at": 0,
        "expires_at": 0,
        "attempts": 0,
        "day_starts_at": 0,
        "day_failures": 0,
    }
    if insert_unless_there(connection, verification, decoy):
        connection.execute(delete(verification).where(verification.c.address == address))
    else:  # another node has kept a code meanwhile, which is not ours to delete
        _go_there_and_back(connection, address)


def _go_there_and_back(connection: Connection, address: str) -> bool:
    """Change an address's row twice, if there is one, so that it is as before; whether there is."""
    own = update(verification).where(verification.c.address == address)
    # A database may notice that a row is to become what it is, and write nothing.
    is_there = connection.execute(own.values(attempts=verification.c.attempts + 1)).rowcount == 1
    if is_there:
        connection.execute(own.values(attempts=verification.c.attempts - 1))
    return is_there


def _lock(connection: Connection, address: str) -> AnyRow | None:
    return connection.execute(select(verification).where(verification.c.address == address).with_for_update()).one_or_none()


def _day_of(now: Instant) -> Instant:
    return now - now % DAY


def claim_attempt(connection: Connection, address: str, now: Instant) -> Challenge | None:
    """Count an attempt, if there is one left, and say what to judge it by."""
    found = _lock(connection, address)
    now = time_of(connection, now)
    if found is None:
        _write_nothing(connection, address)
        return None
    day_starts_at = max(found.day_starts_at, _day_of(now))  # a clock that is set back brings no new day
    failures = found.day_failures if day_starts_at == found.day_starts_at else 0
    if now >= found.expires_at or found.attempts >= CODE_ATTEMPTS or failures >= DAY_FAILURES:
        _write_nothing(connection, address)
        return None
    counted = {"attempts": found.attempts + 1, "day_starts_at": day_starts_at, "day_failures": failures + 1}
    connection.execute(update(verification).where(verification.c.address == address).values(counted))
    return Challenge(
        salt=found.salt,
        digest=found.digest,
        created_at=found.created_at,
        partner_id=found.partner_id,
        display_name=found.display_name,
        organization_name=found.organization_name,
        is_confirmed=found.credential_id is not None,
        sealed=found.sealed,
    )


def confirm_registration(connection: Connection, right: Confirmation) -> Confirmed | Refused:
    """Make a partner of a right code, or give the partner that there is a new key in the place of all it has."""
    found = _lock_challenged(connection, right.address, right.challenge)
    if found is None:
        return Refused(InvalidVerificationCode)
    if found.credential_id is not None:
        _take_back(connection, found)
        return Refused(InvalidVerificationCode)
    right = replace(right, now=time_of(connection, right.now))
    outcome = _recover(connection, right, found) if found.partner_id is not None else _admit(connection, right, found)
    if isinstance(outcome, Confirmed):
        done = {"partner_id": outcome.partner_id, "credential_id": right.key.id, "sealed": right.sealed}
        connection.execute(update(verification).where(verification.c.address == right.address).values(done))
        _take_back(connection, found)
    return outcome


def _lock_challenged(connection: Connection, address: str, challenge: Challenge) -> AnyRow | None:
    """The address's row, if its code is still the one that was judged."""
    found = _lock(connection, address)
    if found is None or (found.salt, found.digest) != (challenge.salt, challenge.digest):
        return None
    return found


def _take_back(connection: Connection, found: AnyRow) -> None:
    """The attempt was right after all."""
    counted = {"attempts": max(0, found.attempts - 1), "day_failures": max(0, found.day_failures - 1)}
    connection.execute(update(verification).where(verification.c.address == found.address).values(counted))


def _admit(connection: Connection, right: Confirmation, found: AnyRow) -> Confirmed | Refused:
    allowed = connection.execute(_TIER.where(tier.c.name == right.tier)).one_or_none()
    if allowed is None:
        return Refused(TierNotFound)
    partner_id = _insert_partner(connection, right, found)
    if not isinstance(partner_id, str):
        return partner_id
    _insert_key(connection, right, partner_id)
    append_audit(
        connection,
        "partner.registered",
        now=right.now,
        by="registration",
        subject=partner_id,
        partner_id=partner_id,
        detail=right.key.masked,
    )
    return Confirmed(partner_id, Tier(*allowed), append_change(connection, "partner", partner_id, right.now), is_recovery=False)


def _insert_partner(connection: Connection, right: Confirmation, found: AnyRow) -> str | Refused:
    # Whoever makes a partner of this address has its code's row locked, as we have. Should there be one all the same, its
    # insertion breaks a rule that no candidate helps with: the driver has us look again, and we find it here.
    if connection.execute(_REGISTERED.where(partner.c.registered_address == found.address)).one_or_none() is not None:
        return Refused(InvalidVerificationCode)
    taken = set(connection.execute(select(partner.c.id).where(partner.c.id.in_(right.candidates))).scalars())
    row = {
        "name": found.display_name,
        "contact_email": found.contact_email,
        "tier": right.tier,
        "status": PartnerStatus.ACTIVE.value,
        "origin": Origin.SELF_SERVICE.value,
        "created_at": right.now,
        "registered_address": found.address,
        "organization_name": found.organization_name,
        "website_url": found.website_url,
        "intended_use": found.intended_use,
        # The terms were agreed to in the request that asked for the code.
        "agreed_at": found.created_at,
    }
    for candidate in right.candidates:
        # If another node has given the id to somebody meanwhile, there is the next.
        if candidate not in taken and insert_unless_there(connection, partner, {"id": candidate, **row}):
            return candidate
    return Refused(PartnerIdTaken)


def _recover(connection: Connection, right: Confirmation, found: AnyRow) -> Confirmed | Refused:
    of_partner = _REGISTERED.where(partner.c.id == found.partner_id, partner.c.registered_address == found.address)
    holder = connection.execute(of_partner.with_for_update()).one_or_none()
    if holder is None or holder.status != PartnerStatus.ACTIVE:
        return Refused(InvalidVerificationCode)
    allowed = connection.execute(_REGISTRANT.where(partner.c.id == holder.id)).one()
    own = CREDENTIALS.where(credential.c.partner_id == holder.id, credential.c.company_id.is_(None))
    alive = or_(credential.c.ends_at.is_(None), credential.c.ends_at > right.now)
    # No key is added meanwhile: its row refers to the partner's, which is locked.
    keys = [credential_of(row) for row in connection.execute(own.where(alive))]
    _insert_key(connection, right, holder.id)
    end_keys(
        connection,
        keys,
        ends_at=right.now,
        cause=EndCause.ROTATED,
        now=right.now,
        by="registration",
        detail=right.key.masked,
    )
    append_audit(
        connection,
        "key.recovered",
        now=right.now,
        by="registration",
        subject=right.key.id,
        partner_id=holder.id,
        detail=right.key.masked,
    )
    sequence = append_change(connection, "partner", holder.id, right.now)
    facts = {"newKey": right.key.masked}
    queue_notice(connection, MailKind.KEY_RECOVERED, holder.id, facts, now=right.now, sequence=sequence)
    return Confirmed(holder.id, _tier_of(allowed), sequence, is_recovery=True)


def _insert_key(connection: Connection, right: Confirmation, partner_id: str) -> None:
    insert_key(connection, replace(right.key, partner_id=partner_id))


def repeat_confirmation(connection: Connection, address: str, challenge: Challenge, now: Instant) -> Confirmed | Refused:
    """Say again what a right code had for its effect, while that still stands."""
    found = _lock_challenged(connection, address, challenge)
    now = time_of(connection, now)
    if found is None or found.credential_id is None or found.sealed is None or now >= found.expires_at:
        return Refused(InvalidVerificationCode)
    standing = find_keys(connection, [found.credential_id])[0]
    if standing is None or judge_standing(standing, now) is not None:
        return Refused(InvalidVerificationCode)
    _take_back(connection, found)
    registrant = connection.execute(_REGISTRANT.where(partner.c.id == found.partner_id)).one()
    sequence = connection.execute(select(func.max(change.c.sequence))).scalar_one()
    # Rows of keys are kept for ever, and the key that was shown first had none beside it.
    others = select(credential.c.id).where(credential.c.partner_id == registrant.id, credential.c.company_id.is_(None))
    other = connection.execute(others.where(credential.c.id != found.credential_id).limit(1)).scalar_one_or_none()
    return Confirmed(registrant.id, _tier_of(registrant), sequence, is_recovery=other is not None)


def find_registrant(connection: Connection, partner_id: str) -> Registrant | None:
    """A partner with what its tier allows."""
    row = connection.execute(_REGISTRANT.where(partner.c.id == partner_id)).one_or_none()
    if row is None:
        return None
    found = Partner(
        id=row.id,
        name=row.name,
        contact_email=row.contact_email,
        tier=row.tier,
        status=PartnerStatus(row.status),
        origin=Origin(row.origin),
        created_at=row.created_at,
    )
    return Registrant(found, _tier_of(row))


def _tier_of(row: AnyRow) -> Tier:
    return Tier(row.tier, row.requests_per_hour, row.requests_per_day)


def purge_mails_and_codes(connection: Connection, ended_before: Instant, now: Instant) -> None:
    """Delete mails that have been over since ``ended_before``, and codes as soon as they can be."""
    purge_mails(connection, ended_before, now)
    purge_codes(connection, now)


def purge_codes(connection: Connection, before: Instant) -> None:
    """Delete the rows of codes that have been over since ``before``, once nothing is counted against the address any more."""
    is_over = and_(verification.c.expires_at <= before, verification.c.day_starts_at <= before - DAY)
    connection.execute(delete(verification).where(unheld(verification, is_over)))
