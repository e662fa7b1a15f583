"""The mailer: takes mails out of the outbox, for as long as the service runs, and says what became of each.

It may be running in every process of every node: a claim is one node's. ``core/mails.py`` tells of a mail's whole way.
"""

import asyncio
import contextlib
from typing import Final

from gatelodge.errors import Unavailable
from gatelodge_server.core.mails import mail_secret_label, next_attempt_at
from gatelodge_server.core.model import SECOND, Clock, Duration, Instant
from gatelodge_server.core.ports import Deferred, GivenUp, Mail, MailOutcome, RegistrationStore, Sealer, Sent
from gatelodge_server.core.secrets import Secret
from gatelodge_server.log import log
from gatelodge_server.mail.letters import Composer, Undeliverable
from gatelodge_server.mail.transports import NotLoggedIn, NotTaken, Transport

AT_ONCE: Final = 4
"""Mails on their way at the same time: one server that is slow to answer does not hold up the rest."""
CLAIM_TTL: Final[Duration] = 90 * SECOND
"""Longer than a letter may take (``Patience``): nobody else begins with a mail that is still on its way."""


class Mailer:
    """Empties the outbox.

    ``poll``: seconds after which it looks again, since others queue mails too. ``grace``: seconds that what is on its way is
    given when the service stops.
    """

    def __init__(
        self,
        *,
        store: RegistrationStore,
        transport: Transport,
        composer: Composer,
        sealer: Sealer,
        clock: Clock,
        poll: float = 1.0,
        grace: float = 5.0,
    ) -> None:
        self._store = store
        self._transport = transport
        self._composer = composer
        self._sealer = sealer
        self._clock = clock
        self._poll = poll
        self._grace = grace
        self._woken = asyncio.Event()
        self._stopping = False
        self._under_way: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """There may be a mail: look now."""
        self._woken.set()

    def stop(self) -> None:
        """Take no more mails; ``run`` returns when those under way are done, or their grace is over."""
        self._stopping = True
        self._woken.set()

    async def run(self) -> None:
        """Send what is due until told to stop. No fault of a mail, a server or the store ends it."""
        try:
            while not self._stopping:
                self._woken.clear()
                for mail in await self._claim():
                    task = asyncio.create_task(self._deliver(mail))
                    self._under_way.add(task)
                    task.add_done_callback(self._free)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll):
                        await self._woken.wait()
            if self._under_way:
                await asyncio.wait(self._under_way, timeout=self._grace)
        finally:
            # What is cut off here is due again when its claim lapses.
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def drain(self) -> int:
        """Send all that is due now, once, and return how many mails that were."""
        count = 0
        while mails := await self._claim():
            count += len(mails)
            await asyncio.gather(*(self._deliver(mail) for mail in mails))
        return count

    def _free(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._woken.set()

    async def _claim(self) -> list[Mail]:
        free = AT_ONCE - len(self._under_way)
        if free == 0:
            return []
        now = self._clock()
        try:
            return list(await self._store.claim_mails(limit=free, now=now, until=now + CLAIM_TTL))
        except Unavailable:
            return []  # the store has said so already
        except Exception as mistake:  # noqa: BLE001 - whatever it is, the next look may do without it
            log.error("mailer_failed", kind=type(mistake).__qualname__)
            return []

    async def _deliver(self, mail: Mail) -> None:
        outcome = await self._try(mail)
        _report(mail, outcome)
        while True:
            try:
                await self._store.settle_mail(mail.id, outcome, now=self._now(mail))
            except Unavailable:
                await asyncio.sleep(self._poll)  # or a mail that was sent would be sent again
            except Exception as mistake:  # noqa: BLE001 - its claim lapses, and it is tried again
                log.error("mailer_failed", kind=type(mistake).__qualname__)
                return
            else:
                return

    async def _try(self, mail: Mail) -> MailOutcome:
        if self._now(mail) >= mail.expires_at:
            return GivenUp("its time was over")
        code: Secret | None = None
        try:
            code = self._open(mail)
            await self._transport.send(self._composer.compose(mail, code))
        except Undeliverable as fault:
            return GivenUp(_scrub(str(fault), code))
        except NotLoggedIn as fault:
            log.error("mail_login_refused", fault=_scrub(str(fault), code))
            return self._deferred(mail, _scrub(str(fault), code))
        except NotTaken as fault:
            return self._deferred(mail, _scrub(str(fault), code))
        except Exception as mistake:  # noqa: BLE001 - ours to mend: one mail must not keep the others
            return self._deferred(mail, type(mistake).__qualname__)
        return Sent()

    def _now(self, mail: Mail) -> Instant:
        """The time by the clock that the mail's instants are of."""
        return self._clock() + mail.ahead

    def _open(self, mail: Mail) -> Secret | None:
        if mail.sealed is None:
            return None
        try:
            return Secret(self._sealer.open(mail.sealed, label=mail_secret_label(mail.id)).decode("ascii"))
        except ValueError as fault:
            raise Undeliverable("its code was sealed under a master key that is gone") from fault

    def _deferred(self, mail: Mail, fault: str) -> MailOutcome:
        due_at = next_attempt_at(mail.attempts, now=self._now(mail))
        return Deferred(due_at, fault) if due_at < mail.expires_at else GivenUp(fault)


def _scrub(fault: str, code: Secret | None) -> str:
    """A server may say again what it was told."""
    return fault if code is None else fault.replace(code.reveal(), "…")


def _report(mail: Mail, outcome: MailOutcome) -> None:
    about = {"mail": mail.id.hex(), "kind": mail.kind.value, "attempts": mail.attempts}
    match outcome:
        case Deferred(due_at, fault):
            log.warning("mail_deferred", **about, fault=fault, due_at=due_at)
        case GivenUp(fault):
            log.error("mail_given_up", **about, fault=fault)
        case _:
            log.info("mail_sent", **about)
