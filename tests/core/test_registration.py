"""Registration: codes, how they are judged, and who is let in by them."""

import asyncio
import hashlib
import os
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
from email_validator import validate_email
from given import AROUND, a_company, a_key, a_partner
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from gatelodge.errors import CredentialRotated, InvalidCredential, Unavailable
from gatelodge_server.app import slug_of
from gatelodge_server.core.mails import mail_secret_label
from gatelodge_server.core.model import DAY, HOUR, MINUTE, MailKind, PartnerStatus
from gatelodge_server.core.ports import MailLimits
from gatelodge_server.core.refusals import (
    IdempotencyKeyReused,
    IdempotencyKeySpent,
    InvalidVerificationCode,
    KeyEnded,
    KeyNotFound,
    NotAllowed,
    PartnerNotFound,
    TierNotFound,
    TooManyRequests,
)
from gatelodge_server.core.registration import (
    CODE_TTL,
    NewRegistration,
    RegistrationRules,
    Registrations,
    SlowDigests,
    canonical_address,
    slow_digest,
    verification_code,
)
from gatelodge_server.core.secrets import Secret
from gatelodge_server.store.tables import metadata

EMAIL = "Dev@acme.example"
RULES = RegistrationRules(tier="starter", recovery="on", limits=MailLimits(1000, 1000, per_address_daily=100_000))


@dataclass
class Desk:
    """Registrations over a lodge, and the mails that they send."""

    lodge: object
    registrations: Registrations
    wakes: list

    def with_rules(self, **changes):
        return replace(self, registrations=make(self.lodge, self.wakes, replace(RULES, **changes)))

    async def register(self, email=EMAIL, **said):
        new = NewRegistration(**{"contact_email": email, "display_name": "Acme Motors", **said})
        return (await self.registrations.register(new)).expires_at

    async def mails(self, *kinds):
        """What was sent, in the order of its sending."""
        claimed = await self.lodge.store.claim_mails(limit=1000, now=self.lodge.clock.now, until=self.lodge.clock.now)
        return sorted((mail for mail in claimed if not kinds or mail.kind in kinds), key=lambda mail: mail.created_at)

    async def code(self, email=EMAIL, **said):
        """Register, and read the mail."""
        self.lodge.clock.forward(1)
        await self.register(email, **said)
        mail = (await self.mails(MailKind.VERIFICATION, MailKind.RECOVERY))[-1]
        return Secret(self.lodge.vault.open(mail.sealed, label=mail_secret_label(mail.id)).decode())

    async def verify(self, code, email=EMAIL):
        return await self.registrations.verify(email, code)

    async def verified(self, email=EMAIL, **said):
        return await self.verify(await self.code(email, **said), email)

    async def is_refused(self, code, email=EMAIL):
        with pytest.raises(InvalidVerificationCode):
            await self.verify(code, email)
        return True

    async def lets_in(self, key):
        try:
            return (await self.lodge.credentials.authenticate(key)).partner_id
        except (CredentialRotated, InvalidCredential):
            return None


def make(lodge, wakes, rules, *, sealer=None, digester=None):
    return Registrations(
        store=lodge.store,
        credentials=lodge.credentials,
        sealer=sealer or lodge.vault,
        digester=digester or lodge.vault,
        clock=lodge.clock,
        entropy=os.urandom,
        slugify=slug_of,
        rules=rules,
        on_mail_queued=lambda: wakes.append(lodge.clock.now),
    )


@pytest.fixture
def desk(lodge):
    wakes = []
    return Desk(lodge, make(lodge, wakes, RULES), wakes)


def other_than(code):
    return Secret(f"{(int(code.reveal()) + 1) % 10**6:06}")


