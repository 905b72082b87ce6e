"""Throw-away SoftHSM tokens for tests, made by softhsm/init-token as all others are.

SOFTHSM2_CONF and the loaded module belong to a process, so a process uses one folder. Tests that need another one, or
that break theirs, run in a process of their own (`in_child`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kms_jwks.backends.pkcs11 import PinSource, Pkcs11Backend
from kms_jwks.config import Pkcs11Options

INIT_TOKEN = Path(__file__).resolve().parent.parent / "softhsm" / "init-token"


@dataclass(frozen=True)
class SoftHsm:
    """A token folder: softhsm2.conf, tokens/, pin, so-pin. Can be pickled, so that children use the same token."""

    directory: Path
    module: Path
    label: str

    @property
    def tokens(self) -> Path:
        return self.directory / "tokens"

    @property
    def pin_file(self) -> Path:
        return self.directory / "pin"

    @property
    def pin(self) -> str:
        return self.pin_file.read_text().strip()

    @property
    def lock_dir(self) -> Path:
        return self.directory / "locks"

    @property
    def environment(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.directory / "softhsm2.conf")}

    def options(self, **changes: Any) -> Pkcs11Options:
        """Options for this token; `changes` replace some."""
        return Pkcs11Options.model_validate(
            {
                "type": "pkcs11",
                "module": self.module,
                "pin_file": self.pin_file,
                "token_label": self.label,
                "environment": self.environment,
                **changes,
            }
        )

    def backend(self, *, pin: PinSource | None = None, lock_dir: Path | None = None, **changes: Any) -> Pkcs11Backend:
        """A backend with `options(**changes)`, and with another PIN or folder of locks where they are given."""
        return Pkcs11Backend(
            "test",
            self.options(**changes),
            lock_dir=lock_dir or self.lock_dir,
            pin=pin,
        )

    def pkcs11_tool(self, *arguments: str) -> str:
        """The output of OpenSC's pkcs11-tool with these arguments, logged in to the token; errors included."""
        tool = shutil.which("pkcs11-tool")
        assert tool is not None, "apt-get install opensc"
        run = subprocess.run(
            [
                tool,
                "--module",
                self.module,
                "--token-label",
                self.label,
                "--login",
                "--pin",
                "env:TEST_PIN",
                *arguments,
            ],
            env={**os.environ, **self.environment, "TEST_PIN": self.pin},
            capture_output=True,
            text=True,
            check=False,
        )
        return run.stdout + run.stderr


def make_token(directory: Path, label: str = "kms-jwks-test") -> SoftHsm:
    """A new token, or the one that is in the folder."""
    made = subprocess.run(
        [INIT_TOKEN, directory, label],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return SoftHsm(directory, Path(made.stdout.strip()), label)


def sessions_in_module(backend: Pkcs11Backend) -> int:
    """How many sessions SoftHSM has for this process, counted by trying every handle that it can have given out.

    Its C_GetTokenInfo does not tell. Handles of sessions and objects come from one counter.
    """
    recovering = backend._connection()
    connection = recovering.current
    assert connection is not None
    probe: Any = connection.token.open()
    newest = probe.handle
    probe.close()
    library = ctypes.CDLL(str(recovering.module.path))
    room = ctypes.create_string_buffer(64)
    return sum(library.C_GetSessionInfo(ctypes.c_ulong(number), room) == 0 for number in range(1, newest + 1))
