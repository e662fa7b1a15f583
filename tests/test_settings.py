"""Settings: which source goes before which, and that all that is wrong is said at once."""

from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest

from gatelodge_server.core.model import DAY, HOUR, MINUTE, SECOND
from gatelodge_server.core.sessions import SessionLifetimes
from gatelodge_server.mail.transports import MailServer, Protection
from gatelodge_server.settings import OPTIONS, Settings, SettingsFault, load_settings, parse_duration
from gatelodge_server.store.address import SqliteAddress, parse_address


@pytest.fixture
def load(tmp_path):
    """Settings from flags, variables and the text of a file, without any of whoever runs the tests."""

    def load(file=None, environ=(), **flags):
        path = tmp_path / "gatelodge.toml"
        if file is not None:
            path.write_text(file)
        return load_settings(flags, {"GATELODGE_DATA": str(tmp_path), **dict(environ)})

    return load


@pytest.fixture
def faults(load):
    def faults(*args, **kwargs):
        with pytest.raises(SettingsFault) as caught:
            load(*args, **kwargs)
        return caught.value.faults

    return faults


def test_with_nothing_configured_it_is_this(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = Path("gatelodge-data")
    assert load_settings({}, {}) == Settings(
        environment="uat",
        brand="gatelodge",
        data=data,
        database=SqliteAddress(data / "gatelodge.db"),
        database_pool=8,
        public_url="https://localhost:8443",
        audience="partner-api-uat",
        other_issuers=frozenset(),
        host="127.0.0.1",
        port=8443,
        workers=1,
        tls_cert=None,
        tls_key=None,
        behind_proxy=(),
        drain=0,
        lifetimes=SessionLifetimes(24 * HOUR, 30 * DAY, 90 * DAY),
        login_failure_limit="20/minute",
        registration="on",
        registration_tier="starter",
        recovery="on",
        registration_limit="120/hour",
        verification_failure_limit="20/minute",
        mails_per_address=5,
        mails_per_address_daily=15,
        mails_overall=1000,
        smtp=None,
        smtp_user="",
        mail_from="gatelodge@localhost",
        sample_api="off",
        stated=frozenset(),
    )


def test_what_somebody_has_stated_is_told_from_what_is_a_default(load):
    settings = load('audience = "mine"', {"GATELODGE_BRAND": "acme"}, environment="production")
    assert settings.stated == {"audience", "brand", "environment", "data"}
    assert settings.states("audience")
    assert not settings.states("public_url")


# --- Precedence ---


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(load):
    file, environ = "port = 3", {"GATELODGE_PORT": "2"}
    assert load(file, environ, port="1").port == 1
    assert load(file, environ).port == 2
    assert load(file).port == 3
    assert load("").port == 8443
    assert load(file, environ, port=None).port == 2


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("environment", "production", lambda settings: settings.environment == "production"),
        ("brand", "acme", lambda settings: settings.brand == "acme"),
        ("database", "sqlite:///elsewhere/x.db", lambda settings: settings.database == SqliteAddress(Path("elsewhere/x.db"))),
        ("public_url", "https://uat.example.com", lambda settings: settings.public_url == "https://uat.example.com"),
        ("audience", "our-api", lambda settings: settings.audience == "our-api"),
        ("other_issuers", "https://a.example,https://b.example/x", lambda settings: len(settings.other_issuers) == 2),
        ("host", "0.0.0.0", lambda settings: settings.host == "0.0.0.0"),
        ("port", "0", lambda settings: settings.port == 0),
        (
            "database",
            "postgresql://db.example/x",
            lambda settings: settings.database == parse_address("postgresql://db.example/x"),
        ),
        ("database_pool", "2", lambda settings: settings.database_pool == 2),
        ("workers", "64", lambda settings: settings.workers == 64),
        (
            "behind_proxy",
            "10.0.0.0/8 ::1",
            lambda settings: settings.behind_proxy == (ip_network("10.0.0.0/8"), ip_network("::1")),
        ),
        ("drain", "30s", lambda settings: settings.drain == 30 * SECOND),
        ("jwt_ttl", "15m", lambda settings: settings.lifetimes.jwt_ttl == 15 * MINUTE),
        ("refresh_ttl", "7d", lambda settings: settings.lifetimes.refresh_ttl == 7 * DAY),
        ("session_ttl", "60d", lambda settings: settings.lifetimes.session_ttl == 60 * DAY),
        ("login_failure_limit", "3/second", lambda settings: settings.login_failure_limit == "3/second"),
        (
            "smtp",
            "smtp://localhost:2525",
            lambda settings: settings.smtp == MailServer(Protection.OPPORTUNISTIC, "localhost", 2525),
        ),
        ("mail_from", "api@example.com", lambda settings: settings.mail_from == "api@example.com"),
    ],
)
def test_every_setting_is_read_from_every_source(load, name, text, read):
    assert read(load(**{name: text}))
    assert read(load(environ={f"GATELODGE_{name.upper()}": text}))
    assert read(load(f'{name} = "{text}"'))
    assert not read(load(""))


