"""The commands for tiers."""

import pytest
from outside import add_partner, ask, command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A deployment whose server does not run."""
    directory = tmp_path_factory.mktemp("tiers") / "data"
    ask("partner", "list", data=directory)
    return directory


def tiers(data):
    return {tier["tier"]: (tier["requestsPerHour"], tier["requestsPerDay"]) for tier in ask("tier", "list", data=data)}


def test_a_tier_is_added_changed_and_listed(data):
    assert tiers(data)["starter"] == (100, 1_000)
    added = ask("tier", "set", "gold", "--per-hour", "5000", "--per-day", "50000", data=data)
    assert isinstance(added.pop("sequence"), int)
    assert added == {"tier": "gold", "requestsPerHour": 5_000, "requestsPerDay": 50_000}
    assert tiers(data)["gold"] == (5_000, 50_000)
    ask("tier", "set", "gold", "--per-hour", "1", "--per-day", "2", data=data)
    assert tiers(data)["gold"] == (1, 2)
    events = [event for event in ask("audit", data=data) if event["action"] == "tier.set"]
    assert [(event["subject"], event["actor"], event["detail"]) for event in events] == [
        ("gold", "command line", "5000 an hour, 50000 a day"),
        ("gold", "command line", "1 an hour, 2 a day"),
    ]


def test_a_partner_is_put_into_a_tier(data):
    partner = add_partner(data)
    ask("tier", "set", "silver", "--per-hour", "500", "--per-day", "5000", data=data)
    put = ask("partner", "tier", partner.id, "silver", data=data)
    assert isinstance(put.pop("sequence"), int)
    assert put == {"partnerId": partner.id, "tier": "silver"}
    assert ask("partner", "show", partner.id, data=data)["tier"] == "silver"


@pytest.mark.parametrize("flag", ["--per-hour", "--per-day"])
@pytest.mark.parametrize(
    ("limit", "code"),
    [("-1", 2), ("0", 2), ("1", 0), ("1999999999", 0), ("2000000000", 0), ("2000000001", 2), ("ten", 2), ("1.5", 2), ("", 2)],
)
def test_a_limit_is_a_whole_number_that_every_database_can_count(data, flag, limit, code):
    limits = {"--per-hour": "1", "--per-day": "2000000000", flag: limit}
    done = command("tier", "set", "edge", *(word for pair in limits.items() for word in pair), data=data)
    assert done.exit_code == code, done.stderr
    if code:
        assert flag in done.stderr


@pytest.mark.parametrize(("per_day", "code"), [("9", 2), ("10", 0), ("11", 0)])
def test_a_day_allows_no_less_than_an_hour(data, per_day, code):
    done = command("tier", "set", "day", "--per-hour", "10", "--per-day", per_day, data=data)
    assert done.exit_code == code, done.stderr
    assert ("--per-day must not be less than --per-hour" in " ".join(done.stderr.split())) == bool(code)


@pytest.mark.parametrize("name", ["Upper", "two words", "-x", "x--y", "x" * 49, "ü", ""])
def test_a_tiers_name_is_a_slug(data, name):
    done = command("tier", "set", "--per-hour", "1", "--per-day", "1", "--", name, data=None)
    assert done.exit_code == 2
    assert name not in tiers(data)


def test_a_tier_is_not_set_by_halves(data):
    for flags in (("--per-hour", "1"), ("--per-day", "1"), ()):
        assert command("tier", "set", "half", *flags, data=data).exit_code == 2
    assert "half" not in tiers(data)


def test_what_cannot_be_is_refused_in_one_line(data):
    partner = add_partner(data)
    for args, reason in (
        (("nobody", "starter"), "There is no partner with this id."),
        ((partner.id, "platinum"), "There is no tier with this name."),
    ):
        done = command("partner", "tier", *args, data=data)
        assert (done.exit_code, done.stdout, done.stderr) == (1, "", reason + "\n")
    ask("partner", "deactivate", partner.id, data=data)
    done = command("partner", "tier", partner.id, "starter", data=data)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("The partner is deactivated, which is final.")
