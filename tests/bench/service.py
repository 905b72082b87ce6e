"""The service that is measured: started as the integration tests start theirs, with the settings of a real one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.integration.conftest import Server, running, wait_until

KEY = "main"
GENERATION = 60.0
"""Seconds the module may take for a key."""


@contextlib.contextmanager
def throwaway(workers: int) -> Iterator[Server]:
    """A service on a SoftHSM token of its own, with what nobody set at its default; all gone at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="kms-jwks-", ignore_cleanup_errors=True) as folder,
        running(Path(folder), workers=workers, threads=8, request_timeout=30, log_level="info") as server,
    ):
        yield server


def make_key_set(server: Server, name: str, alg: str, *, rsa_bits: int | None = None, purpose: str = "jwt") -> str:
    """A key set with one key `main` that signs when this returns; the token of a client that may sign with it."""
    key: dict[str, object] = {"name": KEY, "alg": alg}
    if rsa_bits is not None:
        key["rsa_bits"] = rsa_bits
    server.must("POST", "/v1/key-sets", {"name": name, "purpose": purpose, "keys": [key]})
    token = server.client("signer" if purpose == "jwt" else "raw-signer", key_set=name)
    path = f"/v1/key-sets/{name}/keys/{KEY}/active"
    wait_until(lambda: server.call("GET", path, token=token).status == 200, GENERATION)
    return token


def wait_for_standby(server: Server, name: str) -> None:
    """Until the custodian has made the version that comes next: it no longer keeps the processor busy."""

    def there() -> bool:
        versions = server.must("GET", f"/v1/key-sets/{name}/keys/{KEY}")["versions"]
        return any(version["state"] == "published" for version in versions)

    wait_until(there, GENERATION)
