"""Login, refresh, logout: `/auth/…`."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from http import HTTPStatus
from typing import Final

import msgspec

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    NoCredential,
    PartnerSuspended,
    Rejected,
    Unavailable,
    WrongEnvironment,
)
from gatelodge_server.core.model import SECOND, Instant
from gatelodge_server.core.refusals import RefreshTokenReused
from gatelodge_server.core.secrets import Secret
from gatelodge_server.core.sessions import Sessions, SessionTokens
from gatelodge_server.http.attempts import Attempts
from gatelodge_server.http.guard import Guard, key_id_of
from gatelodge_server.http.operation import Answer, Call, Operation
from gatelodge_server.http.problems import InvalidIdempotencyKey, TooManyFailures
from gatelodge_server.http.reach import WAIT_FOR_REACH, ReachAnswer, ReachReport, wait_in
from gatelodge_server.log import log

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

CREDENTIAL_REFUSALS: Final = (
    InvalidCredential,
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    WrongEnvironment,
    PartnerSuspended,
    Unavailable,
)
"""What any call that judges a credential may answer."""


def rfc3339(instant: Instant) -> str:
    """An instant as `2026-06-26T07:56:42.199+00:00`."""
    second, millisecond = divmod(instant, SECOND)
    return f"{_second(second)}.{millisecond:03}+00:00"


@lru_cache(maxsize=64)  # a busy server writes the same few seconds again and again
def _second(second: int) -> str:
    return (_EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")


class LoginBody(msgspec.Struct, rename="camel", frozen=True):
    """An API key, of a partner or of a company."""

    api_key: Secret


class RefreshBody(msgspec.Struct, rename="camel", frozen=True):
    """The refresh token of the last answer."""

    refresh_token: Secret


class LogoutBody(msgspec.Struct, rename="camel", frozen=True):
    """Any refresh token of the session; without one, the session JWT in the header says which session."""

    refresh_token: Secret | None = None


class TokensAnswer(msgspec.Struct, rename="camel", frozen=True):
    """A session JWT for `R-Auth` (or Bearer), and the refresh token that gets the next one. Times are RFC 3339 in UTC."""

    jwt: Secret
    expiration_date: str
    refresh_token: Secret
    refresh_token_expiration: str


class SessionRoutes:
    """The handlers of `/auth/…`."""

    def __init__(self, *, sessions: Sessions, guard: Guard, attempts: Attempts, reach: ReachReport) -> None:
        self._sessions = sessions
        self._reach = reach
        self._guard = guard
        self._attempts = attempts

    async def log_in(self, call: Call, body: LoginBody) -> Answer:
        """Exchange an API key for a session."""
        try:
            tokens = await self._sessions.log_in(body.api_key)
        except Rejected as refused:
            call.subject = key_id_of(body.api_key)
            if isinstance(refused, InvalidCredential):
                await self._attempts.count(call.address)
            raise
        return _answer("session.opened", tokens, call)

    async def refresh(self, call: Call, body: RefreshBody) -> Answer:
        """Exchange a refresh token for its successor."""
        idempotency_key = call.idempotency_key()
        try:
            tokens = await self._sessions.refresh(body.refresh_token, idempotency_key=idempotency_key)
        except InvalidCredential:
            await self._attempts.count(call.address)
            raise
        return _answer("session.refreshed", tokens, call)

    async def log_out(self, call: Call, body: LogoutBody | None) -> Answer:
        """End a session."""
        wait = wait_in(call)
        if body is not None and body.refresh_token is not None:
            try:
                session_id = self._sessions.session_of(body.refresh_token)
            except InvalidCredential:
                await self._attempts.count(call.address)
                raise
        else:
            session_id = await self._guard.session(call)
        sequence = await self._sessions.end(session_id)
        log.info("session.ended", session=session_id.hex(), address=call.address, request_id=call.request_id)
        return await self._reach.answer(sequence, wait)

    def operations(self) -> Sequence[Operation]:
        """What is served here."""
        return [
            Operation(
                method="POST",
                path="/auth/login",
                tag="Sessions",
                summary="Log in",
                description="Exchange an API key for a short-lived session JWT and a refresh token.",
                handler=self.log_in,
                body=LoginBody,
                answers={200: TokensAnswer},
                refusals=(*CREDENTIAL_REFUSALS, TooManyFailures),
            ),
            Operation(
                method="POST",
                path="/auth/refresh",
                tag="Sessions",
                summary="Refresh a session",
                description=(
                    "Exchange a refresh token for a new session JWT and the next refresh token. The old refresh token is "
                    "spent: presented again, it ends the whole session. A refresh whose answer got lost is repeated for 60 s "
                    "when it is sent again with the same `Idempotency-Key`."
                ),
                handler=self.refresh,
                body=RefreshBody,
                answers={200: TokensAnswer},
                refusals=(*CREDENTIAL_REFUSALS, RefreshTokenReused, TooManyFailures, InvalidIdempotencyKey),
                idempotent_by_key=True,
            ),
            Operation(
                method="POST",
                path="/auth/logout",
                tag="Sessions",
                summary="Log out",
                description="End a session, named by one of its refresh tokens or by the session JWT of the request.",
                handler=self.log_out,
                body=LogoutBody,
                body_optional=True,
                credential="the session JWT, unless the body holds a refresh token",
                credential_optional=True,
                answers={204: None, 200: ReachAnswer},
                parameters=WAIT_FOR_REACH,
                refusals=(*CREDENTIAL_REFUSALS, NoCredential, TooManyFailures),
            ),
        ]


def _answer(event: str, tokens: SessionTokens, call: Call) -> Answer:
    log.info(
        event,
        partner=tokens.holder.partner_id,
        credential=tokens.holder.credential_id,
        session=tokens.session_id.hex(),
        address=call.address,
        request_id=call.request_id,
    )
    body = TokensAnswer(
        jwt=tokens.jwt,
        expiration_date=rfc3339(tokens.jwt_expires_at),
        refresh_token=tokens.refresh_token,
        refresh_token_expiration=rfc3339(tokens.refresh_expires_at),
    )
    return Answer(HTTPStatus.OK, body)
