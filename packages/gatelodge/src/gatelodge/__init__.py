"""Verify the credentials of a Gatelodge partner API.

The everyday way in is ``Verifier``, over ``RemoteKeys`` or ``StaticKeys``, the ``TokenRules`` of one environment and, to hear
of what ends before its time, ``RemoteRevocations``; and ``Gate``, which puts it in front of an ASGI application. Every refusal
of a credential is a ``Rejected``. What is exported here is the public surface; the modules hold more, for the issuing side.
"""

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    Fault,
    InvalidCredential,
    KeysUnavailable,
    PartnerMismatch,
    PartnerSuspended,
    QuotaExceeded,
    Rejected,
    RevocationsUnavailable,
    Unavailable,
    WrongEnvironment,
)
from gatelodge.feed import RemoteRevocations
from gatelodge.gate import Gate, caller_of
from gatelodge.keyset import Keys, RemoteKeys, StaticKeys, https_fetch
from gatelodge.revocations import JwtMarks, Revocations
from gatelodge.tokens import TokenRules, VerificationKey
from gatelodge.verify import AccessRing, Caller, Grant, Records, Verifier
from gatelodge.wire import ApiKey

__all__ = [
    "AccessRing",
    "ApiKey",
    "Caller",
    "CredentialExpired",
    "CredentialRevoked",
    "CredentialRotated",
    "Fault",
    "Gate",
    "Grant",
    "InvalidCredential",
    "JwtMarks",
    "Keys",
    "KeysUnavailable",
    "PartnerMismatch",
    "PartnerSuspended",
    "QuotaExceeded",
    "Records",
    "Rejected",
    "RemoteKeys",
    "RemoteRevocations",
    "Revocations",
    "RevocationsUnavailable",
    "StaticKeys",
    "TokenRules",
    "Unavailable",
    "VerificationKey",
    "Verifier",
    "WrongEnvironment",
    "caller_of",
    "https_fetch",
]