# --- Addresses ---


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Mike@example.com", "mike@example.com", True),
        ("mike@EXAMPLE.com", "mike@example.com", True),
        ("m\N{LATIN SMALL LETTER DOTLESS I}ke@example.com", "mike@example.com", False),
        ("M\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}KE@example.com", "mike@example.com", False),
        ("mi\N{KELVIN SIGN}e@example.com", "mike@example.com", True),
        ("\N{LATIN SMALL LIGATURE FI}nn@example.com", "finn@example.com", True),
        ("stra\N{LATIN SMALL LETTER SHARP S}e@example.com", "strasse@example.com", True),
        ("\N{FULLWIDTH LATIN SMALL LETTER M}ike@example.com", "mike@example.com", True),
        ("m\N{CYRILLIC SMALL LETTER BYELORUSSIAN-UKRAINIAN I}ke@example.com", "mike@example.com", False),
        ("e\N{COMBINING ACUTE ACCENT}va@example.com", "\N{LATIN SMALL LETTER E WITH ACUTE}va@example.com", True),
        ("mike@stra\N{LATIN SMALL LETTER SHARP S}e.de", "mike@strasse.de", False),
        ("mike@stra\N{LATIN SMALL LETTER SHARP S}e.de", "mike@xn--strae-oqa.de", True),
        ("mike@STRA\N{LATIN CAPITAL LETTER SHARP S}E.de", "mike@stra\N{LATIN SMALL LETTER SHARP S}e.de", True),
        ("mike@b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.de", "mike@XN--BCHER-KVA.de", True),
        ("mike@bu\N{COMBINING DIAERESIS}cher.de", "mike@b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.de", True),
        ("mike@ex\N{CYRILLIC SMALL LETTER A}mple.com", "mike@example.com", False),
        ("mike+a@example.com", "mike@example.com", False),
        ("m.ike@example.com", "mike@example.com", False),
    ],
)
def test_r64_addresses_are_compared_in_one_form(one, other, same):
    normalised = [validate_email(text, check_deliverability=False).normalized for text in (one, other)]
    assert (canonical_address(normalised[0]) == canonical_address(normalised[1])) is same


@pytest.mark.parametrize(
    "domain",
    ["example.com", "b\xfccher.de", "stra\xdfe.de", "\u4f8b\u3048.\u30c6\u30b9\u30c8.jp", "\u05d0\u05d1.com", "xn--fa-hia.de"],
)
def test_r64_a_domain_is_compared_as_its_a_labels(domain):
    checked = validate_email(f"mike@{domain}", check_deliverability=False)
    assert canonical_address(checked.normalized) == f"mike@{checked.ascii_domain}"


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_r64_the_canonical_form_of_an_address_is_its_own_canonical_form(local, domain):
    once = canonical_address(f"{local}@{domain.replace('@', '')}")
    assert canonical_address(once) == once


async def test_r64_a_mail_goes_to_the_address_that_is_on_record(desk):
    """CVE-2019-19844: the twin of an address must not get the owner's code."""
    await desk.verified("mike@example.com")
    for twin in ("mi\N{KELVIN SIGN}e@example.com", "MIKE@example.com"):
        desk.lodge.clock.forward(1)
        await desk.register(twin, display_name="Mallory")
    recoveries = await desk.mails(MailKind.RECOVERY)
    assert [mail.recipient for mail in recoveries] == ["mike@example.com"] * 2
    assert {mail.facts["displayName"] for mail in recoveries} == {"Acme Motors"}


# --- Codes ---


