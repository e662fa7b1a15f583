"""A secret stays in its wrapper, however it is handled."""

import copy
import json
import logging
import pickle

import pytest

from gatelodge_server.core.secrets import Secret

TEXT = "gatelodge_uat_rt_s3cr3t"


@pytest.fixture
def secret():
    return Secret(TEXT)


def test_a_secret_is_revealed_to_who_asks_for_it(secret):
    assert secret.reveal() == TEXT


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        ascii,
        lambda secret: f"{secret} {secret!r} {secret!s} {secret:>40}",
        "{0} {0:s}".format,
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031
        lambda secret: repr([secret, {"key": secret}]),
        lambda secret: str(ValueError(secret)),
    ],
)
def test_r69_a_secret_is_not_shown(secret, show):
    assert "s3cr3t" not in show(secret)


def test_r69_a_secret_is_not_logged(secret, caplog):
    logging.getLogger("test").warning("%s %r", secret, secret)
    assert caplog.records
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize(
    "misuse",
    [
        lambda secret: secret == Secret(TEXT),
        lambda secret: secret == TEXT,
        lambda secret: secret != TEXT,
        lambda secret: secret in {"": TEXT}.values(),
        lambda secret: secret < Secret(TEXT),
        hash,
        lambda secret: {secret},
        lambda secret: {secret: 1},
        pickle.dumps,
        lambda secret: pickle.dumps(secret, protocol=0),
        copy.copy,
        copy.deepcopy,
        json.dumps,
        len,
        iter,
        lambda secret: secret + "",
        lambda secret: "" + secret,
        bytes,
        vars,
    ],
)
def test_a_secret_cannot_be_compared_hashed_copied_or_sent(secret, misuse):
    with pytest.raises(TypeError) as caught:
        misuse(secret)
    assert "s3cr3t" not in str(caught.value)


def test_nothing_can_be_attached_to_a_secret(secret):
    with pytest.raises(AttributeError):
        secret.note = TEXT
