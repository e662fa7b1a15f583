"""JSON that would take a parser long."""

import pytest

from gatelodge.strict import parse_json_object


@pytest.mark.timeout(10)
@pytest.mark.parametrize("filling", ['\\"', '"', "\\", "["])
def test_r50_a_string_without_end_is_refused_in_one_pass(filling):
    assert parse_json_object(b'{"a":' + b"[" * 17 + b'"' + filling.encode() * 30_000) is None


def test_brackets_in_a_string_do_not_nest():
    assert parse_json_object(b'{"a":"' + b"[" * 100 + b'"}') == {"a": "[" * 100}
