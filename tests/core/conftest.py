"""The parts of a deployment, put together by hand over a real database, with a clock that the test moves."""

import os
from dataclasses import dataclass

import pytest
from backends import SqliteBackend
from given import Clock

from gatelodge_server.app import slug_of
from gatelodge_server.core.access_tokens import AccessTokens
from gatelodge_server.core.companies import Companies
from gatelodge_server.core.credentials import Credentials
from gatelodge_server.core.model import DAY, HOUR, KeyPurpose
from gatelodge_server.core.partners import NewPartner, Partners
from gatelodge_server.core.refresh_tokens import RefreshTokens
from gatelodge_server.core.sessions import SessionLifetimes, Sessions
from gatelodge_server.core.signing import SigningKeys
from gatelodge_server.vault import MasterKeys, Vault

ISSUER, AUDIENCE = "https://uat.example.com", "partner-api-uat"
LIFETIMES = SessionLifetimes(jwt_ttl=24 * HOUR, refresh_ttl=30 * DAY, session_ttl=90 * DAY)


class Line:
    """The line to a real store. While it is cut, everything that is asked over it fails as it would without a store."""

    def __init__(self, store):
        self._store = store
        self.cut_by = None
        self.asked = []

    def __getattr__(self, verb):
        ask = getattr(self._store, verb)

        async def over_the_line(*args, **kwargs):
            self.asked.append(verb)
            if self.cut_by is not None:
                raise self.cut_by
            return await ask(*args, **kwargs)

        return over_the_line


@dataclass
class Lodge:
    backend: SqliteBackend
    store: Line
    clock: Clock
    monotonic: Clock
    vault: Vault
    credentials: Credentials
    partners: Partners
    companies: Companies
    refresh_tokens: RefreshTokens
    signing_keys: SigningKeys
    access_keys: SigningKeys
    access_tokens: AccessTokens
    sessions: Sessions

    async def new_partner(self, name="Acme Motors"):
        """A partner's id and its key."""
        partner, issued = await self.partners.add(NewPartner(name, "dev@acme.example"), by="test")
        return partner.id, issued.text


@pytest.fixture
def vault():
    return Vault(MasterKeys((os.urandom(32),)), os.urandom)


@pytest.fixture
def backend(tmp_path):
    return SqliteBackend.create(tmp_path)


@pytest.fixture
async def lodge(backend, vault):
    sql_store = backend.open()
    store, clock, monotonic = Line(sql_store), Clock(), Clock(1_000.0)
    credentials = Credentials(store=store, clock=clock, entropy=os.urandom, brand="gatelodge", environment="uat")
    signing_keys, access_keys = (
        SigningKeys(purpose=purpose, store=store, sealer=vault, clock=clock, monotonic=monotonic, jwt_ttl=jwt_ttl)
        for purpose, jwt_ttl in ((KeyPurpose.SESSION, LIFETIMES.jwt_ttl), (KeyPurpose.ACCESS, None))
    )
    refresh_tokens = RefreshTokens(brand="gatelodge", environment="uat", make_mac=vault.make_mac, check_mac=vault.check_mac)
    await signing_keys.establish()
    await access_keys.establish()
    yield Lodge(
        backend=backend,
        store=store,
        clock=clock,
        monotonic=monotonic,
        vault=vault,
        credentials=credentials,
        partners=Partners(store=store, credentials=credentials, clock=clock, slugify=slug_of),
        companies=Companies(
            store=store, credentials=credentials, sealer=vault, digester=vault, clock=clock, entropy=os.urandom
        ),
        refresh_tokens=refresh_tokens,
        signing_keys=signing_keys,
        access_keys=access_keys,
        access_tokens=AccessTokens(
            store=store,
            signing_keys=access_keys,
            clock=clock,
            entropy=os.urandom,
            issuer=ISSUER,
            audience=AUDIENCE,
            environment="uat",
        ),
        sessions=Sessions(
            store=store,
            credentials=credentials,
            refresh_tokens=refresh_tokens,
            signing_keys=signing_keys,
            digester=vault,
            clock=clock,
            entropy=os.urandom,
            issuer=ISSUER,
            audience=AUDIENCE,
            environment="uat",
            lifetimes=LIFETIMES,
        ),
    )
    await sql_store.close()
