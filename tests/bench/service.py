"""The service that is measured: started as the integration tests start theirs, with the settings of a real one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.integration.conftest import Server, free_port, prepare, running, settled, wait_until

KEY = "main"
GENERATION = 60.0
"""Seconds the module may take for a key."""


@contextlib.contextmanager
def throwaway(workers: int = 2) -> Iterator[Server]:
    """A service on a SoftHSM token of its own, with what nobody set at its default; all gone at the end."""
    with tempfile.TemporaryDirectory(prefix="kms-jwks-", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        prepare(folder, port, workers=workers, threads=8, request_timeout=30, log_level="info")
        with running(folder, port) as server:
            wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
            yield server


def make_key_set(
    server: Server, name: str, alg: str, token: str, *, rsa_bits: int | None = None, purpose: str = "jwt"
) -> None:
    """A key set with one key `main`, with which every worker signs for the client with `token` when this returns."""
    key: dict[str, object] = {"name": KEY, "alg": alg}
    if rsa_bits is not None:
        key["rsa_bits"] = rsa_bits
    server.must("POST", "/v1/key-sets", {"name": name, "purpose": purpose, "keys": [key]})
    path = f"/v1/key-sets/{name}/keys/{KEY}/active"
    wait_until(lambda: server.call("GET", path, token=token).status == 200, GENERATION)
    # A key that took long to make was activated after the answer, which so did not wait for the other workers.
    wait_until(lambda: all(node["lag"] == 0 for node in server.must("GET", "/v1/nodes")["items"] if node["live"]))


def wait_for_standby(server: Server, name: str) -> None:
    """Until every worker publishes the version that comes next; its making no longer keeps the processor busy."""
    wait_until(lambda: settled(server.must("GET", f"/v1/key-sets/{name}/keys/{KEY}")), GENERATION)
