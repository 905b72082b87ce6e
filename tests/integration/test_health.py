"""The container's health check, against a service and against nothing."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.integration.conftest import Server, free_port


def check(bind: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KMS_JWKS_")}
    done = subprocess.run(
        [sys.executable, "-m", "kms_jwks.http.health"],
        env=environment | {"KMS_JWKS_BIND": bind},
        timeout=20,
        check=False,
    )
    return done.returncode


def test_a_service_that_runs_is_healthy(server: Server) -> None:
    assert check(f"127.0.0.1:{server.port}") == 0
    assert check(f"0.0.0.0:{server.port}") == 0


def test_nothing_is_not(server: Server) -> None:
    assert check(f"127.0.0.1:{free_port()}") == 1
    assert check("not an address") == 1
