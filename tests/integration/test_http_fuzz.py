"""schemathesis against the service's own description: no 500, nothing outside of what /openapi.json promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "ignored_auth",
)


@pytest.fixture
def names(server: Server) -> dict[str, str]:
    """A key set of its own, which the fuzzer may do with what it likes."""
    return {"path.key_set": server.key_set(None, "ES256"), "path.key": "k1", "path.version": "1"}


def fuzz(server: Server, folder: Path, token: str, parameters: dict[str, str], examples: int) -> None:
    config = folder / "schemathesis.toml"
    lines = [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in parameters.items()]
    # 503 is what readiness is for: it says so of a key that is not there too.
    ready = ["[[operations]]", 'include-path = "/readyz/sign"', "checks.not_a_server_error.enabled = false"]
    checks = ["[checks]", "enabled = false", *(f"{check}.enabled = true" for check in CHECKS)]
    config.write_text("\n".join(["[parameters]", *lines, *checks, *ready, ""]), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        str(config),
        "run",
        f"{server.url}/openapi.json",
        f"--header=Authorization: Bearer {token}",
        f"--max-examples={examples}",
        "--phases=coverage,fuzzing",
        "--seed=1",
        "--generation-database=none",
        "--request-timeout=15",
        "--no-color",
    ]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "COLUMNS": "160"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_service_keeps_its_own_description(server: Server, tmp_path: Path, names: dict[str, str]) -> None:
    """Asked by a caller who owns the key set, so that the use cases themselves are reached."""
    name, token = server.client_with("admin", key_set=names["path.key_set"])
    both = {"client": name, "role": "signer", "scope": {"key_set": names["path.key_set"]}}
    server.must("POST", "/v1/grants", both | {"accept_combined_duties": True})
    fuzz(server, tmp_path, token, names, examples=2)
