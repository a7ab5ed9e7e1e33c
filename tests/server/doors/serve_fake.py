"""Runs ``serve`` over the fake engine, as a process that can be sent signals; the argument is its options as JSON."""

import json
import sys

from tests.server.doors.fake_engine import TARGET


def main() -> int:
    """Serve."""
    # here, because the engine's process imports this module again
    from weft.server.app import serve
    from weft.server.config import ConfigError, ServerConfig

    try:
        return serve(ServerConfig(**json.loads(sys.argv[1])), TARGET)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
