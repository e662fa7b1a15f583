"""What is refused before any key is looked for, and how little that costs."""

import itertools
import json
import math
import socket
import string
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatelodge.errors import InvalidCredential
from gatelodge.strict import JSON_DEPTH_MAX, decode_base64url, encode_base64url, parse_json_object
from gatelodge.tokens import issuer_of, public_jwk, read_unverified
from gatelodge.wire import TOKEN_MAX_LENGTH

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


def refused(text):
    with pytest.raises(InvalidCredential) as caught:
        read_unverified(text)
    # A parser's exception would carry the token into whatever logs this one.
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    return True


def test_a_good_token_is_read_and_shows_no_claim(issuer):
    token = read_unverified(issuer.token())
    assert (token.kid, token.algorithm, token.type, token.issuer) == (issuer.kid, "ES256", "at+jwt", issuer.url)
    assert "acme-motors" not in repr(token)


@pytest.mark.parametrize(
    "algorithm",
    [
        "none",
        "None",
        "NONE",
        "nOnE",
        "",
        "HS256",
        "HS384",
        "HS512",
        "es256",
        "ES256 ",
        "ES256K",
        "RS1",
        None,
        256,
        ["ES256"],
        {},
    ],
)
def test_r1_an_algorithm_outside_of_the_table_is_refused(issuer, algorithm):
    assert refused(issuer.compact(issuer.header | {"alg": algorithm}, issuer.claims()))


def test_r1_a_token_without_an_algorithm_is_refused(issuer):
    assert refused(issuer.compact({"kid": issuer.kid, "typ": "at+jwt"}, issuer.claims()))


def test_r3_keys_named_in_the_header_are_never_used_and_never_fetched(issuer, stranger):
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/keys"

        def count():
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                connections.append(peer)
                peer.close()

        counting = threading.Thread(target=count)
        counting.start()
        lure = {"jku": url, "x5u": url, "jwk": public_jwk(stranger.key), "x5c": ["MIIB"]}
        forged = issuer.compact(issuer.header | lure, issuer.claims(), stranger.key)
        with pytest.raises(InvalidCredential):
            issuer.judge(forged)
        # They are ignored altogether: on a token that is genuine they change nothing either.
        assert issuer.judge(issuer.compact(issuer.header | lure, issuer.claims())) == issuer.claims()
        listener.shutdown(socket.SHUT_RDWR)
        counting.join()
    assert connections == []


@pytest.mark.parametrize(
    "kid",
    [
        "",
        "x' OR '1'='1",
        "../../dev/null",
        "/dev/null",
        "key|sleep 9",
        "a\x00b",
        "k" * 10_000,
        "k" * 129,
        "schlüssel",
        "a b",
        "k\n",
        7,
        None,
        ["k"],
    ],
)
def test_r4_a_kid_that_is_no_plain_word_is_refused_before_any_look_up(issuer, kid):
    assert refused(issuer.compact(issuer.header | {"kid": kid}, issuer.claims()))


@pytest.mark.parametrize(("length", "good"), [(127, True), (128, True), (129, False)])
def test_r4_the_longest_kid_has_128_characters(issuer, length, good):
    text = issuer.compact(issuer.header | {"kid": "k" * length}, issuer.claims())
    assert read_unverified(text).kid == "k" * length if good else refused(text)


@pytest.mark.parametrize("crit", [["unknown"], [], ["alg"], ["b64"], ["exp"], None, "b64", 1])
def test_r5_a_critical_header_is_refused_even_with_a_good_signature(issuer, crit):
    assert refused(issuer.compact(issuer.header | {"crit": crit, "unknown": 1, "b64": True}, issuer.claims()))
    assert refused(issuer.compact(issuer.header | {"crit": crit}, issuer.claims()))


@pytest.mark.parametrize("member", ["b64", "zip"])
def test_r5_a_header_that_changes_what_was_signed_is_refused(issuer, member):
    assert refused(issuer.compact(issuer.header | {member: True}, issuer.claims()))


def test_r6_only_the_compact_form_is_read(issuer):
    text = issuer.token()
    header, payload, signature = text.split(".")
    serialised = json.dumps({"protected": header, "payload": payload, "signature": signature})
    for wrong in [
        "",
        ".",
        "..",
        "...",
        f"{header}.{payload}",
        f"{header}.{payload}.",
        f".{payload}.{signature}",
        f"{header}..{signature}",
        text + "=",
        text + "\n",
        "\n" + text,
        " " + text,
        text + " ",
        text + ".",
        "." + text,
        text + "#",
        text.replace(".", ".\n", 1),
        text + "\x00",
        text + "é",
        f"{header}=.{payload}.{signature}",
        f"{header}.{payload}.{signature}.",
        serialised,
        f"Bearer {text}",
        text.replace(".", "．"),  # noqa: RUF001 - the look-alike is the case
    ]:
        assert refused(wrong)
    assert read_unverified(text)


def test_r6_r15_an_encrypted_token_is_refused(issuer):
    header, payload, signature = issuer.token().split(".")
    assert refused(f"{header}.{payload}.{signature}.{payload}.{signature}")
    jwe = issuer.header | {"alg": "dir", "enc": "A256GCM"}
    assert refused(issuer.compact(jwe, issuer.claims()))


