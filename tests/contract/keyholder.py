"""The backend that docs/backends.md shows: written out of the document, installed, and run with its module."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def shown(name: str) -> str:
    """The file of that name as the document has it."""
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    found = re.search(rf"^`{re.escape(name)}`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/backends.md shows no {name}"
    return found[1]


def install(folder: Path) -> Path:
    """pip installs the document's package, entry point and all; what to put on the path."""
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "keyholder.py"):
        (source / name).write_text(shown(name), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-index", "--no-build-isolation", "--target", site, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return site


@contextlib.contextmanager
def holder(site: Path, folder: Path) -> Iterator[None]:
    """The process that holds the keys, its sockets in `folder`."""
    folder.mkdir(mode=0o700)
    process = subprocess.Popen([sys.executable, "-m", "keyholder", folder], cwd=site)
    try:
        end = time.monotonic() + 30
        while not (folder / "manage").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()
