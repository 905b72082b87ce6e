"""Keys that other tools made in the service's token, adopted through the API and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from typing import Any

import pytest
from pkcs11 import Attribute

from kms_jwks import jose
from kms_jwks.client import Client
from kms_jwks.errors import AdoptionRefused, Forbidden, KeyTaken
from kms_jwks.wire import Adopt
from tests.children import in_child, kms_jwks
from tests.foreign_keys import EC, P256, RSA, Pair, make_pairs
from tests.integration.conftest import Server, fresh, wait_until
from tests.softhsm import SoftHsm

pytestmark = pytest.mark.softhsm


@pytest.fixture
def labels(server: Server) -> tuple[str, str, str]:
    """Of a good EC pair, a good RSA pair, and one that may decrypt, each new in the service's token."""
    config = (server.folder / "kms-jwks.toml").read_text()
    module = next(line for line in config.splitlines() if line.startswith("module = ")).split(" = ")[1]
    hsm = SoftHsm(server.folder, type(server.folder)(json.loads(module)), "kms-jwks")
    stem = uuid.uuid4().hex[:12]
    pairs: list[Pair] = [
        (f"ec {stem}", uuid.uuid4().bytes, EC, P256, {}),
        (f"rsa {stem}", uuid.uuid4().bytes, RSA, 2048, {}),
        (f"weak {stem}", uuid.uuid4().bytes, EC, P256, {Attribute.DECRYPT: True}),
    ]
    in_child(make_pairs, hsm, pairs)
    return pairs[0][0], pairs[1][0], pairs[2][0]


def cli(server: Server, *words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "kms_jwks", *words],
        env={"KMS_JWKS_ADDR": server.url, "KMS_JWKS_TOKEN": server.admin, "PATH": "/usr/bin:/bin", **env},
        cwd=server.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done


def uri(label: str) -> str:
    return f"pkcs11:token=kms-jwks;object={label.replace(' ', '%20')}"


def test_a_key_is_adopted_with_its_kid_and_signs(server: Server, labels: tuple[str, str, str]) -> None:
    ec, rsa, _ = labels
    name, kid = fresh("set"), fresh("kid/2019")
    keys = [
        {"name": "k1", "alg": "ES256", "adopt": {"locator": uri(ec), "kid": kid}},
        {"name": "k2", "alg": "PS256", "adopt": {"locator": rsa}},
        {"name": "k3", "alg": "EdDSA"},
    ]
    made = server.must("POST", "/v1/key-sets", {"name": name, "keys": keys})
    assert [k["active_kid"] is not None for k in made["keys"]] == [True, True, True]
    assert [k["versions"][0]["origin"] for k in made["keys"]] == ["adopted", "adopted", "generated"]
    assert made["keys"][0]["active_kid"] == kid
    signer = server.client("signer", key_set=name)
    for key, alg in (("k1", "ES256"), ("k2", "PS256")):
        signed = server.must("POST", f"/v1/key-sets/{name}/keys/{key}/jwt", {"claims": {"aud": "a"}}, token=signer)
        assert signed["alg"] == alg
        body = {"token": signed["token"], "audience": "a"}
        assert server.must("POST", f"/v1/key-sets/{name}/verify", body)["kid"] == signed["kid"]
    shown = server.must("GET", f"/v1/key-sets/{name}/keys/k1/versions/1/attributes")
    assert shown["attributes"]["CKA_NEVER_EXTRACTABLE"] is True
    versions = f"/v1/key-sets/{name}/keys/k1/versions"
    for way in (kid, kid.replace("/", "%2F")):
        assert server.must("GET", f"{versions}/{way}")["number"] == 1
        assert server.must("GET", f"{versions}/{way}/safety")["kid"] == kid
    with Client(server.url, server.admin) as admin:
        assert admin.version(name, "k1", kid).kid == admin.public_jwk(name, "k1", kid)["kid"] == kid
    # Its successor is made here, as for any key.
    wait_until(lambda: len(server.must("GET", f"/v1/key-sets/{name}/keys/k1")["versions"]) == 2)