def test_r56_every_code_is_as_likely_as_any_other():
    codes = [verification_code(os.urandom) for _ in range(100_000)]
    assert all(len(code) == 6 and code.isascii() and code.isdigit() for code in codes)
    for place in range(6):
        counts = Counter(code[place] for code in codes)
        chi_square = sum((counts[digit] - 10_000) ** 2 / 10_000 for digit in "0123456789")
        assert chi_square < 44  # nine degrees of freedom: once in a million runs
    halves = Counter(int(code) // 1000 for code in codes)
    chi_square = sum((halves[thousand] - 100) ** 2 / 100 for thousand in range(1000))
    assert 780 < chi_square < 1230  # 999 degrees of freedom: once in a million runs


def test_r56_a_draw_that_would_favour_the_lower_codes_is_drawn_again():
    fair = 2**32 // 10**6 * 10**6
    draws = iter([2**32 - 1, fair, fair - 1])
    assert verification_code(lambda size: next(draws).to_bytes(size)) == "999999"
    assert verification_code(bytes) == "000000"


async def test_r60_what_is_stored_of_a_code_is_slow_salted_and_keyed(desk):
    code = await desk.code()
    table = metadata.tables["verification"]
    engine = desk.lodge.backend.engine()
    with engine.connect() as connection:
        row = connection.execute(select(table)).one()
    engine.dispose()
    keyed = desk.lodge.vault.digest(f"dev@acme.example\n{code.reveal()}".encode(), purpose="verification-code")
    assert row.digest == hashlib.scrypt(keyed, salt=row.salt, n=2**14, r=8, p=1, dklen=32) == slow_digest(keyed, row.salt)
    assert len(row.salt) == 16
    assert row.digest != hashlib.scrypt(code.reveal().encode(), salt=row.salt, n=2**14, r=8, p=1, dklen=32)
    plain = desk.lodge.backend.path.read_bytes()
    log = desk.lodge.backend.path.with_name(desk.lodge.backend.path.name + "-wal").read_bytes()
    assert f">{code.reveal()}<".encode() not in plain + log  # the mails' experiments search more closely


@pytest.mark.parametrize(("full", "other"), [("register", "verify"), ("verify", "register")])
def test_there_are_so_many_places_for_slow_digests_of_each_purpose(vault, full, other):
    digests = SlowDigests(digester=vault)
    with ExitStack() as places:
        for _ in range(64):
            places.enter_context(digests.place(full))
        with pytest.raises(Unavailable), digests.place(full):
            pass
        with digests.place(other):
            pass
    with digests.place(full):
        pass


async def test_a_registration_for_which_there_is_no_place_is_not_counted_against_its_sender(desk):
    admitted = []

    async def admit():
        admitted.append(1)

    new = NewRegistration(contact_email=EMAIL, display_name="Acme Motors")
    asked = (desk.registrations.register(new, admit=admit) for _ in range(80))
    outcomes = Counter(type(outcome) for outcome in await asyncio.gather(*asked, return_exceptions=True))
    assert (outcomes[Unavailable], len(admitted), len(await desk.mails())) == (16, 64, 64)


async def test_a_sender_who_is_not_admitted_causes_no_mail_and_gives_its_place_back(desk):
    async def admit():
        raise TooManyRequests(1)

    new = NewRegistration(contact_email=EMAIL, display_name="Acme Motors")
    for _ in range(65):
        with pytest.raises(TooManyRequests):
            await desk.registrations.register(new, admit=admit)
    assert await desk.mails() == []


async def test_an_attempt_for_which_there_is_no_place_is_not_counted(desk):
    code = await desk.code()
    wrong = other_than(code)
    outcomes = await asyncio.gather(*(desk.verify(wrong) for _ in range(80)), return_exceptions=True)
    kinds = Counter(type(outcome) for outcome in outcomes)
    assert kinds == {InvalidVerificationCode: 64, Unavailable: 16}


@pytest.mark.parametrize("offset", AROUND)
async def test_r57_a_code_is_good_for_ten_minutes(desk, offset):
    code = await desk.code()
    desk.lodge.clock.forward(CODE_TTL + offset)
    if offset < 0:
        assert (await desk.verify(code)).partner_id == "acme-motors"
    else:
        assert await desk.is_refused(code)


async def test_the_moment_of_expiry_is_told_alike_for_every_address(desk):
    await desk.verified()
    for email in (EMAIL, "nobody@acme.example"):
        assert await desk.register(email) == desk.lodge.clock.now + 10 * MINUTE


async def test_r58_a_new_code_kills_the_older(desk):
    older, newer = await desk.code(), await desk.code()
    assert await desk.is_refused(older)
    assert (await desk.verify(newer)).partner_id == "acme-motors"


async def test_r58_a_code_is_bound_to_its_address(desk):
    codes = {email: await desk.code(email) for email in ("a@acme.example", "b@acme.example")}
    assert await desk.is_refused(codes["a@acme.example"], "b@acme.example")
    assert (await desk.verify(codes["a@acme.example"], "A@acme.example")).partner_id == "acme-motors"


async def test_r59_the_sixth_attempt_is_refused_even_if_right(desk):
    code = await desk.code()
    for _ in range(5):
        assert await desk.is_refused(other_than(code))
    assert await desk.is_refused(code)


async def test_r59_the_fifth_attempt_is_judged(desk):
    code = await desk.code()
    for _ in range(4):
        assert await desk.is_refused(other_than(code))
    assert (await desk.verify(code)).partner_id == "acme-motors"


async def test_r59_after_twenty_five_failures_in_a_day_no_new_code_helps(desk):
    for _ in range(5):
        code = await desk.code()
        for _ in range(5):
            assert await desk.is_refused(other_than(code))
    assert await desk.is_refused(await desk.code())
    desk.lodge.clock.forward(DAY)
    assert (await desk.verified()).partner_id == "acme-motors"


@pytest.mark.parametrize(
    "nonsense", ["", "12345", "1234567", "\u0661\u0662\u0663\u0664\u0665\u0666", "\ud800", "1" * 60_000, "12\n456"]
)
async def test_whatever_is_no_code_is_a_wrong_code(desk, nonsense):
    code = await desk.code()
    assert await desk.is_refused(Secret(nonsense))
    assert await desk.is_refused(Secret(nonsense), "nobody@acme.example")
    assert (await desk.verify(code)).partner_id == "acme-motors"


async def test_r62_whatever_is_known_of_an_address_one_slow_digest_is_made(desk):
    """The work that takes time is the same for every address."""
    made = []

    class Counting:
        def digest(self, message, *, purpose):
            made.append(message.partition(b"\n")[0].decode())
            return desk.lodge.vault.digest(message, purpose=purpose)

    code = await desk.code()
    counted = replace(desk, registrations=make(desk.lodge, [], RULES, digester=Counting()))
    for email in (EMAIL, "nobody@acme.example"):
        await counted.register(email)
        assert await counted.is_refused(code, email)
    desk.lodge.clock.forward(CODE_TTL)
    assert await counted.is_refused(code)
    assert made == ["dev@acme.example"] * 2 + ["nobody@acme.example"] * 2 + ["dev@acme.example"]


# --- What a right code does ---


async def test_a_right_code_gives_a_key_that_works(desk):
    key = await desk.verified(organization_name="Acme Motors GmbH & Co. KG")
    assert (key.partner_id, key.tier.name, key.expires_at) == ("acme-motors-gmbh-co-kg", "starter", None)
    assert await desk.lets_in(key.api_key) == key.partner_id
    assert len(desk.wakes) == 2


@pytest.mark.parametrize(
    ("organization", "display", "slug"),
    [
        ("Bücher AG", "Eva", "bucher-ag"),
        (None, "Eva", "eva"),
        ("!!!", "Eva", "partner"),
        ("株式会社", "Eva", "zhu-shi-hui-she"),
    ],
)
async def test_r53_the_id_comes_from_the_organisation_or_else_the_name(desk, organization, display, slug):
    assert (await desk.verified(organization_name=organization, display_name=display)).partner_id == slug


async def test_r53_ids_are_numbered_up_to_fifty_and_then_random(desk):
    ids = ["acme-motors", *(f"acme-motors-{number}" for number in range(2, 50))]
    for id_ in ids:
        await desk.lodge.store.add_partner(a_partner(id_), a_key(id_), by="test")
    assert (await desk.verified("a@acme.example")).partner_id == "acme-motors-50"
    assert re.fullmatch(r"acme-motors-[0-9a-f]{10}", (await desk.verified("b@acme.example")).partner_id)


async def test_a_tier_that_is_not_there_lets_nobody_register(desk):
    with pytest.raises(TierNotFound):
        await desk.with_rules(tier="golden").verified()


async def test_a_lost_answer_to_a_verification_is_given_again(desk):
    code = await desk.code()
    first = await desk.verify(code)
    assert await desk.is_refused(other_than(code))
    again = await desk.verify(code)
    assert (again.api_key.reveal(), again.partner_id, again.tier) == (first.api_key.reveal(), first.partner_id, first.tier)
    await desk.lodge.sessions.log_in(first.api_key)
    assert await desk.is_refused(code)


async def test_r59_wrong_guesses_after_the_success_count_too(desk):
    code = await desk.code()
    await desk.verify(code)
    for _ in range(5):
        assert await desk.is_refused(other_than(code))
    assert await desk.is_refused(code)


async def test_of_verifications_at_once_all_hear_the_same_answer(desk):
    code = await desk.code()
    keys = await asyncio.gather(*(desk.verify(code) for _ in range(3)))
    assert len({key.api_key.reveal() for key in keys}) == 1
    assert len(await desk.lodge.store.list_keys("acme-motors")) == 1


async def test_a_partner_that_was_suspended_meanwhile_gets_neither_an_answer_again_nor_a_new_key(desk):
    code = await desk.code()
    key = await desk.verify(code)
    await desk.lodge.partners.suspend(key.partner_id, by="test")
    assert await desk.is_refused(code)
    await desk.lodge.partners.resume(key.partner_id, by="test")
    recovery = await desk.code()
    await desk.lodge.partners.suspend(key.partner_id, by="test")
    assert await desk.is_refused(recovery)
    assert len(await desk.lodge.store.list_keys(key.partner_id)) == 1


async def test_an_answer_whose_master_key_is_gone_is_not_given_again(desk):
    code = await desk.code()
    await desk.verify(code)

    class Forgetful:
        def open(self, sealed, *, label):
            raise ValueError

    other = make(desk.lodge, [], RULES, sealer=Forgetful())
    with pytest.raises(InvalidVerificationCode):
        await other.verify(EMAIL, code)


async def test_an_active_partner_that_has_lost_its_key_gets_another_under_its_id_and_tier(desk):
    old = await desk.verified()
    new = await desk.with_rules(tier="golden").verified(display_name="Mallory", organization_name="Evil")
    assert (new.partner_id, new.tier) == (old.partner_id, old.tier)
    assert await desk.lets_in(old.api_key) is None
    assert await desk.lets_in(new.api_key) == old.partner_id
    partner = await desk.lodge.store.find_partner(old.partner_id)
    assert (partner.name, partner.contact_email) == ("Acme Motors", EMAIL)
    assert [mail.recipient for mail in await desk.mails(MailKind.KEY_RECOVERED)] == [EMAIL]


async def test_a_deactivated_partners_address_registers_anew(desk):
    first = await desk.verified()
    assert (await desk.registrations.deactivate(first.api_key)).partner_id == first.partner_id
    second = await desk.verified()
    assert second.partner_id == "acme-motors-2"
    assert (await desk.lodge.store.find_partner(first.partner_id)).status is PartnerStatus.DEACTIVATED


async def test_only_a_partner_that_has_registered_itself_deactivates_itself(desk):
    _, managed = await desk.lodge.new_partner()
    for presented, reason in ((managed, NotAllowed), (Secret("nobody"), InvalidCredential)):
        with pytest.raises(reason):
            await desk.registrations.deactivate(presented)


async def test_p11_a_rotation_asks_the_store_for_nothing_once_it_is_done(desk):
    """The new key would be lost with an answer that is 503 because of what was read after it was made."""
    old = await desk.verified()
    desk.lodge.store.asked.clear()
    await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key="again")
    await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key="again")
    assert desk.lodge.store.asked == ["roll_own_key"] * 2


