"""Reads the keys of a config one by one, strictly typed; whatever no parser asked for is refused by name."""

import json
from typing import Any, NoReturn

from weft.adapters_store.errors import expected, quoted, some
from weft.adapters_store.strict_json import is_text

NUMBER_MAX = 1e9
LIST_MAX = 4096
TEXT_LENGTH_MAX = 4096

_MISSING = object()


class Settings:
    """The keys of one config. Each method takes a key away; ``finish`` refuses what is left."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = dict(values)

    def text(self, key: str, required: bool = False) -> str | None:
        """Opaque text, or None when it is null or absent and not required."""
        value = self._take(key, required)
        if value is None and not required:
            return None
        if not isinstance(value, str) or len(value) > TEXT_LENGTH_MAX or not is_text(value):
            self._refuse(key, f"text of at most {TEXT_LENGTH_MAX} characters", value)
        return value

    def flag(self, key: str) -> bool:
        """true or false; absent is false."""
        value = self._take(key, False)
        if value is None:
            return False
        if not isinstance(value, bool):
            self._refuse(key, "true or false", value)
        return value

    def flag_or_text(self, key: str, default: bool) -> bool | str:
        """true, false or text; ``default`` when absent or null."""
        value = self._take(key, False)
        if value is None:
            return default
        if not isinstance(value, bool | str) or (isinstance(value, str) and not is_text(value)):
            self._refuse(key, "true, false or a name", value)
        return value

    def integer(self, key: str, minimum: int = 1) -> int:
        """A required integer; 8.0, "8" and true are none."""
        return self._integer(key, self._take(key, True), minimum)

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        """An integer, or None when it is null or absent."""
        value = self._take(key, False)
        return None if value is None else self._integer(key, value, minimum)

    def number(self, key: str) -> float:
        """A required finite number, 0 to NUMBER_MAX."""
        return self._number(key, self._take(key, True), 0.0)

    def optional_number(self, key: str) -> float | None:
        """A number from 0, or None when it is null or absent."""
        value = self._take(key, False)
        return None if value is None else self._number(key, value, 0.0)

    def signed_number(self, key: str) -> float:
        """A required finite number of at most NUMBER_MAX in size."""
        return self._number(key, self._take(key, True), -NUMBER_MAX)

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any, why: str = "") -> Any:
        """One of the values allowed; ``default`` when absent or null."""
        value = self._take(key, False)
        if value is None:
            return default
        # true equals 1 in Python, not in JSON
        if not any(value == option and type(value) is type(option) for option in allowed):
            options = ", ".join(
                str(option).lower() if option is True or option is False else str(option) for option in allowed
            )
            self._refuse(key, f"one of {options}", value, why)
        return value

    def names(self, key: str) -> str | tuple[str, ...] | None:
        """A pattern, or a list of names in the order of the file, or None."""
        value = self._take(key, False)
        if value is None or (isinstance(value, str) and is_text(value)):
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) and is_text(name) for name in value):
            self._refuse(key, "a list of names, or a pattern", value)
        if len(value) > LIST_MAX:
            self._refuse(key, f"at most {LIST_MAX} names", len(value))
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """One integer or a list of them, or None."""
        value = self._take(key, False)
        if value is None:
            return None
        return self._integers(key, value if isinstance(value, list) else [value])

    def integers_by_name(self, key: str) -> dict[str, tuple[int, ...]] | tuple[int, ...] | None:
        """A list of integers, or one for each of several names, or None."""
        value = self._take(key, False)
        if value is None or isinstance(value, list):
            return None if value is None else self._integers(key, value)
        if not isinstance(value, dict) or not all(isinstance(entry, list) for entry in value.values()):
            self._refuse(key, "a list of integers, or an object of such lists", value)
        return {name: self._integers(key, entry) for name, entry in value.items()}

    def flags_by_name(self, key: str) -> dict[str, tuple[bool, ...]]:
        """A list of true and false for each of several names; empty when absent or null."""
        said = self._object(key)
        for value in said.values():
            if not isinstance(value, list) or len(value) > LIST_MAX or not all(type(flag) is bool for flag in value):
                self._refuse(key, f"an object of lists of at most {LIST_MAX} true or false", value)
        return {name: tuple(value) for name, value in said.items()}

    def nested(self, key: str) -> "Settings | None":
        """The settings inside one of these, or None. Whoever asks for them calls their ``finish``."""
        value = self._take(key, False)
        if value is None or value is False:
            return None
        if not isinstance(value, dict):
            self._refuse(key, "an object", value)
        return Settings(value)

    def objects(self, key: str) -> list[dict[str, Any]]:
        """A required list of objects, each the settings of something else."""
        value = self._take(key, True)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self._refuse(key, "a list of objects", value)
        return list(value)

    def integer_by_pattern(self, key: str) -> dict[str, int]:
        """Pattern -> positive integer, in the order of the file."""
        return {pattern: self._integer(key, value, 1) for pattern, value in self._object(key).items()}

    def number_by_pattern(self, key: str) -> dict[str, float]:
        """Pattern -> number, in the order of the file."""
        return {pattern: self._number(key, value, 0.0) for pattern, value in self._object(key).items()}

    def refuse(self, key: str, why: str, but: tuple[Any, ...] = ()) -> None:
        """A setting that is not served: only absent, null, false, empty or one of ``but`` passes."""
        value = self._take(key, False)
        falsy = value is None or value is False or value in ("", [], {})
        if not falsy and value not in but:
            self._refuse(key, "null or false", value, why)

    def ignore(self, *keys: str) -> None:
        """Settings that only matter in training."""
        for key in keys:
            self._values.pop(key, None)

    def finish(self, method: str) -> None:
        """Refuse keys that nobody asked for: any of them might change the maths."""
        if self._values:
            unknown = sorted(self._values)
            raise expected(unknown[0], f"only settings of {method} that weft knows", some(unknown))

    def _take(self, key: str, required: bool) -> Any:
        value = self._values.pop(key, _MISSING)
        if value is not _MISSING:
            return value
        if required:
            raise expected(key, "a value", "none")
        return None

    def _object(self, key: str) -> dict[str, Any]:
        value = self._take(key, False)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._refuse(key, "an object", value)
        return value

    def _integers(self, key: str, values: list[Any]) -> tuple[int, ...]:
        if len(values) > LIST_MAX:
            self._refuse(key, f"at most {LIST_MAX} integers", len(values))
        return tuple(self._integer(key, entry, 0) for entry in values)

    def _integer(self, key: str, value: Any, minimum: int) -> int:
        if type(value) is not int or not minimum <= value < 2**31:
            self._refuse(key, f"an integer of at least {minimum}", value)
        return value

    def _number(self, key: str, value: Any, minimum: float) -> float:
        if type(value) not in (int, float) or not minimum <= value <= NUMBER_MAX:
            self._refuse(key, f"a number from {minimum:g} to {NUMBER_MAX:g}", value)
        return float(value)

    def _refuse(self, key: str, wanted: str, value: object, why: str = "") -> NoReturn:
        raise expected(key, wanted, show(value), why)


def show(value: object) -> str:
    """A JSON value as its sender wrote it, short and safe to print."""
    return quoted(json.dumps(value), 80)
