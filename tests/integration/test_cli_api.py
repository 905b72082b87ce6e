"""The command line against the real service: the flows of the README, `--json`, exit codes, tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import jose
from kms_jwks.client import administration
from tests.integration.conftest import Run, Server, fresh, wait_until


@pytest.fixture(scope="module")
def orders(server: Server) -> str:
    """A key set with the keys k1 (ES256) and k2 (EdDSA)."""
    return server.key_set(None, "ES256", "EdDSA")


# --- the flows of the README ------------------------------------------------------------------------------------------


def test_from_a_new_key_set_to_an_emergency(run: Run, tmp_path: Path) -> None:
    name, issuer = fresh("orders"), fresh("issuer")
    made = run("key-set", "create", name, "--key", "main:ES256", "--cache-lifetime", "60s")
    assert f"/{name}/.well-known/jwks.json" in made.stdout

    run("client", "create", issuer)
    run("grant", "create", issuer, "signer", "--key-set", name, "--key", "main")
    file = tmp_path / "issuer.token"
    run("client", "token", "create", issuer, "--expires-in", "30d", "--output", str(file))
    assert file.stat().st_mode & 0o777 == 0o600

    claims = tmp_path / "claims.json"
    claims.write_text('{"sub": "alice", "aud": "shop"}')
    signed = run("sign", name, "main", "--claims", f"@{claims}", "--expires-in", "2m", token=file.read_text().strip())
    token = signed.stdout.strip()
    assert token.count(".") == 2

    verified = run("verify", name, "-", "--audience", "shop", input=signed.stdout)
    assert json.loads(verified.stdout)["sub"] == "alice"
    refused = run("verify", name, token, "--audience", "bank", code=1)
    assert "Do not trust the token." in refused.stderr
    assert refused.stdout == ""

    def waiting() -> Any:
        found = json.loads(run("key", "active", name, "main", "--json").stdout)
        return found["kid"] if found["next"] and found["next"]["not_before"] else None

    kid = wait_until(waiting)
    early = run("key", "rotate", name, "main", code=1)
    assert "usable_at: " in early.stderr
    problem = json.loads(run("key", "rotate", name, "main", "--json", code=1).stderr)
    assert problem["type"] == "urn:kms-jwks:problem:not_yet_usable"
    assert (datetime.fromisoformat(problem["usable_at"]) - datetime.now().astimezone()).total_seconds() > 86_000
    run("key", "rotate", name, "main", "--expected-kid", "another", code=1)

    run("version", "revoke", name, "main", kid, "--reason", "stolen laptop", "--yes")
    assert "stolen laptop" in run("version", "show", name, "main", kid).stdout
    assert "revoked" in run("verify", name, token, "--audience", "shop", code=1).stderr
    assert kid not in run("jwks", name).stdout


def test_the_life_of_a_version(run: Run) -> None:
    name = fresh("set")
    run("key-set", "create", name, "--key", "k:EdDSA")

    def second() -> Any:
        items = json.loads(run("version", "list", name, "k", "--json").stdout)["items"]
        return items[1] if len(items) == 2 and items[1]["visible_since"] else None

    standby = wait_until(second)
    assert standby["state"] == "published"
    assert "may sign from" in run("version", "activate", name, "k", "2", code=1).stderr
    assert "active" in run("version", "show", name, "k", "1").stdout
    assert "I1" in run("version", "safety", name, "k", "1").stdout
    assert "CKA_NEVER_EXTRACTABLE" in run("version", "attributes", name, "k", "1").stdout
    run("version", "create", name, "k", code=1)
    run("version", "destroy", name, "k", "2", "--yes", code=1)
    run("version", "revoke", name, "k", standby["kid"], "--yes")
    dated = json.loads(run("version", "destroy", name, "k", "2", "--at", "20d", "--yes", "--json").stdout)
    assert 19 <= (datetime.fromisoformat(dated["destroy_at"]) - datetime.now().astimezone()).days <= 20
    assert json.loads(run("version", "cancel-destroy", name, "k", "2", "--json").stdout)["destroy_at"] is None


def test_disable_and_enable(run: Run, orders: str, server: Server) -> None:
    signer = server.client("signer", key_set=orders)
    assert "enabled           no" in run("key", "disable", orders, "k2").stdout
    assert "is disabled" in run("sign", orders, "k2", "--claims", "{}", token=signer, code=1).stderr
    run("key", "enable", orders, "k2")
    run("sign", orders, "k2", "--claims", "-", token=signer, input='{"sub": "x"}')


def test_the_end_of_a_key_set(run: Run, server: Server) -> None:
    """A mistake is deleted; what has published a key is retired: its JWKS is empty in the end, and its name taken."""
    typo, name = fresh("set"), fresh("set")
    run("key-set", "create", typo)
    operator = server.client("operator", key_set=typo)
    run("key-set", "delete", typo, "--yes", code=3, token=operator)
    assert f"{typo} is deleted." in run("key-set", "delete", typo, "--yes").stdout
    run("key-set", "show", typo, code=1)
    run("key-set", "create", typo)

    server.key_set(name, "ES256", "EdDSA", standby=True)
    signer, admin = server.client("signer", key_set=name), server.client("admin", key_set=name)
    run("sign", name, "k1", "--claims", "{}", token=signer)
    refused = run("key", "delete", name, "k1", "--yes", code=1, token=admin).stderr
    assert "has published a version" in refused
    assert "kms-jwks key retire" in refused
    run("key", "retire", name, "k1", code=2)  # asks, and no terminal answers
    shown = run("key", "retire", name, "k1", "--yes", token=admin).stdout
    assert re.search(r"^retired +20", shown, re.MULTILINE)
    assert re.search(r"^1 +retiring", shown, re.MULTILINE)
    problem = server.call("POST", f"/v1/key-sets/{name}/keys/k1/jwt", {"claims": {}}, token=signer)
    assert (problem.status, problem.problem) == (409, "key_retired")
    assert "retired" in run("key", "enable", name, "k1", code=1).stderr
    assert "retired" in run("key", "list", name).stdout
    kept = json.loads(run("key-set", "retire", name, "--yes", "--json", token=admin).stdout)
    assert [v["state"] for k in kept["keys"] for v in k["versions"]] == ["retiring", "retired"] * 2
    assert len(server.must("GET", f"/{name}/.well-known/jwks.json", token=None)["keys"]) == 2
    for key in ("k1", "k2"):
        run("version", "revoke", name, key, "1", "--yes")
    document = server.call("GET", f"/{name}/.well-known/jwks.json", token=None)
    assert (document.status, document.json) == (200, {"keys": []})
    assert "max-age=300" in document.headers["Cache-Control"]
    late = server.call("POST", f"/v1/key-sets/{name}/keys", {"name": "k3", "alg": "ES256"})
    assert (late.status, late.problem) == (409, "key_set_retired")
    assert "in use, or was used before" in run("key-set", "create", name, code=1).stderr
    assert "default_key_set" in run("key-set", "retire", "default", "--yes", code=1).stderr


def test_changes_are_made_at_a_revision(run: Run, orders: str) -> None:
    before = json.loads(run("key-set", "show", orders, "--json").stdout)
    after = json.loads(run("key-set", "update", orders, "--stale-if-error", "30m", "--json").stdout)
    assert (after["stale_if_error"], after["revision"]) == (1800, before["revision"] + 1)
    stale = run("key-set", "update", orders, "--access", "public", "--revision", str(before["revision"]), code=1)
    assert "Read it again" in stale.stderr
    policy = run("key", "update", orders, "k1", "--max-token-ttl", "30m", "--typ", "at+jwt", "--json").stdout
    assert (json.loads(policy)["policy"]["max_token_ttl"], json.loads(policy)["profile"]["typ"]) == (1800, "at+jwt")
    unsafe = run("key", "update", orders, "k1", "--publish-lead", "5m", code=1)
    assert "publish_lead" in unsafe.stderr
    warned = run("key", "update", orders, "k1", "--publish-lead", "10m", "--allow-unsafe-publish-lead")
    assert "Warning: " in warned.stderr
    run("key", "update", orders, "k1", "--publish-lead", "24h", "--no-allow-unsafe-publish-lead", "--typ", "JWT")


def test_the_calendar_of_a_key(run: Run, orders: str) -> None:
    def update(*options: str) -> Any:
        return json.loads(run("key", "update", orders, "k2", *options, "--json").stdout)["policy"]

    set_ = update("--rotate-window", "mon-thu 09:00-16:00", "--rotate-jitter", "2h", "--hold-until", "2031-02-03")
    assert (set_["rotate_window"], set_["rotate_jitter"]) == ("mon-thu 09:00-16:00", 7200)
    assert set_["hold_until"] == "2031-02-03T00:00:00Z"
    shown = run("key", "show", orders, "k2").stdout
    assert "mon-thu 09:00-16:00" in shown
    assert "2031-02-03T00:00:00Z" in shown
    assert "weekdays" in run("key", "update", orders, "k2", "--rotate-window", "weekdays 09:00-10:00", code=1).stderr
    run("key", "update", orders, "k2", "--hold-until", "2031-02-03", "--no-hold", code=2)
    cleared = update("--rotate-window", "", "--no-hold", "--rotate-jitter", "1h")
    assert (cleared["rotate_window"], cleared["hold_until"]) == ("", None)


def test_external_keys(run: Run, server: Server) -> None:
    name, kid = fresh("set"), fresh("old")
    run("key-set", "create", name, "--existing-issuer")
    donor = server.key_set(None, "ES256")
    jwk = json.loads(run("version", "public-key", donor, "k1", "1").stdout)
    public = json.dumps({k: jwk[k] for k in ("kty", "crv", "x", "y")})
    add = ("external-key", "add", name, kid, "--alg", "ES256", "--remove-at", "30d")
    assert kid in run(*add, "--jwk", "-", input=public).stdout
    run(*add, "--jwk", public, code=1)
    assert kid in run("external-key", "list", name).stdout
    assert kid in run("jwks", name).stdout
    assert kid in run("external-key", "show", name, kid).stdout
    shown = run("key-set", "show", name)
    assert [kid, "ES256", "admin-bootstrap"] == [shown.stdout.splitlines()[-1].split()[i] for i in (0, 1, 3)]
    assert "can sign for the key set's issuer" in shown.stderr
    (row,) = [line for line in run("key-set", "list").stdout.splitlines() if line.startswith(f"{name} ")]
    assert row.split()[3:5] == ["-", "1"]
    run("external-key", "remove", name, kid, "--yes")
    run("external-key", "show", name, kid, code=1)
    assert "1 external key(s) were published before and removed" in run("key-set", "show", name).stderr
    (row,) = [line for line in run("external-key", "list", name).stdout.splitlines() if line.startswith(kid)]
    assert "admin-bootstrap" in row
    assert not row.rstrip().endswith("-"), "when it was removed"
    pem = run("version", "public-key", donor, "k1", "1", "--format", "pem").stdout
    run(
        "external-key",
        "add",
        name,
        fresh("pem"),
        "--alg",
        "ES256",
        "--remove-at",
        "2099-01-01",
        "--pem",
        "-",
        input=pem,
    )


def test_a_whole_jwks_is_taken_key_by_key(run: Run, server: Server, tmp_path: Path) -> None:
    name = server.key_set(None)
    keys = [public_jwk(kid=f"k{number}", alg="ES256") for number in range(12)]
    keys[1] |= {"x5c": ["AA=="], "use": "jwt-svid"}
    keys[2] |= {"use": "enc"}
    del keys[3]["alg"]
    del keys[4]["kid"]
    keys[5] |= {"y": keys[5]["y"] + "="}
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": keys}))
    add = ("external-key", "add", name, "--remove-at", "30d", "--jwks", f"@{file}")

    some = run(*add, "--kid", "k0", "--kid", "k1")
    assert [line.split()[-1] for line in some.stdout.splitlines()[1:]] == ["published"] * 2
    assert "Not published of k1: x5c." in some.stderr
    assert "Nothing was sent" in run(*add, "--kid", "k0", "--kid", "nobody", code=2).stderr

    rest = run(*add, "--alg", "ES256", code=1)
    results = {line.split()[0]: line for line in rest.stdout.splitlines()[1:]}
    for kid, words in (
        ("k0", "this very key"),
        ("k2", "use is 'enc'"),
        ("-", "kid: missing"),
        ("k5", "no padding"),
        ("k3", "published"),
        ("k11", "published"),
    ):
        assert words in results[kid], (kid, rest.stdout)
    assert "external-key repair" in rest.stderr
    assert len(server.must("GET", f"/v1/key-sets/{name}/external-keys")["items"]) == 9

    file.write_text(json.dumps({"keys": [keys[5], public_jwk(kid="k12", alg="ES256")]}))
    repaired = run("external-key", "repair", "--jwk", f"@{file}").stdout
    full = run("external-key", "add", name, "--remove-at", "30d", "--jwks", "-", "--json", code=1, input=repaired)
    items = json.loads(full.stdout)["items"]
    assert [(i["kid"], i["added"]) for i in items] == [("k5", True), ("k12", False)]
    assert items[1]["problem"]["room"] == 0
    said = run("external-key", "add", name, "--remove-at", "30d", "--jwks", "-", code=1, input=repaired).stderr
    assert "there was no room for k12" in said

    moved = run("external-key", "update", name, "k5", "--remove-at", "2031-02-03").stdout
    assert "moved" in moved
    assert "2031-02-03T00:00:00Z" in moved
    run("external-key", "remove", name, "k5", "--yes")
    jwk = json.dumps(json.loads(repaired)["keys"][0])
    assert "removed" in run("external-key", "add", name, "--remove-at", "30d", "--jwk", jwk).stdout
    private = json.dumps({"keys": [{**keys[0], "d": "AA"}]})
    for form in ("--jwks", "--jwk"):
        run("external-key", "add", name, "--remove-at", "30d", form, private, code=2)


def public_jwk(**more: Any) -> dict[str, Any]:
    return {**jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()), **more}


def test_an_emergency_names_the_external_keys_that_stay(run: Run, server: Server) -> None:
    name = server.key_set(None, "ES256", standby=True)
    jwk = json.dumps(public_jwk(kid="old", alg="ES256"))
    run("external-key", "add", name, "--remove-at", "30d", "--jwk", jwk)
    revoke = ("revoke", "--key-set", name, "--reason", "stolen")
    said = run(*revoke, "--dry-run")
    assert f"External key old of {name} would stay published" in said.stderr
    assert "--external-keys" in said.stderr
    said = run(*revoke, "--dry-run", "--external-keys")
    assert f"External key old of {name} would be withdrawn" in said.stdout
    run("external-key", "show", name, "old")
    done = run(*revoke, "--yes", "--external-keys")
    assert f"External key old of {name} is withdrawn for ever" in done.stdout
    run("external-key", "show", name, "old", code=1)
    assert "revoked" in run("external-key", "add", name, "--remove-at", "30d", "--jwk", jwk, code=1).stderr
    run("revoke", "--backend", "softhsm", "--reason", "x", "--external-keys", "--dry-run", code=2)


def test_callers(run: Run, server: Server) -> None:
    name = fresh("client")
    run("client", "create", name)
    assert name in run("client", "show", name).stdout
    assert name in run("client", "list").stdout
    made = run("client", "token", "create", name)
    token = made.stdout.strip()
    assert token.startswith("kj_")
    assert token not in made.stderr
    assert token not in run("client", "token", "list", name).stdout
    run("key-set", "list", token=token, code=3)
    grant = json.loads(run("grant", "create", name, "auditor", "--everything", "--json").stdout)
    assert grant["scope"] == {}
    run("key-set", "list", token=token)
    assert grant["id"] in run("grant", "list", "--client", name).stdout
    run("grant", "delete", grant["id"], "--yes")
    run("key-set", "list", token=token, code=3)
    identity = json.loads(run("client", "token", "list", name, "--json").stdout)["items"][0]["id"]
    assert identity in run("client", "token", "revoke", name, identity, "--yes").stdout
    revoked = run("key-set", "list", token=token, code=3)
    assert "revoked" in revoked.stderr
    assert token not in revoked.output
    run("client", "delete", name, "--yes")
    run("client", "show", name, code=1)


def test_combined_duties(run: Run) -> None:
    name = fresh("client")
    run("client", "create", name)
    run("grant", "create", name, "admin", "--key-set", "default")
    words = ("grant", "create", name, "signer", "--key-set", "default", "--key", "default")
    refused = run(*words, code=1).stderr
    assert f"Client '{name}' has the role admin within the same scope" in refused
    assert "--accept-combined-duties" in refused
    given = run(*words, "--accept-combined-duties")
    assert "Warning: combines duties with " in given.stderr
    listed = run("grant", "list", "--client", name).stdout
    assert [line.count("combines duties with ") for line in listed.splitlines()] == [0, 1, 1]
    assert listed.count("(accepted)") == 1
    assert "its own grants" in run("grant", "create", "admin-bootstrap", "signer", "--everything", code=3).stderr


def test_a_token_is_rotated_where_it_stands(run: Run, tmp_path: Path) -> None:
    name, file = fresh("client"), tmp_path / "token"
    run("client", "create", name)
    run("client", "token", "create", name, "--expires-in", "20d", "--output", str(file))
    old = file.read_text()
    warned = run("client", "token", "list", name).stderr
    identity = json.loads(run("client", "token", "list", name, "--json").stdout)["items"][0]["id"]
    assert f"Warning: token {identity} ends soon; rotate it: kms-jwks client token rotate {name} {identity}" in warned
    rotate = ("client", "token", "rotate", name, identity)
    run("client", "token", "rotate", name, "nothing", "--output", str(file), code=1)
    assert file.read_text() == old, "an error leaves the file as it was"
    done = run(*rotate, "--output", str(file))
    assert f"The old token {identity} works until " in done.stderr
    assert (file.read_text() != old, file.stat().st_mode & 0o777) == (True, 0o600)
    assert list(tmp_path.iterdir()) == [file]
    for token in (old, file.read_text()):
        assert "no grant" in run("key-set", "list", token=token.strip(), code=3).stderr
    listed = run("client", "token", "list", name)
    assert listed.stdout.count("(rotated)") == 1
    assert "Warning" not in listed.stderr
    ended = run(*rotate, "--overlap", "0s")
    assert ended.stdout.startswith("kj_")
    assert "expired" in run("key-set", "list", token=old.strip(), code=3).stderr
    assert "cannot be written" in run(*rotate, "--output", str(tmp_path / "none" / "t"), code=2).stderr


def test_workers_that_are_alive_are_not_forgotten(run: Run) -> None:
    workers = json.loads(run("node", "list", "--json").stdout)["items"]
    assert len([w for w in workers if w["live"]]) == 2
    assert workers[0]["worker"] in run("node", "list").stdout
    assert "alive" in run("node", "forget", workers[0]["worker"], "--yes", code=1).stderr
    run("node", "forget", "nobody", "--yes", code=1)


# --- for programs -----------------------------------------------------------------------------------------------------


def test_json_is_the_apis_own(run: Run, orders: str, server: Server) -> None:
    same = {
        ("key-set", "show", orders): f"/v1/key-sets/{orders}",
        ("key", "show", orders, "k1"): f"/v1/key-sets/{orders}/keys/k1",
        ("version", "show", orders, "k1", "1"): f"/v1/key-sets/{orders}/keys/k1/versions/1",
        ("version", "attributes", orders, "k1", "1"): f"/v1/key-sets/{orders}/keys/k1/versions/1/attributes",
        ("version", "list", orders, "k1"): f"/v1/key-sets/{orders}/keys/k1/versions",
        ("key", "list", orders): f"/v1/key-sets/{orders}/keys",
        ("jwks", orders): f"/{orders}/.well-known/jwks.json",
    }
    for words, path in same.items():
        assert run(*words, "--json").stdout.encode() == server.call("GET", path).body + b"\n", words


def test_lists_are_whole_however_many_pages_they_have(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {fresh("client") for _ in range(5)}
    for name in names:
        run("client", "create", name)
    monkeypatch.setattr(administration, "PAGE", 2)
    listed = json.loads(run("client", "list", "--json").stdout)
    assert set(listed) == {"items"}
    assert names <= {client["name"] for client in listed["items"]}
    assert all(name in run("client", "list").stdout for name in names)


def test_signing_for_programs(run: Run, orders: str, server: Server) -> None:
    signer = server.client("signer", key_set=orders)
    made: dict[str, Any] = json.loads(run("sign", orders, "k1", "--claims", "{}", "--json", token=signer).stdout)
    assert set(made) == {"token", "kid", "alg", "jti", "expires_at"}
    verified = json.loads(run("verify", orders, made["token"], "--audience", "any", "--json").stdout)
    assert set(verified) == {"header", "claims", "kid"}


def test_public_keys_in_every_form(run: Run, orders: str, server: Server, tmp_path: Path) -> None:
    path = f"/v1/key-sets/{orders}/keys/k1/versions/1/public-key"
    assert json.loads(run("version", "public-key", orders, "k1", "1").stdout) == server.must("GET", path)
    for form, media in (("pem", "application/x-pem-file"), ("der", "application/octet-stream")):
        file = tmp_path / form
        run("version", "public-key", orders, "k1", "1", "--format", form, "--output", str(file))
        assert file.read_bytes() == server.call("GET", path, headers={"Accept": media}).body


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_exit_codes(run: Run, orders: str, server: Server) -> None:
    run("key-set", "show", "nothing-here", code=1)
    run("key-set", "create", orders, code=1)
    run("key-set", "create", "Not-A-Name", code=1)
    run("key-set", "show", code=2)
    run("key-set", "list", code=3, token="kj_none")
    run("client", "list", code=3, token=server.signer)
    run("client", "list", "--addr", "http://127.0.0.1:9", code=4)
    unreachable = run("client", "list", "--addr", "http://127.0.0.1:9", "--json", code=4)
    assert json.loads(unreachable.stderr)["type"] == "urn:kms-jwks:problem:service_unreachable"


def test_a_token_from_a_file(run: Run, server: Server) -> None:
    admin, wrong = str(server.folder / "admin.token"), str(server.folder / "pin")
    run("client", "list", KMS_JWKS_TOKEN="", KMS_JWKS_TOKEN_FILE=admin)
    run("client", "list", "--token-file", admin, token="kj_wrong")
    run("client", "list", "--token-file", wrong, code=3)
    assert "no credentials" in run("client", "list", code=3, KMS_JWKS_TOKEN="").stderr
    run("jwks", KMS_JWKS_TOKEN="")


def test_as_a_process_of_its_own(server: Server) -> None:
    def process(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KMS_JWKS_")}
        return subprocess.run(
            [sys.executable, "-m", "kms_jwks", *words],
            env={**environment, "KMS_JWKS_ADDR": server.url, "KMS_JWKS_TOKEN": server.signer, **env},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )

    signed = process("sign", "default", "default", "--claims", '{"aud": "demo"}')
    assert (signed.returncode, signed.stderr) == (0, "")
    verified = process("verify", signed.stdout.strip(), "--audience", "demo", KMS_JWKS_TOKEN=server.admin)
    assert (verified.returncode, json.loads(verified.stdout)["aud"]) == (0, "demo")
    narrow = process("key", "show", "default", "default", COLUMNS="80")
    assert max(map(len, narrow.stdout.splitlines())) <= 80
    assert "\x1b" not in narrow.stdout
    denied = process("client", "list")
    assert denied.returncode == 3
    assert denied.stderr.startswith("Error: ")
    assert "Traceback" not in denied.stderr
    assert process("version", "revoke", "default", "default", "1").returncode == 2
