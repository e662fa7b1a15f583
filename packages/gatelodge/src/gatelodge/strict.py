"""Base64url and JSON, read so that one value has one spelling.

The parsers of the standard library are lenient where a credential must not be: they skip stray characters, ignore the
unused bits of a last base64 digit, let the last of two equal members win, and take ``NaN``. Whatever is refused here is
``None`` and not an exception, since a parser's exception quotes its input, and that may be a secret.
"""

import json
import math
import re
from binascii import a2b_base64, b2a_base64
from typing import Final, NoReturn

JSON_DEPTH_MAX: Final = 16

# The digits that only standard base64 has, and padding, become a character that no alphabet has.
_TO_STANDARD, _TO_URL = bytes.maketrans(b"-_+/=", b"+/!!!"), bytes.maketrans(b"+/", b"-_")
# RFC 4648 3.5, by the number of digits in the last group: the padding it lacks, and the last digits that leave no
# unused bit set. A group of one digit is never whole.
_LAST_GROUPS: Final = {
    0: (b"", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"),
    1: (b"", ""),
    2: (b"==", "AQgw"),
    3: (b"=", "AEIMQUYcgkosw048"),
}
# A string that never ends is matched to the end of the text: were it no match, the search would begin again at each quote.
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)


def encode_base64url(data: bytes) -> bytes:
    """Write ``data`` as base64url without padding (RFC 7515 section 2)."""
    return b2a_base64(data, newline=False).translate(_TO_URL).rstrip(b"=")


def decode_base64url(text: str) -> bytes | None:
    """Read base64url without padding; ``None`` when empty, or when ``encode_base64url`` would write it otherwise."""
    padding, last_digits = _LAST_GROUPS[len(text) % 4]
    if not text or text[-1] not in last_digits:
        return None
    try:
        return a2b_base64(text.encode("ascii").translate(_TO_STANDARD) + padding, strict_mode=True)
    except ValueError:
        return None


def parse_json_object(data: bytes) -> dict[str, object] | None:
    """Read a JSON object (RFC 8259) in UTF-8; ``None`` for anything else, by the rules of ``parse_json``."""
    value = parse_json(data)
    return value if isinstance(value, dict) else None


def parse_json(data: bytes) -> dict[str, object] | list[object] | None:
    """Read a JSON object or array (RFC 8259) in UTF-8; ``None`` for anything else.

    Refused are a byte order mark, a member named twice at any depth, ``NaN`` and the infinities, numbers too large for
    a float, text with half a surrogate pair, and nesting deeper than 16.
    """
    try:
        text = data.decode("utf-8")
        if _is_too_deep(text):
            return None
        value = _DECODER.decode(text)
        if "\\u" in text:  # only an escape can bring half a surrogate pair past the decoder
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError:
        return None
    return value if isinstance(value, (dict, list)) else None


def encode_json(value: object) -> bytes:
    """Write ``value`` as JSON in UTF-8, without white space. ``ValueError`` for ``NaN`` and the infinities."""
    return _ENCODER.encode(value).encode("utf-8")


def _is_too_deep(text: str) -> bool:
    # As many brackets as that cannot nest deeper; almost every text is done here.
    if text.count("{") + text.count("[") <= JSON_DEPTH_MAX:
        return False
    depth = 0
    for character in _JSON_STRING.sub("", text):
        if character in "{[":
            depth += 1
            if depth > JSON_DEPTH_MAX:
                return True
        elif character in "}]":
            depth -= 1
    return False


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is named twice")
    return members


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("the number is too large")
    return value


def _refuse_constant(_text: str) -> NoReturn:
    raise ValueError("not a number of JSON")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique_members, parse_float=_finite_float, parse_constant=_refuse_constant
)
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False)
