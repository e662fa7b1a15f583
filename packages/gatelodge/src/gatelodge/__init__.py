"""Verify the credentials of a Gatelodge partner API.

The everyday way in is ``Verifier``, over ``RemoteKeys`` or ``StaticKeys`` and the ``TokenRules`` of one environment;
every refusal is a ``Rejected``. What is exported here is the public surface; the modules hold more, for the issuing
side.
"""

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    KeysUnavailable,
    PartnerMismatch,
    PartnerSuspended,
    Rejected,
    WrongEnvironment,
)
from gatelodge.keyset import Keys, RemoteKeys, StaticKeys, https_fetch
from gatelodge.tokens import TokenRules, VerificationKey
from gatelodge.verify import Caller, Verifier
from gatelodge.wire import ApiKey

__all__ = [
    "ApiKey",
    "Caller",
    "CredentialExpired",
    "CredentialRevoked",
    "CredentialRotated",
    "InvalidCredential",
    "Keys",
    "KeysUnavailable",
    "PartnerMismatch",
    "PartnerSuspended",
    "Rejected",
    "RemoteKeys",
    "StaticKeys",
    "TokenRules",
    "VerificationKey",
    "Verifier",
    "WrongEnvironment",
    "https_fetch",
]
