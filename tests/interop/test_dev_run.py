"""`./dev run --backend aws-kms --moto`, for real: the README's curl lines work unchanged, nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jwt
import psutil
import pytest

from tests.integration.conftest import free_port, wait_until
from tests.interop.test_readme import ADDRESS, ROOT, blocks

START_SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """A running `./dev run`; `log` is what it printed."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str

    @property
    def log(self) -> str:
        return (self.folder / "dev.log").read_text(encoding="utf-8")

    def moto(self) -> psutil.Process:
        (found,) = [p for p in psutil.Process(self.process.pid).children() if "moto.server" in p.cmdline()]
        return found


@contextlib.contextmanager
def dev_run(folder: Path) -> Iterator[Run]:
    """The command, until its lines are printed; stopped at the end of the block."""
    bind = f"127.0.0.1:{free_port()}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KMS_JWKS_", "AWS_"))}
    with (folder / "dev.log").open("wb") as log:
        process = subprocess.Popen(
            [ROOT / "dev", "run", "--backend", "aws-kms", "--moto", "--bind", bind, "--var", folder / "var"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=kept | {"AWS_PROFILE": "somebody", "AWS_SESSION_TOKEN": "of-somebody"},  # not used, and no obstacle
            cwd=folder,
        )
    made = Run(process, folder, f"http://{bind}")
    try:
        end = time.monotonic() + START_SECONDS
        while "Ctrl-C" not in made.log:
            assert process.poll() is None, made.log
            assert time.monotonic() < end, made.log
            time.sleep(0.1)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, made.log


def readme_curl_lines(run: Run) -> list[dict[str, str]]:
    """The README's shell blocks that begin with curl, run in a folder with var/; what they answer."""
    lines = [block.code.replace(ADDRESS, run.url) for block in blocks(ROOT / "README.md") if block.runs]
    found = [
        subprocess.run(["bash", "-c", code], cwd=run.folder, capture_output=True, text=True, timeout=60, check=True)
        for code in lines
        if code.startswith("curl")
    ]
    return [json.loads(done.stdout) for done in found]


def test_the_readme_works_on_aws_kms_by_moto(tmp_path: Path) -> None:
    kids = []
    for _ in range(2):  # the second run finds the folder of the first
        with dev_run(tmp_path) as run:
            moto = run.moto()
            answers = readme_curl_lines(run)
            assert answers
            key = jwt.PyJWKClient(f"{run.url}/.well-known/jwks.json").get_signing_key_from_jwt(answers[0]["token"])
            claims = jwt.decode(
                answers[0]["token"], key, algorithms=["ES256"], issuer=f"{run.url}/default", audience="shop"
            )
            assert claims["sub"] == "alice"
            with pytest.raises(jwt.InvalidAudienceError):
                jwt.decode(answers[0]["token"], key, algorithms=["ES256"], audience="elsewhere")
            kids.append(answers[0]["kid"])
            said = run.log
        assert f"{tmp_path}/var/aws-kms is made anew" in said
        wait_until(lambda: not moto.is_running())  # noqa: B023 - called at once
    assert kids[0] != kids[1]


def test_a_folder_that_is_not_moto_s_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "aws-kms").mkdir()
    (tmp_path / "aws-kms" / "precious").touch()
    command: list[str | Path] = [
        ROOT / "dev",
        "run",
        "--backend",
        "aws-kms",
        "--moto",
        "--bind",
        f"127.0.0.1:{free_port()}",
    ]
    done = subprocess.run([*command, "--var", tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "none of an earlier run on moto" in done.stderr
    assert (tmp_path / "aws-kms" / "precious").exists()


@pytest.mark.parametrize("words", [["--backend", "aws-kms"], ["--moto"], ["--backend", "vault", "--moto"]])
def test_backends_that_it_cannot_run_are_refused(words: list[str]) -> None:
    done = subprocess.run([ROOT / "dev", "run", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "aws-kms with --moto" in done.stderr
