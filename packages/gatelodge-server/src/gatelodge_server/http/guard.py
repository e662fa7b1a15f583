"""The guard: who makes a request to this service itself, and whether that kind of credential is for that kind of call.

Whose a credential is says ``gatelodge.verify.Verifier``, as at the gate in front of the API.
"""

from uuid import UUID

from gatelodge.errors import InvalidCredential, NoCredential
from gatelodge.verify import Caller, CredentialKind, Verifier
from gatelodge.wire import ApiKey
from gatelodge_server.core.model import Holder
from gatelodge_server.core.refusals import NotAllowed
from gatelodge_server.core.secrets import Secret
from gatelodge_server.http.operation import Call


def key_id_of(presented: Secret) -> str:
    """The public id in what is presented as an API key; empty if it is none."""
    key = ApiKey.parse(presented.reveal())
    return "" if key is None else key.id


class Guard:
    """Says who calls, and refuses those whom a call is not for."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def partner(self, call: Call) -> Holder:
        """The partner whose API key or session the request carries. Raises ``NotAllowed`` for anybody else whom we know."""
        return _holder(await self._caller(call, "api-key", "session"))

    async def partner_key(self, call: Call) -> Holder:
        """The partner whose API key the request carries. Raises ``NotAllowed`` for any other credential."""
        return _holder(await self._caller(call, "api-key"))

    async def unjudged_key(self, call: Call) -> Secret:
        """What the request presents as an API key, for a verb that judges it by itself. Raises as above for a genuine JWT."""
        presented = call.credential()
        if presented is None:
            raise NoCredential
        if "." in presented.reveal():  # an API key has none, a JWT two
            await self.partner_key(call)
        call.subject = key_id_of(presented)
        return presented

    async def session(self, call: Call) -> bytes:
        """The id of the session whose JWT the request carries, a partner's or a company's. Raises as above."""
        caller = await self._identify(call)
        if caller.session is None:
            raise InvalidCredential
        return bytes.fromhex(caller.session)

    async def _caller(self, call: Call, *kinds: CredentialKind) -> Caller:
        caller = await self._identify(call)
        if caller.kind != "partner" or caller.credential not in kinds:
            raise NotAllowed
        return caller

    async def _identify(self, call: Call) -> Caller:
        presented = call.credential()
        if presented is None:
            raise NoCredential
        call.subject = key_id_of(presented)
        caller = await self._verifier.verify_async(presented.reveal())
        call.subject = caller.session or caller.credential_id
        return caller


def _holder(caller: Caller) -> Holder:
    company_id = UUID(caller.company) if caller.company is not None else None
    return Holder(caller.partner, company_id, caller.tier, caller.credential_id)
