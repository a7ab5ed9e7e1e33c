"""Checks the bearer token of a call."""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from weft.server.config import ConfigError
from weft.server.errors import Unauthenticated

SCHEME = "bearer "


class Bearer:
    """One token that all callers share. Keeps only its digest, and compares digests in constant time."""

    def __init__(self, token: str) -> None:
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError("the bearer token must be printable ASCII without spaces, got something else")
        self._digest = hashlib.sha256(token.encode()).digest()

    @classmethod
    def from_file(cls, path: str) -> "Bearer | None":
        """Read the token from a file, so that it shows in no list of processes; no path, no token."""
        if not path:
            return None
        try:
            return cls(Path(path).read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token_file must be a readable text file, got {error}") from None

    def check(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Raise Unauthenticated unless exactly one ``authorization: Bearer <token>`` with the right token was sent."""
        values = [value for key, value in metadata if key == "authorization"]
        if len(values) != 1:
            raise Unauthenticated(f"expected exactly one authorization metadata entry, got {len(values)}")
        value = values[0].decode("latin-1") if isinstance(values[0], bytes) else values[0]
        token = value[len(SCHEME) :] if value[: len(SCHEME)].lower() == SCHEME else ""
        if not hmac.compare_digest(hashlib.sha256(token.encode("utf-8", "replace")).digest(), self._digest):
            raise Unauthenticated("expected the bearer token of this server, got another one")