def test_certificate_and_key_are_files(load):
    settings = load(tls_cert="cert.pem", tls_key="key.pem")
    assert (settings.tls_cert, settings.tls_key) == (Path("cert.pem"), Path("key.pem"))


def test_the_file_is_the_one_of_the_data_directory_unless_another_is_named(tmp_path):
    (tmp_path / "gatelodge.toml").write_text("port = 1")
    (tmp_path / "other.toml").write_text("port = 2")
    assert load_settings({"data": str(tmp_path)}, {}).port == 1
    environ = {"GATELODGE_CONFIG": str(tmp_path / "other.toml"), "GATELODGE_DATA": str(tmp_path)}
    assert load_settings({}, environ).port == 2
    assert load_settings({}, environ).data == tmp_path


def test_the_file_may_use_numbers_and_lists(load):
    settings = load('port = 99\nbehind_proxy = ["10.0.0.0/8", "192.168.0.0/16"]')
    assert settings.port == 99
    assert len(settings.behind_proxy) == 2


def test_what_is_not_said_follows_from_what_is(load):
    settings = load(port="99", environment="production")
    assert settings.public_url == "https://localhost:99"
    assert settings.audience == "partner-api-production"


# --- Faults ---


@pytest.mark.parametrize(
    ("name", "texts"),
    {
        "environment": ["", "UAT", "u a t", "uat-1", "1uat", "e" * 33, "uat\n"],
        "brand": ["", "g", "Gatelodge", "gate_lodge", "1gate", "b" * 17],
        "database": ["x.db", "sqlite://x.db", "mysql://localhost/x", "postgresql://localhost"],
        "database_pool": ["", "1", "201", "many"],
        "public_url": [
            "http://uat.example.com",
            "https://uat.example.com/",
            "https://uat.example.com?x=1",
            "https://uat.example.com#x",
            "https://",
            "https://uat.exa mple.com",
            "https://uat.example.com\n",
            "https://uat.example\t.com",
            "https://[::1",
            "uat.example.com",
        ],
        "other_issuers": ["https://a.example http://b.example", "x"],
        "host": ["", "local\nhost"],
        "port": ["", "-1", "65536", "80.0", "0x50", "８０", " 80", "1_000", "9999999"],  # noqa: RUF001
        "workers": ["", "0", "65", "-1", "many"],
        "behind_proxy": ["10.0.0.0/33", "10.0.0.1/8", "proxy.example", "10.0.0.0/8;::1"],
        "drain": ["5", "-1s", "soon"],
        "jwt_ttl": ["", "0s", "24", "-1h", "1.5h", "1h30m", "1w", "٣h", "1234567890s", "31d"],
        "refresh_ttl": ["", "0ms", "30"],
        "session_ttl": ["", "0d", "1h"],
        "login_failure_limit": ["", "many", "20", "20/lightyear"],
        "registration": ["", "yes", "ON", "1"],
        "registration_tier": ["", "two\nlines"],
        "recovery": ["", "no", "off "],
        "sample_api": ["", "yes", "ON"],
        "registration_limit": ["", "120", "120/lightyear"],
        "verification_failure_limit": ["", "20"],
        "mails_per_address": ["", "0", "100001", "-1", "1.5", "many"],
        "mails_per_address_daily": ["", "0", "100001"],
        "mails_overall": ["", "0", "100001"],
        "smtp": [
            "mail.example.com",
            "http://mail.example.com",
            "smtp://",
            "smtp://:25",
            "smtp://mail.example.com:0",
            "smtp://mail.example.com:65536",
            "smtp://mail.example.com/x",
            "smtp://mail.example.com?x",
            "smtp://mail.exa mple.com",
            "smtp://mail.example.com\n",
            "smtp://user@localhost",
            "smtp://user:hunter2@localhost",
        ],
        "smtp_user": ["api"],
        "mail_from": [
            "",
            "api",
            "api@",
            "@example.com",
            "a b@example.com",
            "api@example.com\n",
            "a@b@c",
            "a..b@c",
            "é@c",
            "a@-c",
        ],
        "tls_cert": ["cert.pem"],
        "tls_key": ["key.pem"],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_value_is_told_by_the_name_under_which_it_was_set(faults, name, texts):
    for text in texts:
        (fault,) = faults(**{name: text})
        assert name.replace("_", "-") in fault.replace("_", "-")
        (fault,) = faults(environ={f"GATELODGE_{name.upper()}": text})
        assert name.replace("_", "-") in fault.lower().replace("_", "-")


def test_every_setting_but_those_that_take_anything_has_a_bad_value():
    take_anything = {"data", "audience"}
    tested = dict(test_a_bad_value_is_told_by_the_name_under_which_it_was_set.pytestmark[0].args[1])
    assert set(OPTIONS) - take_anything == set(tested)


def test_all_faults_are_told_at_once(faults):
    told = faults("brand = 'NO'\nsecret = 'x'", {"GATELODGE_WORKERS": "0"}, port="x", tls_cert="cert.pem", behind_proxy="y")
    assert len(told) == 6
    for name in ("--port", "GATELODGE_WORKERS", "brand", "secret", "--behind-proxy", "--tls-cert and --tls-key"):
        assert sum(name in fault for fault in told) == 1


def test_the_exception_tells_all_of_them_too(load):
    with pytest.raises(SettingsFault, match=r"--port .*; --workers "):
        load(port="x", workers="x")


def test_a_proxy_that_ends_tls_excludes_a_certificate(faults):
    (fault,) = faults(tls_cert="cert.pem", tls_key="key.pem", behind_proxy="10.0.0.0/8")
    assert "--behind-proxy" in fault


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("smtp://m.example", 25),
        ("smtp+starttls://m.example", 587),
        ("smtps://m.example", 465),
        ("smtps://m.example:2525", 2525),
    ],
)
def test_a_mail_server_has_the_port_of_its_protection_unless_another_is_said(load, url, port):
    server = load(smtp=url, mail_from="api@example.com").smtp
    assert (server.protection.value, server.host, server.port) == (url.partition("://")[0], "m.example", port)


