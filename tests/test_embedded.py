"""The deployment in an application of its owner's own: how it is opened, and what it leaves alone."""

import pytest
import structlog
from outside import Partner, add_partner

from gatelodge_server.embedded import SettingsFault, StartFault, at_work, open_lodge


@pytest.fixture
def environ(tmp_path):
    return {"GATELODGE_DATA": str(tmp_path / "data")}


@pytest.fixture
def log_settings():
    """The settings of structlog, which are those of the whole process, put back afterwards."""
    before, was_configured = structlog.get_config(), structlog.is_configured()
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**before)


@pytest.fixture
def partner(tmp_path) -> Partner:
    return add_partner(tmp_path / "data")


async def test_it_is_the_deployment_that_the_commands_work_on(environ, partner):
    lodge = open_lodge(environ)
    async with at_work(lodge):
        assert (await lodge.verifier.verify_async(partner.key)).partner == partner.id


async def test_it_knows_the_settings_file_that_stands_beside_the_data(environ, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gatelodge.toml").write_text('public_url = "https://api.example"\n')
    lodge = open_lodge(environ)
    assert lodge.settings.public_url == "https://api.example"
    await lodge.close()


def test_settings_that_cannot_be_used_are_told_all_at_once(environ):
    with pytest.raises(SettingsFault) as told:
        open_lodge({**environ, "GATELODGE_ENVIRONMENT": "U A T", "GATELODGE_JWT_TTL": "soon"})
    assert [fault.split()[0] for fault in told.value.faults] == ["GATELODGE_ENVIRONMENT", "GATELODGE_JWT_TTL"]


async def test_a_database_that_has_lost_its_master_key_is_not_opened_with_another(environ, tmp_path):
    await open_lodge(environ).close()
    (tmp_path / "data" / "master.key").unlink()
    with pytest.raises(StartFault, match="put the key back"):
        open_lodge(environ)


async def test_the_log_goes_where_the_application_has_said(environ, log_settings):
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    before = structlog.get_config()
    await open_lodge(environ).close()
    assert structlog.get_config() == before


async def test_the_log_is_lines_of_json_if_the_application_has_said_nothing(environ, log_settings):
    await open_lodge(environ).close()
    assert structlog.is_configured()
    assert isinstance(structlog.get_config()["logger_factory"], structlog.BytesLoggerFactory)
