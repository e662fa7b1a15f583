"""What the core asks of the outside: a store, and somebody who keeps secrets.

Each verb of a store is one decision: it is read, decided and written in one transaction, and **committed when it returns**. So
a refusal that follows a verb can never undo what the verb did. What may be expected to happen comes back as a value; a verb
raises only ``gatelodge.errors.Unavailable``, when nothing is known to have been done.

Where callers on several machines share a store, it has a clock that decides what they must agree on (``tell_time``): there
``now``, and the instants that are reckoned from it, say how long something is to last, not when it is.

Every verb that changes what others may rely on appends to the change sequence, and every one that a person would want to
answer for later appends to the audit trail, in that same transaction. ``by`` names who asked.
"""

from typing import Protocol

from gatelodge_server.core.ports.common import Done, Reason, Refused, Replay
from gatelodge_server.core.ports.companies import CompanyOutcome, CompanyStore, Created, Replayed
from gatelodge_server.core.ports.deployment import DeploymentStore
from gatelodge_server.core.ports.partners import Deactivated, PartnerStore, Rolled, RolledBefore, RolledTooOften
from gatelodge_server.core.ports.quotas import UNHEARD, LastUse, Lease, QuotaAsk, QuotaStore, Unheard, UsageMark
from gatelodge_server.core.ports.registration import (
    Begun,
    Challenge,
    Confirmation,
    Confirmed,
    Deferred,
    GivenUp,
    Limited,
    Mail,
    MailLimits,
    MailOutcome,
    Recovery,
    Registrant,
    Registration,
    RegistrationStore,
    Sent,
)
from gatelodge_server.core.ports.revocations import Acknowledgement, Beginning, Reach, Revocation, RevocationStore, Tail
from gatelodge_server.core.ports.secrets import Digester, Sealer
from gatelodge_server.core.ports.sessions import (
    Advanced,
    Condemned,
    LoginAttempt,
    Opened,
    Purged,
    RefreshAttempt,
    RefreshOutcome,
    Repeated,
    SessionStanding,
    SessionStore,
)
from gatelodge_server.core.ports.signing import SigningKeyStore
from gatelodge_server.core.ports.tokens import TokenStore
from gatelodge_server.core.ports.trail import Bell, TrailStore

__all__ = [
    "UNHEARD",
    "Acknowledgement",
    "Advanced",
    "Beginning",
    "Begun",
    "Bell",
    "Challenge",
    "CompanyOutcome",
    "CompanyStore",
    "Condemned",
    "Confirmation",
    "Confirmed",
    "Created",
    "Deactivated",
    "Deferred",
    "DeploymentStore",
    "Digester",
    "Done",
    "GivenUp",
    "LastUse",
    "Lease",
    "Limited",
    "LoginAttempt",
    "Mail",
    "MailLimits",
    "MailOutcome",
    "Opened",
    "PartnerStore",
    "Purged",
    "QuotaAsk",
    "QuotaStore",
    "Reach",
    "Reason",
    "Recovery",
    "RefreshAttempt",
    "RefreshOutcome",
    "Refused",
    "Registrant",
    "Registration",
    "RegistrationStore",
    "Repeated",
    "Replay",
    "Replayed",
    "Revocation",
    "RevocationStore",
    "Rolled",
    "RolledBefore",
    "RolledTooOften",
    "Sealer",
    "Sent",
    "SessionStanding",
    "SessionStore",
    "SigningKeyStore",
    "Store",
    "Tail",
    "TokenStore",
    "TrailStore",
    "Unheard",
    "UsageMark",
]


class Store(
    SessionStore,
    PartnerStore,
    TokenStore,
    CompanyStore,
    SigningKeyStore,
    QuotaStore,
    RegistrationStore,
    TrailStore,
    RevocationStore,
    DeploymentStore,
    Bell,
    Protocol,
):
    """All of it: what a backend provides."""