@pytest.mark.parametrize("url", ["smtp://m.example", "smtp://10.0.0.1", "smtp://localhost.example"])
def test_a_password_is_for_a_wire_with_checked_tls_only(faults, load, url):
    (fault,) = faults(smtp=url, smtp_user="api", mail_from="api@example.com")
    assert "smtp_user" in fault
    for better in (url.replace("smtp:", "smtps:"), url.replace("smtp:", "smtp+starttls:")):
        assert load(smtp=better, smtp_user="api", mail_from="api@example.com").smtp_user == "api"


@pytest.mark.parametrize("url", ["smtp://localhost", "smtp://127.0.0.9:25", "smtp://[::1]"])
def test_on_this_machine_a_password_needs_no_tls_and_a_mail_no_address_to_be_from(load, url):
    assert load(smtp=url, smtp_user="api").smtp.is_near


def test_a_mail_that_leaves_this_machine_needs_an_address_that_it_is_from(faults):
    (fault,) = faults(smtp="smtps://m.example")
    assert "mail_from" in fault


def test_the_password_for_the_mail_server_is_no_setting(faults, load):
    environ = {"GATELODGE_SMTP_PASSWORD": "hunter2", "GATELODGE_SMTP_USER": "api", "GATELODGE_SMTP": "smtps://localhost"}
    assert "hunter2" not in repr(load(environ=environ))
    (fault,) = faults("smtp_password = 'hunter2'")
    assert "hunter2" not in fault
    (fault,) = faults("", smtp="smtps://api:hunter2@localhost")
    assert "hunter2" not in fault