def test_a_refusal_names_what_would_have_to_be_accepted_and_writes_nothing(
    server: Server, labels: tuple[str, str, str]
) -> None:
    weak = labels[2]
    name = server.key_set(None, "ES256", standby=True)
    before = server.revision_of_everything()
    refused = server.call("POST", f"/v1/key-sets/{name}/keys/k1/versions", {"adopt": {"locator": weak}})
    assert (refused.status, refused.problem) == (409, "adoption_refused")
    assert refused.json["weaknesses"] == ["it may do more than sign"]
    for locator, status, code in (
        ("no such label", 409, "adoption_refused"),
        ("pkcs11:token=other;object=x", 409, "adoption_refused"),
        ("pkcs11:object=x?pin-value=1234", 409, "adoption_refused"),
        ("", 400, "invalid_field"),
    ):
        answer = server.call("POST", f"/v1/key-sets/{name}/keys/k1/versions", {"adopt": {"locator": locator}})
        assert (answer.status, answer.problem) == (status, code)
        assert b"1234" not in answer.body
    assert server.revision_of_everything() == before
    assert "pin-value=" not in server.log


def test_the_client_adopts_and_translates_refusals(server: Server, labels: tuple[str, str, str]) -> None:
    weak = labels[2]
    name = server.key_set(None, "ES256", standby=True)
    with Client(server.url, server.admin) as admin:
        with pytest.raises(AdoptionRefused) as refusal:
            admin.create_version(name, "k1", adopt=Adopt(locator=weak))
        assert refusal.value.fields["weaknesses"] == ["it may do more than sign"]
        made = admin.create_version(name, "k1", adopt=Adopt(locator=weak, accept=True))
        assert (made.state, made.origin, made.weaknesses) == ("published", "adopted", ["it may do more than sign"])
        assert made.public_jwk is not None
        assert made.kid == jose.thumbprint(made.public_jwk)
        with pytest.raises(KeyTaken):
            admin.create_version(name, "k1", adopt=Adopt(locator=weak, accept=True, kid=fresh("kid")))
    with Client(server.url, server.client("operator", key_set=name)) as operator, pytest.raises(Forbidden):
        operator.create_version(name, "k1", adopt=Adopt(locator=weak, accept=True))


def test_the_command_line_adopts_and_shows_what_was_accepted(server: Server, labels: tuple[str, str, str]) -> None:
    ec, _, weak = labels
    name, kid = fresh("set"), fresh("old")
    cli(server, "key-set", "create", name)
    refused = cli(server, "key", "create", name, "main", "--alg", "ES256", "--adopt", weak, code=1)
    assert "it may do more than sign" in refused.stderr
    assert "accept" in refused.stderr
    words = ("key", "create", name, "main", "--alg", "ES256", "--adopt", weak, "--kid", kid, "--accept")
    made = cli(server, *words)
    assert "Warning: version 1 was adopted although it may do more than sign" in made.stderr
    assert "adopted: it may do more than sign" in made.stdout
    assert cli(server, *words, code=1).stderr.startswith("Error: ")

    for listing in (
        cli(server, "version", "list", name, "main"),
        cli(server, "key", "show", name, "main"),
        cli(server, "key-set", "show", name),
        cli(server, "key", "list", name),
    ):
        assert "it may do more than sign" in listing.stdout
    assert "Warning: adopted although" in cli(server, "version", "show", name, "main", kid).stderr
    found: dict[str, Any] = json.loads(cli(server, "version", "show", name, "main", "1", "--json").stdout)
    assert found["weaknesses"] == ["it may do more than sign"]

    added = cli(server, "version", "create", name, "main", "--adopt", uri(ec))
    assert "adopted" in added.stdout
    usage = cli(server, "version", "create", name, "main", "--accept", code=2)
    assert "go with --adopt" in usage.stderr

    config = str(server.folder / "kms-jwks.toml")
    doctor = kms_jwks("doctor", "--config", config, folder=server.folder, environment=os.environ)
    said = doctor.stdout + doctor.stderr
    assert f"adopted although it may do more than sign (kid {kid})" in said
    assert f"key {name} main 1" in said
    assert "Rotate to a key that this service generated" in said
