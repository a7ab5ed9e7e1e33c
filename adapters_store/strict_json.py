"""Reads JSON that somebody else wrote: small, shallow, plain, every key said once, every number finite."""

import json
import re
from typing import Any

from weft.adapters_store.errors import AdapterInvalid, expected, quoted

CONFIG_BYTES_MAX = 1 << 20
DEPTH_MAX = 8
# 2**63 has nineteen
DIGITS_MAX = 19

# a whole string, terminated or not, so that the search cannot start inside one; or a bracket
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.?)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)


def read_object(raw: bytes, field: str, bytes_max: int = CONFIG_BYTES_MAX) -> dict[str, Any]:
    """The JSON object in ``raw``. AdapterInvalid says what is wrong with it, under ``field`` or the key at fault."""
    if len(raw) > bytes_max:
        raise expected(field, f"at most {bytes_max} bytes", len(raw))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise expected(field, "UTF-8", f"byte {error.start} that is not") from None
    _check_depth(text, field)
    hooks = _Hooks(field)
    try:
        value = json.loads(
            text,
            parse_constant=hooks.constant,
            parse_int=hooks.integer,
            parse_float=hooks.number,
            object_pairs_hook=hooks.pairs,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise expected(field, "JSON", f"something else at {where}", error.msg) from None
    if not isinstance(value, dict):
        raise expected(field, "a JSON object", f"a {type(value).__name__}")
    return value


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON escapes can spell lone surrogates, which are no characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_depth(text: str, field: str) -> None:
    # before the parser sees it, because the parser recurses
    depth = 0
    for match in _TOKEN.finditer(text):
        c = match[0]
        depth += (c in "[{") - (c in "]}")
        if depth > DEPTH_MAX:
            raise expected(field, f"at most {DEPTH_MAX} levels of nesting", "more")


class _Hooks:
    """What the parser calls for the parts that Python's reading of JSON is too kind about."""

    def __init__(self, field: str) -> None:
        self.field = field

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise AdapterInvalid(f"{self.field}: expected every key once, got {quoted(key)} twice", key)
            found[key] = value
        return found

    def constant(self, word: str) -> float:
        raise expected(self.field, "finite numbers", word)

    def number(self, digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise expected(self.field, "finite numbers", quoted(digits, 40))
        return value

    def integer(self, digits: str) -> int:
        if len(digits.lstrip("-")) > DIGITS_MAX:
            raise expected(self.field, f"integers of at most {DIGITS_MAX} digits", f"one of {len(digits)}")
        if digits == "-0":
            raise expected(self.field, "0", digits)
        return int(digits)
