"""Addresses of databases: what they may look like, and that a password in one is shown by nothing."""

import pickle
from pathlib import Path

import pytest

from gatelodge_server.store.address import PostgresAddress, SqliteAddress, parse_address

PASSWORD = "correct:horse@battery/staple?#%"
QUOTED = "correct%3Ahorse%40battery%2Fstaple%3F%23%25"


def test_a_file_is_known_by_its_path():
    address = parse_address("sqlite:///data/gatelodge.db")
    assert address == SqliteAddress(Path("data/gatelodge.db"))
    assert (str(address), address.url) == ("data/gatelodge.db", "sqlite:///data/gatelodge.db")
    assert parse_address("sqlite:////var/lib/x.db") == SqliteAddress(Path("/var/lib/x.db"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://lodge@db.example/lodge",
        "postgresql://db.example:5433/lodge",
        "postgresql://lodge@one.example:5432,two.example:5433/lodge?target_session_attrs=any",
        "postgresql://lodge@[::1]:5432/lodge?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        "postgresql:///lodge?host=/run/postgresql",
    ],
)
def test_an_address_without_a_password_stays_as_it_is(url):
    address = parse_address(url)
    assert (address.url, str(address), address.password) == (url, url, None)


def test_both_names_of_the_scheme_are_one():
    assert parse_address("postgres://lodge@db.example/lodge") == parse_address("postgresql://lodge@db.example/lodge")


def test_a_password_is_taken_out_and_shown_by_nothing():
    address = parse_address(f"postgresql://lodge:{QUOTED}@db.example:5432/lodge")
    assert isinstance(address, PostgresAddress)
    assert address.password.reveal() == PASSWORD
    assert address.url == "postgresql://lodge@db.example:5432/lodge"
    for shown in (str(address), repr(address), f"{address}", address.url):
        assert "horse" not in shown


def test_a_worker_gets_it_with_its_password():
    address = parse_address(f"postgresql://lodge:{QUOTED}@db.example/lodge")
    sent = pickle.loads(pickle.dumps(address))
    assert sent == address
    assert sent.password.reveal() == PASSWORD
    assert pickle.loads(pickle.dumps(parse_address("postgresql:///lodge"))).password is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gatelodge.db",
        "sqlite:///",
        "sqlite://gatelodge.db",
        "mysql://lodge:horse@db.example/lodge",
        "postgresql+asyncpg://lodge:horse@db.example/lodge",
        "postgresql://lodge:horse@db.example",
        "postgresql://lodge:horse@db.example/",
        "postgresql://lodge:ho/rse@db.example/lodge",
        "postgresql://lodge:horse@db.example/lodge#x",
        "postgresql://lodge:horse@db.example:port/lodge",
        "postgresql://lodge:horse@db example/lodge",
        "postgresql://lodge:horse@db.example/lodge\n",
        "postgresql://lodge@db.example/lodge?password=horse",
    ],
)
def test_what_is_no_address_is_refused_without_being_repeated(text):
    with pytest.raises(ValueError, match=r"must ") as refused:
        parse_address(text)
    assert "horse" not in str(refused.value)
    assert "rse" not in str(refused.value)
