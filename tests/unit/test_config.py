"""Where settings come from, what is refused, and that the commented example says the same as the model."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from kms_jwks.config import (
    AwsKmsOptions,
    Pkcs11Options,
    Settings,
    ThirdPartyBackend,
    load_settings,
    prepare_state_dir,
    variable_name,
)
from kms_jwks.errors import ConfigurationError

EXAMPLE = Path(__file__).parents[2] / "config" / "kms-jwks.toml"

HSM = """
[backends.hsm-1]
type = "pkcs11"
module = "/opt/hsm/p11.so"
token_label = "signing"
pin_file = "/run/pin"
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("KMS_JWKS_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "kms-jwks.toml"


def refusal(path: Path | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(path)
    return caught.value.detail


# --- sources ----------------------------------------------------------------------------------------------------------


def test_defaults_need_no_file() -> None:
    settings = load_settings()
    assert settings.public_url == "http://127.0.0.1:8080"
    assert settings.bind == ("127.0.0.1:8080",)
    assert settings.signing_lease == 10
    assert settings.backends == {}
    assert settings.default_backend is None


def test_each_source_wins_over_the_next(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    toml.write_text("workers = 3\nthreads = 3\nsigning_lease = 3\n")
    (secrets / "KMS_JWKS_THREADS").write_text("4\n")
    (secrets / "kms_jwks_signing_lease").write_text("4\n")
    (secrets / "unrelated").write_text("not ours")
    monkeypatch.setenv("KMS_JWKS_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("KMS_JWKS_SIGNING_LEASE", "5")
    settings = load_settings(toml)
    assert (settings.workers, settings.threads, settings.signing_lease, settings.keepalive) == (3, 4, 5, 75)
    assert Settings(signing_lease=6).signing_lease == 6


def test_the_file_may_be_named_by_a_variable(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text("workers = 7\n")
    monkeypatch.setenv("KMS_JWKS_CONFIG", str(toml))
    assert load_settings().workers == 7


def test_variables_reach_into_backends(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text(HSM)
    monkeypatch.setenv("KMS_JWKS_BACKENDS__HSM_1__SESSIONS", "8")
    monkeypatch.setenv("KMS_JWKS_BACKENDS__HSM_1__SIGN_IN_PLACE", "false")
    monkeypatch.setenv("KMS_JWKS_BACKENDS__HSM_1__ENVIRONMENT__Vendor_CONF", "/etc/hsm,conf")
    monkeypatch.setenv("KMS_JWKS_BACKENDS__HSM_1__MANAGEMENT__PIN_ENV", "KMS_JWKS_CUSTODIANS_PIN")
    monkeypatch.setenv("KMS_JWKS_CUSTODIANS_PIN", "1234")
    backend = load_settings(toml).backends["hsm-1"]
    assert isinstance(backend, Pkcs11Options)
    assert backend.management is not None
    assert backend.management.pin_env == "KMS_JWKS_CUSTODIANS_PIN"
    assert backend.sessions == 8
    assert backend.sign_in_place is False
    assert backend.environment == {"Vendor_CONF": "/etc/hsm,conf"}


KMS = '[backends.aws]\ntype = "aws-kms"\nregion = "eu-central-1"\nendpoint_url = "{}"\n'


@pytest.mark.parametrize(
    "url", ["https://vpce.example", "http://127.0.0.1:5000", "http://[::1]:80", "http://localhost"]
)
def test_kms_is_reached_safely(toml: Path, url: str) -> None:
    toml.write_text(KMS.format(url))
    backend = load_settings(toml).backends["aws"]
    assert isinstance(backend, AwsKmsOptions)
    assert backend.endpoint_url == url


@pytest.mark.parametrize("url", ["http://kms.example", "http://127.0.0.1.example", "ftp://localhost", "kms.example"])
def test_an_endpoint_without_tls_must_be_on_this_machine(toml: Path, url: str) -> None:
    toml.write_text(KMS.format(url))
    with pytest.raises(ConfigurationError, match="endpoint_url must begin with https"):
        load_settings(toml)


def test_lists_in_variables_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_JWKS_BIND", "127.0.0.1:80, [::1]:80,unix:/run/kms.sock")
    monkeypatch.setenv("KMS_JWKS_FORWARDED_ALLOW_IPS", "10.0.0.0/8,::1")
    settings = load_settings()
    assert settings.bind == ("127.0.0.1:80", "[::1]:80", "unix:/run/kms.sock")
    assert settings.forwarded_allow_ips == ("10.0.0.0/8", "::1")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_JWKS_TLS_CERT", "")
    assert load_settings().tls_cert is None


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().workers = 3  # type: ignore[misc]


def test_the_only_backend_is_the_default(toml: Path) -> None:
    toml.write_text(HSM)
    assert load_settings(toml).default_backend == "hsm-1"


def test_of_two_backends_none_is_the_default(toml: Path) -> None:
    toml.write_text(HSM + HSM.replace("hsm-1", "hsm-2"))
    assert load_settings(toml).default_backend is None


def test_node_name_fits_the_grammar_on_any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, name in {"Node_1.Example.ORG": "node-1-example-org", "---": "node", "x" * 80: "x" * 63}.items():
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert Settings().node_name == name


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("workres = 2", "workres (KMS_JWKS_WORKRES)"),
        ("workers = 0", "workers (KMS_JWKS_WORKERS)"),
        ("workers = 65", "workers"),
        ("threads = 'many'", "threads"),
        ("signing_lease = 61", "signing_lease"),
        ("poll_interval_ms = 49", "poll_interval_ms"),
        ("signing_lease = 1\npoll_interval_ms = 600", "half of signing_lease"),
        ("max_body = 2097152", "max_batch_body"),
        ("routes = 'none'", "routes"),
        ("log_level = 'loud'", "log_level"),
        ("public_url = 'https://kms.example/'", "public_url"),
        ("public_url = 'https://kms.example/?a=b'", "public_url"),
        ("public_url = 'https://user:hunter2@kms.example'", "public_url"),
        ("public_url = 'ftp://kms.example'", "public_url"),
        ("public_url = 'https:///path'", "public_url"),
        ("public_url = 'https://KMS.example'", "https://kms.example"),
        ("public_url = 'https://kms.example:443/keys'", "https://kms.example/keys"),
        ("public_url = 'https://kms.example//keys'", "https://kms.example/keys"),
        ("default_key_set = 'Default'", "default_key_set"),
        ("bind = []", "bind"),
        ("bind = ['localhost']", "bind.0"),
        ("bind = ['localhost:65536']", "bind.0"),
        ("forwarded_allow_ips = ['*']", "forge"),
        ("forwarded_allow_ips = ['proxy']", "forwarded_allow_ips.0"),
        ("tls_cert = '/etc/tls.crt'", "tls_key"),
        ("default_backend = 'hsm'", "default_backend"),
    ],
)
def test_a_bad_value_is_refused_by_name(toml: Path, line: str, named: str) -> None:
    toml.write_text(line)
    detail = refusal(toml)
    assert named in detail
    assert "hunter2" not in detail


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("token_label", "#token_label"), "token_serial"),
        (("pin_file", "#pin_file"), "pin_env"),
        (("pin_file", "pin_stdin = true\npin_file"), "exactly one"),
        (('"pkcs11"', '"PKCS 11"'), "backends.hsm-1.type (KMS_JWKS_BACKENDS__HSM_1__TYPE)"),
        (("module", "modul"), "backends.hsm-1.module"),
        (("hsm-1", "HSM"), "backends.HSM"),
        (("pin_file", 'token_serial = "a"\nexpected_serial = "b"\npin_file'), "different tokens"),
        (("pin_file", "sessions = 65\npin_file"), "sessions"),
    ],
)
def test_a_bad_backend_is_refused_by_name(toml: Path, change: tuple[str, str], named: str) -> None:
    toml.write_text(HSM.replace(*change))
    assert named in refusal(toml)


def test_two_backends_cannot_share_standard_input(toml: Path) -> None:
    one = HSM.replace('pin_file = "/run/pin"', "pin_stdin = true")
    toml.write_text(one + one.replace("hsm-1", "hsm-2"))
    assert "pin_stdin" in refusal(toml)


def test_backends_cannot_contradict_each_other_about_a_variable(toml: Path) -> None:
    one = HSM + 'environment = {CONF = "/a"}\n'
    toml.write_text(one + one.replace("hsm-1", "hsm-2").replace("/a", "/b"))
    assert "CONF" in refusal(toml)


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_JWKS_SIGNING_LEASES", "3")
    assert "KMS_JWKS_SIGNING_LEASES" in refusal()


def test_an_unknown_secret_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "KMS_JWKS_DATABASE").write_text("hunter2")
    monkeypatch.setenv("KMS_JWKS_SECRETS_DIR", str(tmp_path))
    detail = refusal()
    assert "KMS_JWKS_DATABASE" in detail
    assert "hunter2" not in detail