async def test_r65_whoever_registers_anothers_address_first_is_left_with_nothing(desk):
    """Pre-hijacking: the attacker cannot read the mail; whatever it prepared is dead once the owner verifies."""
    attackers = await desk.code("victim@acme.example", display_name="Mallory", organization_name="Evil")
    guesses = [other_than(attackers)]
    for guess in guesses:
        assert await desk.is_refused(guess, "victim@acme.example")
    key = await desk.verified("victim@acme.example", display_name="Victim")
    assert key.partner_id == "victim"
    assert await desk.is_refused(attackers, "victim@acme.example")
    assert await desk.lets_in(key.api_key) == "victim"
    keys = await desk.lodge.store.list_keys("victim")
    partners = await desk.lodge.store.list_partners()
    assert ([found.id for found in partners], len(keys)) == (["victim"], 1)
    partner = (await desk.lodge.store.find_registrant("victim")).partner
    assert (partner.name, partner.contact_email) == ("Victim", "victim@acme.example")


async def test_r65_a_code_that_was_asked_for_before_the_owner_verified_recovers_nothing(desk):
    await desk.verified("victim@acme.example")
    recovery = await desk.code("victim@acme.example", display_name="Mallory")
    mail = (await desk.mails(MailKind.RECOVERY))[-1]
    assert mail.recipient == "victim@acme.example"  # only its owner reads it
    desk.lodge.clock.forward(CODE_TTL)
    assert await desk.is_refused(recovery, "victim@acme.example")


