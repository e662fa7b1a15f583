"""The connection to PostgreSQL when the address asks for TLS: whose certificate is believed, and which names."""

import asyncio
import contextlib
import ssl
import struct

import pytest
import trustme
from backends import PostgresBackend
from sqlalchemy import func, select

from gatelodge.errors import Unavailable
from gatelodge_server.store.address import parse_address
from gatelodge_server.store.database import database_at
from gatelodge_server.store.tables import tier

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""What a client says first (PostgreSQL's protocol, 55.7, SSLRequest)."""


def read_tiers(connection):
    return connection.execute(select(func.count()).select_from(tier)).scalar_one()


async def pump(reader, writer):
    with contextlib.suppress(OSError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def tls_in_front_of(port, context):
    """A port that speaks TLS as PostgreSQL does, in front of a server that was built without it. Plain text is refused."""
    callers = []

    async def serve(reader, writer):
        callers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if await reader.readexactly(8) != SSL_REQUEST:
                writer.close()
                return
            writer.write(b"S")
            await writer.start_tls(context)
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
            callers.append(behind_writer)
            await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))

    front = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        front.close()
        for writer in callers:
            writer.close()


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
async def read(tmp_path, authority):
    """Read once from a server with a certificate for 127.0.0.1, at the address with these words behind it."""
    backend = PostgresBackend.create(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    port = backend.address.rpartition("@")[2].partition("/")[0].partition(":")[2]

    async with tls_in_front_of(int(port), context) as tls_port:

        async def read_once(query, host="127.0.0.1"):
            address = backend.address.replace(f"@127.0.0.1:{port}/", f"@{host}:{tls_port}/") + query
            driver = database_at(parse_address(address)).driver(on_fault=lambda _: None)
            try:
                return await driver.read(read_tiers)
            finally:
                await driver.close()

        yield read_once


def kept(authority, path):
    authority.cert_pem.write_to_path(str(path))
    return f"?sslmode=verify-full&sslrootcert={path}"


async def test_a_server_of_the_authority_that_the_address_names_is_believed(read, authority, tmp_path):
    assert await read(kept(authority, tmp_path / "ca.pem")) > 0


async def test_a_server_of_another_authority_is_not_believed(read, tmp_path):
    with pytest.raises(Unavailable):
        await read(kept(trustme.CA(), tmp_path / "other.pem"))


async def test_a_server_of_another_name_is_not_believed(read, authority, tmp_path):
    query = kept(authority, tmp_path / "ca.pem")
    with pytest.raises(Unavailable):
        await read(query, host="localhost")
    assert await read(query.replace("verify-full", "verify-ca"), host="localhost") > 0
