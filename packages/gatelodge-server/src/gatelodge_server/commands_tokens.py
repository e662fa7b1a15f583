"""The commands for access tokens and for the keys that sign."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gatelodge_server.commands import (
    BY,
    GROUPS,
    PartnerId,
    Record,
    WaitFlag,
    command,
    duration_of,
    line_of,
    reach_of,
    seconds_of,
    when,
)
from gatelodge_server.core.access_tokens import IssuedToken
from gatelodge_server.core.credentials import credential_status
from gatelodge_server.core.model import AccessToken, Instant, KeyPurpose

if TYPE_CHECKING:
    from gatelodge_server.app import Lodge

TokenId = Annotated[str, typer.Argument(metavar="TOKEN_ID", help="the token's id, as `token list` shows it")]


# --- access tokens --------------------------------------------------------------------------------------------------------


def _token_record(token: AccessToken, now: Instant) -> Record:
    return {
        "tokenId": token.id,
        "version": token.version,
        "status": credential_status(token, now),
        "label": token.label,
        "kid": token.kid,
        "createdAt": when(token.created_at),
        "rotatedAt": when(token.rotated_at),
        "endsAt": when(token.ends_at),
        "lastUsedAt": when(token.last_used_at),
        "lastUsedFrom": token.last_used_from,
    }


def _issued_record(issued: IssuedToken) -> Record:
    return {"tokenId": issued.token.id, "token": issued.text.reveal()}


@command(GROUPS["token"], "issue")
async def token_issue(
    lodge: "Lodge",
    partner: PartnerId,
    label: Annotated[str | None, typer.Option(help="what it is for, such as who will hold it", parser=line_of("Name"))] = None,
) -> Record:
    """Issue an access token for a partner. Prints it, which is done this once; it works until it is rotated or revoked."""
    return _issued_record(await lodge.access_tokens.issue(partner, label=str(label or ""), by=BY))


@command(GROUPS["token"], "list", only_in_json=("kid",))
async def token_list(lodge: "Lodge", partner: PartnerId) -> Sequence[Record]:
    """The access tokens of a partner in all their versions, newest first."""
    now = lodge.clock()
    return [_token_record(token, now) for token in await lodge.access_tokens.list_for(partner)]


@command(GROUPS["token"], "show")
async def token_show(lodge: "Lodge", token: TokenId) -> Sequence[Record]:
    """All versions of an access token, newest first: whoever still uses an older one would notice if it were revoked."""
    now = lodge.clock()
    return [_token_record(version, now) for version in await lodge.access_tokens.versions(token)]


@command(GROUPS["token"], "rotate")
async def token_rotate(
    lodge: "Lodge",
    token: TokenId,
    overlap: Annotated[str, typer.Option(help="for how long the old token works on, such as 1h")] = "0s",
    wait: WaitFlag = "0s",
) -> Record:
    """Replace an access token. Prints the new one, which is done this once."""
    seconds = seconds_of(wait)
    issued = await lodge.access_tokens.rotate(token, overlap=duration_of(overlap), by=BY)
    return {**_issued_record(issued), **await reach_of(lodge, issued.sequence, seconds)}


@command(GROUPS["token"], "revoke")
async def token_revoke(lodge: "Lodge", token: TokenId, wait: WaitFlag = "0s") -> Record:
    """End an access token for good. Its other versions are not concerned."""
    seconds = seconds_of(wait)
    sequence = await lodge.access_tokens.revoke(token, by=BY)
    return {"tokenId": token, "status": "revoked", **await reach_of(lodge, sequence, seconds)}


# --- signing keys ---------------------------------------------------------------------------------------------------------


PurposeFlag = Annotated[
    KeyPurpose | None, typer.Option(help="of the keys for session JWTs, or for access tokens; of both unless given")
]


@command(GROUPS["signing-key"], "list")
async def signing_key_list(lodge: "Lodge") -> Sequence[Record]:
    """The keys that sign session JWTs, then those that sign access tokens, each oldest first."""
    now = lodge.clock()
    keys = [*await lodge.signing_keys.list_keys(), *await lodge.access_keys.list_keys()]
    live_tokens = await lodge.access_keys.count_live_tokens()
    return [
        {
            "kid": key.kid,
            "purpose": key.purpose.value,
            "state": key.state(now),
            "publishedAt": when(key.published_at),
            "signsFrom": when(key.signs_from),
            "signsUntil": when(key.signs_until),
            "goneAt": when(key.gone_at),
            "liveTokens": live_tokens.get(key.kid, 0) if key.purpose is KeyPurpose.ACCESS else None,
        }
        for key in keys
    ]


@command(GROUPS["signing-key"], "rotate")
async def signing_key_rotate(lodge: "Lodge", purpose: PurposeFlag = None) -> Record:
    """Let the next key sign, at once or as soon as every cache can know it, and publish a new next one."""
    if purpose is not None:
        ring = lodge.access_keys if purpose is KeyPurpose.ACCESS else lodge.signing_keys
        key = await ring.rotate(by=BY)
        return {"kid": key.kid, "signsFrom": when(key.signs_from)}
    key, access_key = await lodge.signing_keys.rotate(by=BY), await lodge.access_keys.rotate(by=BY)
    return {
        "kid": key.kid,
        "signsFrom": when(key.signs_from),
        "accessKid": access_key.kid,
        "accessSignsFrom": when(access_key.signs_from),
    }


# One kid in 64 begins with a hyphen: base64url.
@command(GROUPS["signing-key"], "retire", context={"ignore_unknown_options": True})
async def signing_key_retire(
    lodge: "Lodge", kid: Annotated[str, typer.Argument(metavar="KID")], wait: WaitFlag = "0s"
) -> Record:
    """Withdraw a key at once, and with it every JWT that it signed. For a key that may have got out: rotate first.

    A key for access tokens is refused while a live one needs it, and goes by itself when none does.
    """
    seconds = seconds_of(wait)
    sequence = await lodge.signing_keys.retire(kid, by=BY)
    return {"kid": kid, "state": "gone", **await reach_of(lodge, sequence, seconds)}
