"""The assembly: settings become parts, parts become a deployment. With ``web.py``, the file that knows every class."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypedDict

from slugify import slugify

from gatelodge.tokens import TokenRules
from gatelodge.verify import AccessRing, Verifier
from gatelodge_server.core.access_tokens import AccessTokens
from gatelodge_server.core.companies import Companies
from gatelodge_server.core.credentials import Credentials
from gatelodge_server.core.following import MAX_STALENESS, ChangeFollower
from gatelodge_server.core.housekeeping import Housekeeping
from gatelodge_server.core.model import SECOND, Clock, Entropy, KeyPurpose
from gatelodge_server.core.partners import Partners
from gatelodge_server.core.ports import MailLimits, Store
from gatelodge_server.core.quotas import Quotas
from gatelodge_server.core.records import StoreRecords
from gatelodge_server.core.refresh_tokens import RefreshTokens
from gatelodge_server.core.registration import RegistrationRules, Registrations
from gatelodge_server.core.revocations import Revocations
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.sessions import Sessions
from gatelodge_server.core.signing import SigningKeys
from gatelodge_server.core.tiers import Tiers
from gatelodge_server.core.timekeeping import NodeClock
from gatelodge_server.deployment import system_clock
from gatelodge_server.http.draining import Draining
from gatelodge_server.http.turnstile import Turnstile
from gatelodge_server.log import log
from gatelodge_server.mail.letters import Composer
from gatelodge_server.mail.mailer import Mailer
from gatelodge_server.mail.transports import DirectoryTransport, Login, SmtpTransport, Transport, delete_letters
from gatelodge_server.settings import Settings
from gatelodge_server.store.database import database_at
from gatelodge_server.store.deployment import Marking
from gatelodge_server.store.store import SqlStore
from gatelodge_server.vault import Vault, system_entropy

SMTP_PASSWORD_VARIABLE = "GATELODGE_SMTP_PASSWORD"  # noqa: S105 - a variable's name


_REMEMBERED: Final = 8_192
"""How many credentials a process remembers as good: about a kilobyte each."""


class _Issuance(TypedDict):
    issuer: str
    audience: str
    other_issuers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Lodge:
    """The parts of one deployment, put together. What the command line and the web application share."""

    settings: Settings
    store: Store
    vault: Vault
    clock: NodeClock
    credentials: Credentials
    partners: Partners
    companies: Companies
    tiers: Tiers
    quotas: Quotas
    sessions: Sessions
    signing_keys: SigningKeys
    access_keys: SigningKeys
    access_tokens: AccessTokens
    follower: ChangeFollower
    revocations: Revocations
    verifier: Verifier
    turnstile: Turnstile
    draining: Draining
    mailer: Mailer
    registrations: Registrations
    close: Callable[[], Awaitable[None]]


def open_store(settings: Settings) -> SqlStore:
    """The store that the settings name."""
    database = database_at(settings.database, pool=settings.database_pool)
    marking = Marking(settings.environment, settings.brand, settings.audience)
    return SqlStore(database.driver(on_fault=_log_unavailable), marking=marking, on_fault=_log_unavailable)


def assemble(
    settings: Settings,
    vault: Vault,
    *,
    own_clock: Clock = system_clock,
    entropy: Entropy = system_entropy,
    store_of: Callable[[Settings], SqlStore] = open_store,
    smtp_password: Secret | None = None,
    show_mail: Callable[[str], None] | None = None,
) -> Lodge:
    """Put the parts together.

    ``own_clock`` is this machine's. ``show_mail`` is shown mails that are kept in files because there is no mail server.
    """
    store = store_of(settings)
    clock = NodeClock(store=store, own=own_clock, monotonic=time.monotonic)
    credentials = Credentials(store=store, clock=clock, entropy=entropy, brand=settings.brand, environment=settings.environment)
    signing_keys, access_keys = (
        SigningKeys(
            purpose=purpose,
            store=store,
            sealer=vault,
            clock=clock,
            monotonic=time.monotonic,
            jwt_ttl=jwt_ttl,
            on_unopened=_log_unopened,
        )
        for purpose, jwt_ttl in ((KeyPurpose.SESSION, settings.lifetimes.jwt_ttl), (KeyPurpose.ACCESS, None))
    )
    refresh_tokens = RefreshTokens(
        brand=settings.brand, environment=settings.environment, make_mac=vault.make_mac, check_mac=vault.check_mac
    )
    sessions = Sessions(
        store=store,
        credentials=credentials,
        refresh_tokens=refresh_tokens,
        signing_keys=signing_keys,
        digester=vault,
        clock=clock,
        entropy=entropy,
        issuer=settings.public_url,
        audience=settings.audience,
        environment=settings.environment,
        lifetimes=settings.lifetimes,
    )
    follower = ChangeFollower(store=store, monotonic=time.monotonic, on_mistake=_log_misreading)
    verifier = Verifier(
        signing_keys,
        TokenRules.for_sessions(**_issuance(settings)),
        records=StoreRecords(store=store, credentials=credentials, follower=follower, clock=clock),
        access_ring=AccessRing(access_keys, TokenRules.for_access_tokens(**_issuance(settings))),
        environment=settings.environment,
        remembered=_REMEMBERED,
        clock=lambda: clock() / SECOND,
    )
    revocations = Revocations(
        store=store,
        follower=follower,
        clock=clock,
        monotonic=time.monotonic,
        jwt_ttl=settings.lifetimes.jwt_ttl,
        max_staleness=MAX_STALENESS,
    )
    for hear in (signing_keys.hear, access_keys.hear, verifier.forget, revocations.hear):
        follower.tell(hear)
    quotas = Quotas(store=store, clock=clock, monotonic=time.monotonic, on_mistake=_log_miscount)
    follower.tell(quotas.hear)
    mailer = Mailer(
        store=store,
        transport=transport_of(settings, smtp_password, show_mail),
        composer=Composer(
            sender=settings.mail_from,
            public_url=settings.public_url,
            environment=settings.environment,
            authority=settings.local_authority,
        ),
        sealer=vault,
        clock=clock,
    )
    return Lodge(
        settings=settings,
        store=store,
        vault=vault,
        clock=clock,
        credentials=credentials,
        partners=Partners(store=store, credentials=credentials, clock=clock, slugify=slug_of),
        companies=Companies(store=store, credentials=credentials, sealer=vault, digester=vault, clock=clock, entropy=entropy),
        tiers=Tiers(store=store, clock=clock),
        quotas=quotas,
        sessions=sessions,
        signing_keys=signing_keys,
        access_keys=access_keys,
        access_tokens=AccessTokens(
            store=store,
            signing_keys=access_keys,
            clock=clock,
            entropy=entropy,
            issuer=settings.public_url,
            audience=settings.audience,
            environment=settings.environment,
        ),
        follower=follower,
        revocations=revocations,
        verifier=verifier,
        turnstile=Turnstile(quotas=quotas, clock=clock),
        draining=Draining(),
        mailer=mailer,
        registrations=Registrations(
            store=store,
            credentials=credentials,
            sealer=vault,
            digester=vault,
            clock=clock,
            entropy=entropy,
            slugify=slug_of,
            rules=RegistrationRules(
                tier=settings.registration_tier,
                recovery=settings.recovery,
                limits=MailLimits(settings.mails_per_address, settings.mails_overall, settings.mails_per_address_daily),
            ),
            on_mail_queued=mailer.wake,
        ),
        close=store.close,
    )


def transport_of(settings: Settings, password: Secret | None, show: Callable[[str], None] | None) -> Transport:
    """Where mails go."""
    if settings.smtp is None:
        return DirectoryTransport(settings.data / "outbox", show=show or (lambda _: None))
    login = Login(settings.smtp_user, password) if settings.smtp_user and password is not None else None
    return SmtpTransport(settings.smtp, login=login)


def _issuance(settings: Settings) -> _Issuance:
    return {
        "issuer": settings.public_url,
        "audience": settings.audience,
        "other_issuers": settings.other_issuers - {settings.public_url},
    }


def _log_unavailable(fault: str) -> None:
    log.error("store_unavailable", fault=fault)


def _log_unopened(kid: str) -> None:
    log.error("signing_key_unopened", kid=kid)


def _log_purge(count: int) -> None:
    if count:
        log.info("sessions_purged", count=count)


def _log_misreading(mistake: Exception) -> None:
    log.error("following_failed", kind=type(mistake).__qualname__)


def _log_mistake(mistake: Exception) -> None:
    log.error("housekeeping_failed", kind=type(mistake).__qualname__)


def _log_miscount(mistake: Exception) -> None:
    log.error("quotas_failed", kind=type(mistake).__qualname__)


def slug_of(name: str) -> str:
    """A partner id from a name: lower-case ASCII, digits and hyphens, at most 48 characters."""
    return str(slugify(name, max_length=48, word_boundary=True))


@asynccontextmanager
async def at_work(lodge: Lodge) -> AsyncIterator[None]:
    """Keep the time, make the first signing keys, follow changes, keep house, send mails, give back quotas.

    That is all that goes on beside requests.
    Whoever puts a gate of this deployment into an application of their own enters it for as long as that runs; afterwards
    everything that was begun is finished and the store is let go.
    """
    try:
        await lodge.clock.look()
        await lodge.store.note_issuer(lodge.settings.public_url, now=lodge.clock())
        await lodge.signing_keys.establish()
        await lodge.access_keys.establish()
    except BaseException:
        await lodge.close()
        raise
    outbox = lodge.settings.data / "outbox"  # there may be letters in it from before there was a mail server
    housekeeping = Housekeeping(
        store=lodge.store,
        clock=lodge.clock,
        on_purged=_log_purge,
        on_mistake=_log_mistake,
        delete_letters=lambda before: delete_letters(outbox, before=before),
    )
    works = (lodge.clock.run, lodge.store.listen, lodge.follower.run, lodge.revocations.run, housekeeping.run)
    tasks = [asyncio.create_task(work()) for work in works]
    mailing = asyncio.create_task(lodge.mailer.run())
    counting = asyncio.create_task(lodge.quotas.run())
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        lodge.mailer.stop()
        await mailing
        await lodge.quotas.close()  # which ends `run` too
        await counting
        await lodge.close()
