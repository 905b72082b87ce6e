"""A node on SoftHSM from nothing: the token, its PIN and the settings that name them, for `init --softhsm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import kms_jwks
from kms_jwks import errors

_SCRIPT = "softhsm/init_token.py"
_LABEL = "kms-jwks"


def prepare_node(folder: Path) -> Path:
    """Make a token with a random PIN in `folder`, and settings beside it; return the file with the settings.

    The folder has mode 0700, the files in it 0600. A token and a file with settings that exist are kept. Raises
    ConfigurationError where SoftHSM is not installed or the folder cannot be used.
    """
    folder = folder.absolute()
    module = _make_token(folder)
    file = folder / "kms-jwks.toml"
    try:
        if not file.exists():
            _write_settings(file, folder, module)
    except OSError as error:
        raise errors.ConfigurationError(f"{error.filename}: {error.strerror}.") from None
    return file


def _make_token(folder: Path) -> str:
    """Make the token in a process of its own, for this one loads the module later. Returns the module's path."""
    command = [sys.executable, "-I", str(_script()), str(folder), _LABEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell, our own script
    if done.returncode != 0:
        raise errors.ConfigurationError(
            f"The SoftHSM token was not made: {done.stderr.strip().removeprefix('init-token: ')}.",
            next_step="Repair what the message names, and run the command again: it goes on where it stopped.",
        )
    return done.stdout.strip()


def _script() -> Path:
    """The script that makes tokens: that of the checkout this program runs from, else that which was installed."""
    checkout = Path(kms_jwks.__file__).parents[1] / _SCRIPT
    if checkout.is_file():
        return checkout
    for file in metadata.files("kms-jwks") or ():
        if file.as_posix().endswith(f"share/kms-jwks/{_SCRIPT}"):
            return Path(str(file.locate()))
    raise errors.ConfigurationError(
        f"{_SCRIPT} is not installed with this program.", next_step="Install kms-jwks from its wheel, with pip."
    )


def _write_settings(file: Path, folder: Path, module: str) -> None:
    quoted = json.dumps  # a JSON string is a TOML string
    text = f"""\
# One node with its keys in SoftHSM. Every setting is explained in share/kms-jwks/kms-jwks.toml of the installation.
public_url = "http://127.0.0.1:8080"
bind = ["127.0.0.1:8080"]
database_url = {quoted(f"sqlite:///{folder}/registry.sqlite3")}
state_dir = {quoted(str(folder / "state"))}

[backends.softhsm]
type = "pkcs11"
module = {quoted(module)}
token_label = {quoted(_LABEL)}
pin_file = {quoted(str(folder / "pin"))}

[backends.softhsm.environment]
SOFTHSM2_CONF = {quoted(str(folder / "softhsm2.conf"))}
"""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
