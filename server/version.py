"""The version of weft that this source is; a test compares it with ``pyproject.toml``."""

import shutil
import subprocess
from pathlib import Path

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit of the checkout that this file lies in, shortened; empty where it was installed from a wheel."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return ""
    command = [git, "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
