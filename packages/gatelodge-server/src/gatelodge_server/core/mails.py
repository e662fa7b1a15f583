"""Mails: what fills them, when one that was not taken is tried again, and which answers of a mail server are final.

What happens to a mail, in order:

1. A verb of the store queues it in the transaction of what it tells of (``store/outbox.py`` ``queue_mail``, ``queue_notice``):
   there is no change without its mail and no mail without its change.
2. The ``Mailer`` of some node (``mail/mailer.py``) claims it, has it written (``mail/letters.py``) and hands it to a transport.
3. What became of it is judged here and settled in the store: sent, deferred, or given up.

A crash between sending and settling makes a second copy, with the same `Message-ID`; none is lost.
"""

from collections.abc import Mapping
from typing import Final

from gatelodge_server.core.model import DAY, MINUTE, SECOND, Duration, Instant, MailKind

NOTICE_TTL: Final[Duration] = 3 * DAY
"""How long a notice is worth being tried. A code is so for as long as it is good."""

CODES: Final = frozenset({MailKind.VERIFICATION, MailKind.RECOVERY})
"""The mails that hold a code. They are sent before all others."""

NOTICES_AN_HOUR: Final = 5
"""So often is a partner told of things of one kind, or whoever makes them happen could fill a mailbox and the queue."""
IS_LAST: Final = "isLast"
"""The fact by which the last notice of the hour says that it is; any other is without it."""

FACTS: Final[Mapping[MailKind, frozenset[str]]] = {
    MailKind.VERIFICATION: frozenset({"displayName", "organizationName"}),
    MailKind.RECOVERY: frozenset({"displayName", "partnerId"}),
    MailKind.SUSPENDED: frozenset({"displayName", "partnerId"}),
    MailKind.KEY_ROTATED: frozenset({"displayName", "partnerId", "oldKey", "newKey", "endsAt", IS_LAST}),
    MailKind.KEY_RECOVERED: frozenset({"displayName", "partnerId", "newKey", IS_LAST}),
    MailKind.TOKEN_ROTATED: frozenset({"displayName", "partnerId", "label", "oldToken", "newToken", "endsAt", IS_LAST}),
    MailKind.SESSION_REUSED: frozenset({"displayName", "partnerId", "key", "startedAt", IS_LAST}),
    MailKind.DEACTIVATED: frozenset({"displayName", "partnerId", IS_LAST}),
}
"""What a mail of a kind may say: no secret. A fact whose name ends in `At` is an instant in decimal; what was not said is
empty or left out."""

_BACK_OFF: Final[tuple[Duration, ...]] = (5 * SECOND, 15 * SECOND, 45 * SECOND, 2 * MINUTE, 5 * MINUTE)
"""A code lives for ten minutes, and servers that greylist (RFC 6647) want one to five minutes to go by."""
_LAST_BACK_OFF: Final[Duration] = 15 * MINUTE

_FINAL: Final = range(500, 600)
_NOT_THE_MAILS_FAULT: Final = frozenset({530, 534, 535, 538})


def mail_secret_label(mail_id: bytes) -> bytes:
    """The label under which the secret of a mail is sealed (``Sealer.seal``)."""
    return b"mail:" + mail_id


def next_attempt_at(attempts: int, *, now: Instant) -> Instant:
    """When a mail that has been tried ``attempts`` times in vain is due again."""
    return now + (_BACK_OFF[attempts - 1] if 0 < attempts <= len(_BACK_OFF) else _LAST_BACK_OFF)


def is_final(reply: int) -> bool:
    """Whether a reply to RCPT or DATA (RFC 5321 4.2.1) says that this mail will never be taken.

    5yz is; but that the server wants to know us first (RFC 4954 section 6) is a fault of our settings, which can be mended.
    """
    return reply in _FINAL and reply not in _NOT_THE_MAILS_FAULT