def test_the_clients_variables_and_a_pin_are_no_unknown_settings(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text(HSM.replace('pin_file = "/run/pin"', 'pin_env = "KMS_JWKS_PIN"'))
    for name in ("ADDR", "TOKEN", "CACERT", "CLIENT_CERT", "CLIENT_KEY", "VECTORS", "PIN"):
        monkeypatch.setenv(f"KMS_JWKS_{name}", "1234")
    backend = load_settings(toml).backends["hsm-1"]
    assert isinstance(backend, Pkcs11Options)
    assert backend.pin_env == "KMS_JWKS_PIN"


def test_a_value_and_a_group_under_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_JWKS_BACKENDS", "hunter2")
    monkeypatch.setenv("KMS_JWKS_BACKENDS__HSM__TYPE", "pkcs11")
    detail = refusal()
    assert "KMS_JWKS_BACKENDS" in detail
    assert "hunter2" not in detail


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in refusal(tmp_path / "missing.toml")
    toml.write_text("workers = hunter2\n")
    detail = refusal(toml)
    assert "line 1" in detail
    assert "hunter2" not in detail
    toml.write_bytes(b"# \xff\n")
    assert "UTF-8" in refusal(toml)
    monkeypatch.setenv("KMS_JWKS_SECRETS_DIR", str(tmp_path / "missing"))
    assert "KMS_JWKS_SECRETS_DIR" in refusal()


def test_secrets_are_not_shown(toml: Path) -> None:
    toml.write_text(
        'database_url = "postgresql+psycopg://kms:hunter2@db/kms"\n' + HSM + 'environment = {P = "hunter2"}'
    )
    assert "hunter2" not in repr(load_settings(toml))
    toml.write_text('database_url = ["hunter2"]\n' + HSM + 'environment = {P = ["hunter2"]}')
    assert "hunter2" not in refusal(toml)


# --- the state folder -------------------------------------------------------------------------------------------------


def test_the_state_folder_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "state"
    folder.mkdir(parents=True, mode=0o755)
    assert prepare_state_dir(Settings(state_dir=folder)) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="state_dir"):
        prepare_state_dir(Settings(state_dir=tmp_path / "file"))


