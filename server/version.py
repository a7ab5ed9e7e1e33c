"""The version of weft that this source is; a test compares it with ``pyproject.toml``."""

VERSION = "0.1.0"
