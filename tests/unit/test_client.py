"""The client's configuration: addresses, certificates, the environment, and what never shows."""

from __future__ import annotations

import datetime as dt
import logging
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kms_jwks import errors, wire
from kms_jwks.client import Client, token_file

TOKEN = "kj_this-is-secret"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080",
        "http://127.3.2.1",
        "http://localhost:1",
        "http://kms.localhost",
        "http://[::1]:8080",
        "https://keys.example.com",
        "https://keys.example.com:8443/kms/",
        "https://[2001:db8::1]",
    ],
)
def test_addresses_that_are_accepted(url: str) -> None:
    assert repr(Client(url, TOKEN)) == f"Client({url.rstrip('/')!r})"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "keys.example.com",
        "ftp://keys.example.com",
        "https://",
        "https://user:pa55@keys.example.com",
        "https://keys.example.com?x=1",
        "https://keys.example.com#top",
        "https://keys.example.com:99999",
        "https://keys.example.com:0",
        "https://keys example.com",
        "https://keys.example.com/\n",
        "https://[::1",
        "https://ke\u00ffs.example.com",
    ],
)
def test_addresses_that_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        Client(url, TOKEN)
    assert "pa55" not in str(caught.value)
    assert "KMS_JWKS_ADDR" in caught.value.next_step


@pytest.mark.parametrize("host", ["keys.example.com", "10.0.0.7", "localhost.example.com", "[2001:db8::1]"])
def test_plain_http_to_another_machine_needs_a_word(host: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="could read the API token"):
        Client(f"http://{host}", TOKEN)
    Client(f"http://{host}", TOKEN, allow_insecure_http=True)


def test_the_token_does_not_show(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = Client("http://127.0.0.1:1", TOKEN)
    shown = [repr(client), str(client), repr(vars(client)), repr(vars(client._transport)), caplog.text]
    assert not any(TOKEN in text for text in shown)


def test_the_environment_describes_a_client(tmp_path: Path) -> None:
    assert repr(Client.from_environment({})) == "Client('http://127.0.0.1:8080')"
    assert repr(Client.from_environment({"KMS_JWKS_ADDR": ""})) == "Client('http://127.0.0.1:8080')"
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    for given in ({"KMS_JWKS_TOKEN": TOKEN}, {"KMS_JWKS_TOKEN_FILE": str(file)}):
        client = Client.from_environment({"KMS_JWKS_ADDR": "http://localhost:9", **given})
        assert client._transport._credentials() == {"Authorization": f"Bearer {TOKEN}"}
    assert Client.from_environment({})._transport._credentials() == {}
    with pytest.raises(errors.ConfigurationError, match="KMS_JWKS_CACERT"):
        Client.from_environment({"KMS_JWKS_ADDR": "https://a", "KMS_JWKS_CACERT": str(tmp_path / "none")})


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="nothing-here"):
        token_file(tmp_path / "nothing-here")()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.ConfigurationError, match="not UTF-8"):
        token_file(tmp_path / "binary")()


def certificate(folder: Path, *, password: bytes | None = None) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "crt").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    return folder / "crt", folder / "key"


def test_certificates_are_read_at_once(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path)
    Client("https://a", TOKEN, ca_cert=crt, client_cert=crt, client_key=key)
    with pytest.raises(errors.ConfigurationError, match="needs its client certificate"):
        Client("https://a", TOKEN, client_key=key)
    for bad in (tmp_path / "missing", key):
        with pytest.raises(errors.ConfigurationError, match="KMS_JWKS_CACERT"):
            Client("https://a", TOKEN, ca_cert=bad)
    with pytest.raises(errors.ConfigurationError, match="KMS_JWKS_CLIENT_CERT"):
        Client("https://a", TOKEN, client_cert=crt)


def test_an_encrypted_key_is_refused_and_never_asked_for(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, password=b"secret")
    with pytest.raises(errors.ConfigurationError, match="KMS_JWKS_CLIENT_CERT"):
        Client("https://a", TOKEN, client_cert=crt, client_key=key)


KIDS = [
    "plain",
    "a.b-c_d",
    "a/b",
    "/a",
    "a//b/",
    "a+b=",
    "50%",
    "%2F",
    "ключ",
    "a b",
    "~x",
    "~",
    "-x",
    "old\n",
    "..",
    "?#",
]


@pytest.mark.parametrize("kid", KIDS)
def test_a_kid_in_a_path_holds_no_character_that_a_proxy_touches(kid: str) -> None:
    segment = wire.kid_segment(kid)
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", segment)
    assert segment not in (".", "..")
    assert wire.kid_of_segment(segment) == kid


@pytest.mark.parametrize("text", ["~", "~!", "~A", "~gA", "~AA"])
def test_a_segment_that_is_no_kid_is_refused(text: str) -> None:
    with pytest.raises(errors.NotFound, match="base64url"):
        wire.kid_of_segment(text)
    with pytest.raises(errors.InvalidField):
        wire.kid_segment("\ud800")