# --- the example ------------------------------------------------------------------------------------------------------

MODELS: dict[str, type[BaseModel]] = {"softhsm": Pkcs11Options, "aws": AwsKmsOptions}

SETTING = re.compile(r"#(\w+) = |#\[[\w.]+\]")
"""A commented setting has no space behind its '#', prose has one."""


def uncommented() -> str:
    return "\n".join(line[1:] if SETTING.match(line) else line for line in EXAMPLE.read_text().splitlines())


def paragraphs() -> Iterator[tuple[str, str]]:
    """Each commented setting with the prose above it."""
    prose = ""
    for line in EXAMPLE.read_text().splitlines():
        if match := SETTING.match(line):
            if match[1]:
                yield match[1], prose
        else:
            prose = f"{prose} {line.removeprefix('# ')}" if line else ""


def test_the_example_as_it_stands_sets_nothing() -> None:
    assert tomllib.loads(EXAMPLE.read_text()) == {}


def test_the_example_has_every_setting_and_no_other() -> None:
    values = tomllib.loads(uncommented())
    assert values.keys() == Settings.model_fields.keys()
    for name, model in MODELS.items():
        assert values["backends"][name].keys() == model.model_fields.keys()


def test_the_example_shows_the_defaults() -> None:
    values = tomllib.loads(uncommented())
    models: list[tuple[type[BaseModel], Any]] = [(Settings, values)]
    models += [(model, values["backends"][name]) for name, model in MODELS.items()]
    for model, shown in models:
        for name, field in model.model_fields.items():
            default = field.default
            if not field.is_required() and field.default_factory is None and default is not None:
                text = (
                    [*default] if isinstance(default, tuple) else str(default) if isinstance(default, Path) else default
                )
                assert shown[name] == text, name


