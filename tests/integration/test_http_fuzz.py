"""schemathesis against the service's own description: no 500, nothing outside of what /openapi.json promises."""

from __future__ import annotations

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


@pytest.mark.slow
def test_the_service_keeps_its_own_description(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text("", encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        str(config),
        "run",
        f"{server.url}/openapi.json",
        f"--header=Authorization: Bearer {server.client('auditor')}",
        f"--checks={','.join(CHECKS)}",
        "--max-examples=8",
        "--phases=examples,coverage,fuzzing",
        "--seed=1",
        "--generation-database=none",
        "--request-timeout=10",
        "--no-color",
    ]
    before = server.revision_of_everything()
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "COLUMNS": "160"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert server.revision_of_everything() == before