async def test_r63_mails_are_counted_by_the_hour(desk):
    strict = desk.with_rules(limits=MailLimits(2, 1000, per_address_daily=100_000))
    for _ in range(4):
        await strict.register()
    assert len(await desk.mails()) == 2
    desk.lodge.clock.forward(HOUR)
    await strict.register()
    assert len(await desk.mails()) == 3


# --- The partner's own key ---


async def test_a_partner_rotates_its_key(desk):
    old = await desk.verified()
    new = await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key=None)
    assert (new.partner_id, new.tier, new.expires_at) == (old.partner_id, old.tier, None)
    assert (await desk.lets_in(old.api_key), await desk.lets_in(new.api_key)) == (None, old.partner_id)
    with pytest.raises(CredentialRotated):
        await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key=None)


@pytest.mark.parametrize("offset", AROUND)
async def test_a_rotated_key_works_on_for_its_overlap(desk, offset):
    old = await desk.verified()
    await desk.registrations.rotate(old.api_key, overlap=HOUR, idempotency_key=None)
    with pytest.raises(KeyEnded):
        await desk.registrations.rotate(old.api_key, overlap=HOUR, idempotency_key=None)
    desk.lodge.clock.forward(HOUR + offset)
    assert await desk.lets_in(old.api_key) == (old.partner_id if offset < 0 else None)


