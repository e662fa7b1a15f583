"""The guard: who makes a request, as its credential says and the store confirms at this moment."""

from gatelodge.errors import CredentialRevoked, InvalidCredential, KeysUnavailable, NoCredential, Unavailable, WrongEnvironment
from gatelodge.tokens import read_unverified
from gatelodge.verify import Verifier
from gatelodge.wire import ApiKey
from gatelodge_server.core.credentials import Credentials
from gatelodge_server.core.model import Holder
from gatelodge_server.core.refusals import NotAllowed
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.sessions import Sessions
from gatelodge_server.http.operation import Call


def key_id_of(presented: Secret) -> str:
    """The public id in what is presented as an API key; empty if it is none."""
    key = ApiKey.parse(presented.reveal())
    return "" if key is None else key.id


class Guard:
    """Resolves API keys and session JWTs alike. Every request is judged against the store: nothing here can be out of date."""

    def __init__(self, *, credentials: Credentials, sessions: Sessions, verifier: Verifier, environment: str) -> None:
        self._credentials = credentials
        self._sessions = sessions
        self._verifier = verifier
        self._environment = environment

    async def holder(self, call: Call) -> Holder:
        """Whom the request's credential speaks for. Raises ``NoCredential`` or a ``Rejected``."""
        presented = call.credential()
        if presented is None:
            raise NoCredential
        if "." not in presented.reveal():  # an API key has none, a JWT two
            call.subject = key_id_of(presented)
            return await self._credentials.authenticate(presented)
        return await self._sessions.authenticate(await self._session(call, presented))

    async def partner(self, call: Call) -> Holder:
        """As ``holder``, for calls that a partner makes itself. Raises ``NotAllowed`` for a company."""
        holder = await self.holder(call)
        if holder.company_id is not None:
            raise NotAllowed
        return holder

    async def session(self, call: Call) -> bytes:
        """The id of the session whose JWT the request carries. Raises ``NoCredential`` or a ``Rejected``."""
        presented = call.credential()
        if presented is None:
            raise NoCredential
        session_id = await self._session(call, presented)
        await self._sessions.authenticate(session_id)
        return session_id

    async def _session(self, call: Call, jwt: Secret) -> bytes:
        text = jwt.reveal()
        try:
            caller = await self._verifier.verify_async(text)
        except KeysUnavailable as fault:
            raise Unavailable from fault
        except InvalidCredential:
            if read_unverified(text).environment not in {None, self._environment}:
                raise WrongEnvironment from None
            raise
        call.subject = caller.session
        try:
            return bytes.fromhex(caller.session)
        except ValueError:
            raise CredentialRevoked from None