def test_the_example_is_valid_once_one_source_of_the_pin_is_chosen(toml: Path) -> None:
    text = re.sub(r"^(pin_env|expected_serial) = .*$", "", uncommented(), flags=re.MULTILINE)
    toml.write_text(text)
    settings = load_settings(toml)
    assert settings.default_backend == "softhsm"
    softhsm, aws = settings.backends["softhsm"], settings.backends["aws"]
    assert isinstance(softhsm, Pkcs11Options)
    assert softhsm.environment.keys() == {"SOFTHSM2_CONF"}
    assert isinstance(aws, AwsKmsOptions)
    assert aws.region == "eu-central-1"


def test_kms_never_signs_in_place(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text('[backends.aws]\ntype = "aws-kms"\nregion = "eusc-de-east-1"\n')
    monkeypatch.setenv("KMS_JWKS_BACKENDS__AWS__SIGN_IN_PLACE", "false")
    assert load_settings(toml).backends["aws"].sign_in_place is False
    monkeypatch.setenv("KMS_JWKS_BACKENDS__AWS__SIGN_IN_PLACE", "true")
    assert "backends.aws.sign_in_place" in refusal(toml)


def test_a_type_that_is_not_ours_keeps_its_own_settings(toml: Path) -> None:
    toml.write_text('[backends.vault]\ntype = "vault-transit"\nmount = "transit"\nwaiting = 4\n')
    backend = load_settings(toml).backends["vault"]
    assert isinstance(backend, ThirdPartyBackend)
    assert (backend.type, backend.waiting, dict(backend.options)) == ("vault-transit", 4, {"mount": "transit"})


@pytest.mark.parametrize("kind", ['["pkcs11"]', "{ x = 1 }", "7"])
def test_a_type_that_is_no_text_is_refused(toml: Path, kind: str) -> None:
    toml.write_text(f"[backends.a]\ntype = {kind}\n")
    assert "backends.a" in refusal(toml)


def test_the_example_says_each_settings_variable_range_and_choices() -> None:
    described: list[tuple[tuple[str, ...], Any]] = [
        ((name,), field) for name, field in Settings.model_fields.items() if name != "backends"
    ] + [
        (("backends", backend, name), field)
        for backend, model in MODELS.items()
        for name, field in model.model_fields.items()
        if name not in ("environment", "management")
    ]
    paragraph = {text: name for name, text in paragraphs()}
    for path, field in described:
        prose = next((text for text in paragraph if variable_name(path) in text.split()), "")
        assert paragraph.get(prose) == path[-1], path
        low, high = (next((getattr(m, end) for m in field.metadata if hasattr(m, end)), None) for end in ("ge", "le"))
        if low is not None and high is not None:
            assert f"{low} to {high}" in prose, path
        for choice in re.findall(r"'(\w+)'", str(field.annotation)) if "Literal" in str(field.annotation) else ():
            assert f'"{choice}"' in prose, (path, choice)