def test_a_jwt_may_live_as_long_as_its_session_and_no_longer(load, faults):
    assert load(jwt_ttl="2d", session_ttl="2d").lifetimes.jwt_ttl == 2 * DAY
    assert len(faults(jwt_ttl="172800001ms", session_ttl="2d")) == 1


@pytest.mark.parametrize(("ms", "allowed"), [(172_799_999, True), (172_800_000, True), (172_800_001, False)])
def test_a_jwt_does_not_live_longer_than_its_session_may_lie_idle(load, faults, ms, allowed):
    """The row of a session that can no longer be refreshed is purged, and with it what its JWTs are looked up in."""
    if allowed:
        assert load(jwt_ttl=f"{ms}ms", refresh_ttl="2d").lifetimes.jwt_ttl == ms
    else:
        assert faults(jwt_ttl=f"{ms}ms", refresh_ttl="2d") == ["jwt_ttl must not be longer than refresh_ttl"]


@pytest.mark.parametrize("name", ["prot", "master_key", "tls"])
def test_a_setting_that_does_not_exist_is_told(faults, name):
    (fault,) = faults(f"{name} = 1")
    assert name in fault


@pytest.mark.parametrize("content", [b"port = ", b"port: 1", b"\xff\xfe", b"port = 1\nport = 2"])
def test_a_file_that_cannot_be_read_is_told(tmp_path, content):
    (tmp_path / "gatelodge.toml").write_bytes(content)
    with pytest.raises(SettingsFault, match=r"gatelodge\.toml"):
        load_settings({"data": str(tmp_path)}, {})


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(SettingsFault, match=r"other\.toml"):
        load_settings({"data": str(tmp_path)}, {"GATELODGE_CONFIG": str(tmp_path / "other.toml")})
    load_settings({"data": str(tmp_path / "nowhere")}, {})


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1ms", 1), ("90s", 90 * SECOND), ("15m", 15 * MINUTE), ("24h", DAY), ("30d", 30 * DAY), ("0s", 0), (" 1h ", HOUR)],
)
def test_a_duration_is_read(text, milliseconds):
    assert parse_duration(text) == milliseconds


def test_r71_no_setting_holds_a_secret():
    """The master key is a file, or a variable that no setting reads; nothing secret has a default."""
    for name in [*OPTIONS, *(field.name for field in fields(Settings))]:
        assert not {"secret", "password", "master", "pepper", "token"} & set(name.split("_"))
    assert {name for name in OPTIONS if "key" in name} == {"tls_key"}
    assert OPTIONS["tls_key"].default == ""


def test_every_setting_says_what_it_is_for():
    for option in OPTIONS.values():
        assert option.meaning


def test_there_is_an_authority_of_our_own_only_where_the_certificate_is_ours_too(load):
    assert load(data="here").local_authority == Path("here/tls/ca.pem")
    assert load(tls_cert="c.pem", tls_key="k.pem").local_authority is None
    assert load(behind_proxy="10.0.0.0/8").local_authority is None
