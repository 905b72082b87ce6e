"""What an operator types in an emergency and on a quiet day, against the real service: the words and the JSON."""

from __future__ import annotations

import json
import re
from datetime import datetime

from tests.integration.conftest import PREFIX, Run, Server, fresh, wait_until


def test_a_rehearsed_and_a_real_revocation(run: Run, server: Server) -> None:
    name = server.key_set(None, "ES256", standby=True)
    before = server.must("GET", f"/v1/key-sets/{name}")
    said = run("version", "revoke", name, "k1", "1", "--reason", "a drill", "--dry-run")
    assert "would be revoked" in said.stdout
    assert "I1 is overridden" in said.stderr
    assert server.must("GET", f"/v1/key-sets/{name}") == before
    for word in ("PyJWT", "go-oidc", ".NET", "kube-apiserver", "CDN", "second rotation"):
        assert word in said.stdout, word
    done = json.loads(run("version", "revoke", name, "k1", "1", "--reason", "not a drill", "--yes", "--json").stdout)
    assert (done["dry_run"], done["changed"], done["unconfirmed"]) == (False, True, [])
    assert done["successor"]["kid"] in run("jwks", name).stdout
    assert done["version"]["kid"] not in run("jwks", name).stdout
    exposure = done["exposure"]
    assert len(exposure["verifiers"]) >= 16
    assert all(v["source"] and v["words"] for v in exposure["verifiers"])
    assert datetime.fromisoformat(exposure["trusted_until"]) > datetime.fromisoformat(exposure["withdrawn_at"])
    assert "was revoked before" in run("version", "revoke", name, "k1", "1", "--yes").stdout


def test_a_whole_key_set_in_one_command(run: Run, server: Server) -> None:
    name = server.key_set(None, "ES256", "EdDSA", standby=True)
    words = ("revoke", "--key-set", name, "--reason", "stolen")
    assert "4 versions would be revoked" in run(*words, "--dry-run").stdout
    run(*words, code=2)
    operator = server.client("operator", key_set=name)
    done = json.loads(run(*words, "--yes", "--json", token=operator).stdout)
    assert [v["version"]["state"] for v in done["versions"]] == ["revoked"] * 4
    run("revoke", "--backend", "softhsm", "--reason", "x", "--yes", code=3, token=operator)
    run("revoke", "--backend", "nothing", "--reason", "x", "--yes", code=1)
    run("revoke", "--reason", "x", "--yes", code=2)
    run("revoke", "--backend", "a", "--key-set", "b", "--reason", "x", "--yes", code=2)
    old = {v["version"]["kid"] for v in done["versions"]}
    wait_until(lambda: server.must("GET", f"/v1/key-sets/{name}")["keys"][0]["active_kid"])
    assert server.must("GET", f"/v1/key-sets/{name}")["keys"][0]["active_kid"] not in old


def test_breaking_the_glass(run: Run, server: Server) -> None:
    name = server.key_set(None, "ES256", standby=True)
    client, token = server.client_with("operator", key_set=name)
    glass = ("--break-glass", "--reason", "the old one is on a tape", "--yes")
    early = run("key", "rotate", name, "k1", token=token, code=1)
    assert "usable_at: " in early.stderr
    run("key", "rotate", name, "k1", "--break-glass", "--yes", token=token, code=2)
    run("key", "rotate", name, "k1", "--reason", "x", token=token, code=2)
    run("key", "rotate", name, "k1", *glass, token=token, code=3)
    run("key", "rotate", name, "k1", *glass, code=3)  # an administrator has no such right by default
    run("grant", "create", client, "break-glass", "--key-set", name)
    run("key", "rotate", name, "k1", *glass, token=token)
    shown = run("version", "show", name, "k1", "2").stderr
    assert "I1 was overridden at" in shown
    assert "I1 overridden" in run("version", "list", name, "k1").stdout
    assert f"by {client}: the old one is on a tape" in shown
    refused = json.loads(run("version", "retire", name, "k1", "1", "--json", token=token, code=1).stderr)
    assert (refused["type"], "retirable_at" in refused) == (f"{PREFIX}transition_refused", True)
    assert "retired" in run("version", "retire", name, "k1", "1", *glass, token=token).stdout
    assert len(server.must("GET", f"/{name}/.well-known/jwks.json", token=None)["keys"]) <= 2


def test_time_as_a_table_and_as_a_bar(run: Run, server: Server) -> None:
    name = server.key_set(None, "ES256", standby=True)
    bars = run("key", "timeline", name, "k1", COLUMNS="80").stdout
    assert max(map(len, bars.splitlines())) <= 80
    assert "now" in bars
    assert re.search(r"^1 active +\S*█", bars, re.MULTILINE)
    assert re.search(r"^2 published +\S*░", bars, re.MULTILINE)
    assert "I1" in bars
    found = json.loads(run("key", "timeline", name, "k1", "--json").stdout)
    assert [(v["number"], v["state"]) for v in found["versions"]] == [(1, "active"), (2, "published"), (3, "planned")]
    assert found["versions"][1]["next_at"] is not None
    safety = run("version", "safety", name, "k1", "2", COLUMNS="80").stdout
    assert "too early by this much" in safety
    assert re.search(r"^I1  .*╌", safety, re.MULTILINE)


def test_nodes_and_the_custodian(run: Run, server: Server) -> None:
    server.must("POST", "/v1/key-sets/default/keys/default/jwt", {"claims": {}}, token=server.signer)

    def seen() -> bool:
        items = json.loads(run("node", "list", "--json").stdout)["items"]
        return len(items) == 2 and any(n["backends"] == {"softhsm": "ok"} for n in items)

    wait_until(seen)
    listed = run("node", "list").stdout
    assert "softhsm: ok" in listed
    assert re.search(r"\b\d+ of 10 s\b", listed)
    assert "The custodian acts on node" in listed
    custodian = json.loads(run("node", "custodian", "--json").stdout)
    assert (custodian["acting"], custodian["halted"]) == (True, None)
    assert custodian["term"] >= 1
    assert run("node", "custodian").stdout.startswith("acting")
    worker = json.loads(run("node", "list", "--json").stdout)["items"][0]["worker"]
    assert "alive" in run("node", "forget", worker, "--yes", code=1).stderr
    run("node", "forget", fresh("worker"), "--yes", code=1)
