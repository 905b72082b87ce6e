"""Everything of a module is revoked while the module is away: nobody signs, nobody publishes it, nothing breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.integration.conftest import Server, fresh, prepared, running, settled, wait_until


def documents(server: Server, key_set: str) -> list[list[str]]:
    """The kids that are published, asked often enough to hear of every worker."""
    found = [server.call("GET", f"/{key_set}/.well-known/jwks.json", token=None) for _ in range(12)]
    return [[key["kid"] for key in json.loads(answer.body)["keys"]] for answer in found]


def test_a_module_that_is_away_is_revoked_with_all_its_keys(tmp_path: Path) -> None:
    port = prepared(tmp_path)
    with running(tmp_path, port) as server:
        other = server.key_set(fresh("other"), "EdDSA", standby=True)
        sign: tuple[str, str, Any] = ("POST", "/v1/key-sets/default/keys/default/jwt", {"claims": {}})
        assert server.call(*sign, token=server.signer).status == 200
        (tmp_path / "tokens").rename(tmp_path / "away")
        request = {"backend": "softhsm", "reason": "its PIN was on a slide"}

        said = server.must("POST", "/v1/revocations", {**request, "dry_run": True})
        assert len(said["versions"]) == 4
        assert all(documents(server, "default"))

        done = server.must("POST", "/v1/revocations", request)
        assert {v["version"]["state"] for v in done["versions"]} == {"revoked"}
        assert {(p["key_set"], p["key"]) for p in done["disabled"]} == {("default", "default"), (other, "k1")}
        assert (done["unconfirmed"], done["without_successor"]) == ([], [])
        assert {e["key_set"] for e in done["exposures"]} == {"default", other}
        for key_set in ("default", other):
            assert not any(documents(server, key_set))
        answers = [server.call(*sign, token=server.signer) for _ in range(12)]
        assert {answer.problem for answer in answers} == {"key_disabled"}
        assert all(version["destroy_at"] for version in (v["version"] for v in done["versions"]))

        (tmp_path / "away").rename(tmp_path / "tokens")
        server.must("POST", "/v1/key-sets/default/keys/default/enable", {})
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")), 90)
        wait_until(lambda: server.call(*sign, token=server.signer).status == 200)
        assert not {v["version"]["kid"] for v in done["versions"]} & set(documents(server, "default")[0])