def test_r7_no_other_spelling_of_a_part_is_read(issuer):
    """For each part, every other last digit decodes to the same bytes in a lenient reader, or breaks it; none is read."""
    parts = issuer.compact(issuer.header, issuer.claims(sub="a")).split(".")
    for place in range(3):
        lead, last = parts[place][:-1], parts[place][-1]
        for digit in DIGITS.replace(last, ""):
            twin = [*parts[:place], lead + digit, *parts[place + 1 :]]
            if decode_base64url(lead + digit) is None:
                assert refused(".".join(twin))
            else:  # other bytes, so another token: the signature is not over it
                with pytest.raises(InvalidCredential):
                    issuer.judge(".".join(twin))


@given(st.binary(min_size=1, max_size=70))
def test_r7_bytes_have_one_base64url(data):
    text = encode_base64url(data).decode()
    assert decode_base64url(text) == data
    assert decode_base64url(text + "=") is None
    assert [lead for digit in DIGITS if decode_base64url(lead := text[:-1] + digit) == data] == [text]


@pytest.mark.parametrize("junk", ["+", "/", "=", " ", "\n", "!", ".", "é"])
@pytest.mark.parametrize("frame", ["{}{}{}{}AA", "AA{}{}{}{}AA", "A{}A", "AA{}{}", "{}AAA", "AAA{}{}{}{}A"])
def test_r7_characters_outside_of_the_alphabet_are_not_skipped(frame, junk):
    assert decode_base64url(frame.format(*[junk] * 4)) is None


@given(st.text(alphabet=DIGITS + "+/= \n\x00é\ud800", max_size=12))
def test_r7_whatever_is_read_is_written_back_alike(text):
    data = decode_base64url(text)
    assert data is None or encode_base64url(data).decode() == text


@pytest.mark.parametrize(
    "payload",
    [
        b'{"iss":"a","iss":"b"}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":[{"b":1,"b":2}]}',
        b'{"iss":"a","\\u0069ss":"b"}',
        b'\xef\xbb\xbf{"iss":"a"}',
        '{"iss":"a"}'.encode("utf-16"),
        '{"iss":"a"}'.encode("utf-16-le"),
        '{"iss":"é"}'.encode("latin-1"),
        b'{"iss":"\xed\xa0\x80"}',
        b'{"iss":"\\ud800"}',
        b'{"exp":NaN}',
        b'{"exp":Infinity}',
        b'{"exp":-Infinity}',
        b'{"exp":1e400}',
        b'{"exp":' + b"9" * 5000 + b"}",
        b'{"a":1}x',
        b'{"a":1,}',
        b"{'a':1}",
        b"[]",
        b'"iss"',
        b"7",
        b"null",
        b" ",
        b"{" * 3000,
        b"[" * 3000,
        b'{"a":' * 17 + b"1" + b"}" * 17,
    ],
)
def test_r8_json_with_two_readings_or_none_is_refused(issuer, payload):
    assert parse_json_object(payload) is None
    assert refused(issuer.compact(issuer.header, payload))
    assert refused(issuer.compact(payload, issuer.claims()))


def test_r8_ordinary_json_is_read_as_python_reads_it():
    text = b' {"a" : [1, -2.5, true, false, null, {"b": "\\u00e9\\ud83d\\ude00", "c": "[[[[[[[[[[[[[[[[[[{{"}] }\n'
    assert parse_json_object(text) == json.loads(text)


@pytest.mark.parametrize(("depth", "good"), [(JSON_DEPTH_MAX - 1, True), (JSON_DEPTH_MAX, True), (JSON_DEPTH_MAX + 1, False)])
def test_r8_json_nests_sixteen_deep_and_no_deeper(depth, good):
    text = b'{"a":' * depth + b"1" + b"}" * depth
    assert (parse_json_object(text) is not None) is good


def test_r8_brackets_are_counted_by_depth_and_not_by_number_and_not_in_text():
    wide = {"a": [[] for _ in range(200)], "b": '[{\\"' * 50}
    assert parse_json_object(json.dumps(wide).encode()) == wide


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
        max_leaves=8,
    )
)
def test_r8_what_the_standard_library_writes_is_read_back(value):
    assert parse_json_object(json.dumps({"value": value}).encode()) == {"value": value}


@pytest.mark.parametrize(("surplus", "good"), [(-1, True), (0, True), (1, False)])
def test_r14_the_longest_token_has_8192_characters(issuer, surplus, good):
    length = TOKEN_MAX_LENGTH + surplus
    for header_pad, claims_pad in itertools.product(range(3), range(5500, 5700)):
        header, claims = issuer.header | {"pad": "x" * header_pad}, issuer.claims(pad="x" * claims_pad)
        parts = (len(json.dumps(header)), len(json.dumps(claims)), 64)
        if sum(math.ceil(part * 4 / 3) for part in parts) + 2 == length:
            break
    text = issuer.compact(header, claims)
    assert len(text) == length
    assert issuer.judge(text) == claims if good else refused(text)


def test_r14_a_huge_token_costs_next_to_nothing():
    text = "e30." + "A" * 10_000_000 + ".AA"
    tracemalloc.start()
    assert refused(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("typ", [None, 7, ["at+jwt"], True])
def test_r9_a_type_that_is_no_string_is_refused(issuer, typ):
    assert refused(issuer.compact(issuer.header | {"typ": typ}, issuer.claims()))


@given(st.text(max_size=40))
def test_any_text_is_either_a_token_or_an_invalid_credential(text):
    assert refused(text)


def test_the_issuer_can_be_read_without_trust(issuer, stranger):
    assert issuer_of(issuer.token(iss="https://elsewhere.example")) == "https://elsewhere.example"
    assert issuer_of(issuer.compact(issuer.header, issuer.claims(), stranger.key)) == issuer.url
    assert issuer_of(issuer.token(iss=["https://elsewhere.example"])) is None
    assert issuer_of("no token") is None