async def test_p11_a_lost_answer_to_a_rotation_is_given_again(desk):
    old = await desk.verified()

    async def rotate(overlap=0, key=old.api_key, idempotency_key="again"):
        return await desk.registrations.rotate(key, overlap=overlap, idempotency_key=idempotency_key)

    first = await rotate()
    again = await rotate()
    assert (again.api_key.reveal(), again.partner_id, again.tier) == (first.api_key.reveal(), first.partner_id, first.tier)
    with pytest.raises(IdempotencyKeyReused):
        await rotate(overlap=HOUR)
    with pytest.raises(CredentialRotated):
        await rotate(idempotency_key="another")
    third = await rotate(key=first.api_key)  # another key, so another request
    assert third.api_key.reveal() != first.api_key.reveal()
    with pytest.raises(IdempotencyKeySpent):
        await rotate()


@pytest.mark.parametrize("offset", AROUND)
async def test_p11_a_lost_answer_to_a_rotation_is_given_again_for_ten_minutes(desk, offset):
    old = await desk.verified()
    first = await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key="again")
    desk.lodge.clock.forward(10 * MINUTE + offset)
    if offset < 0:
        again = await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key="again")
        assert again.api_key.reveal() == first.api_key.reveal()
    else:
        with pytest.raises(IdempotencyKeySpent):
            await desk.registrations.rotate(old.api_key, overlap=0, idempotency_key="again")


async def test_only_a_partners_own_key_is_rotated(desk):
    _, managed = await desk.lodge.new_partner()
    assert (await desk.registrations.rotate(managed, overlap=0, idempotency_key=None)).partner_id == "acme-motors"
    for nonsense in ("", "nonsense", managed.reveal()[:-1] + "x"):
        with pytest.raises(InvalidCredential):
            await desk.registrations.rotate(Secret(nonsense), overlap=0, idempotency_key=None)


async def test_a_companys_key_is_not_rotated(desk):
    partner_id, _ = await desk.lodge.new_partner()
    company = await desk.lodge.companies.create(partner_id, a_company().details, idempotency_key=None)
    with pytest.raises(NotAllowed):
        await desk.registrations.rotate(company.api_key, overlap=0, idempotency_key=None)


async def test_a_partner_and_its_key_are_described(desk):
    key = await desk.verified()
    holder = await desk.lodge.credentials.authenticate(key.api_key)
    registrant, credential = await desk.registrations.describe(holder.partner_id, holder.credential_id)
    assert (registrant.partner.id, registrant.tier, credential.id) == (key.partner_id, key.tier, holder.credential_id)
    with pytest.raises(KeyNotFound):
        await desk.registrations.describe(holder.partner_id, "nothing")
    with pytest.raises(PartnerNotFound):
        await desk.registrations.describe("nobody", holder.credential_id)
