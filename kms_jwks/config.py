"""The settings of one node: read once, validated, frozen.

Sources, the first that names a setting wins: constructor arguments, environment variables (`KMS_JWKS_…`, nested with
`__`), secret files (a folder of files named like those variables, `KMS_JWKS_SECRETS_DIR`), the TOML file, defaults.
Nothing here opens a module, a database or a socket. `config/kms-jwks.toml` documents every setting; a test compares.
"""

import ipaddress
import os
import re
import socket
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from kms_jwks import issuers
from kms_jwks.errors import ConfigurationError
from kms_jwks.model import NAME_RULE, is_name

ENV_PREFIX = "KMS_JWKS_"
"""Every environment variable that the program reads begins with this."""

CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"
"""Names the TOML file when no path is given."""

SECRETS_VARIABLE = f"{ENV_PREFIX}SECRETS_DIR"
"""Names the folder of secret files."""

_OTHERS = ("ADDR", "TOKEN", "TOKEN_FILE", "CACERT", "CLIENT_CERT", "CLIENT_KEY", "VECTORS", "TEST_LONG")
NOT_SETTINGS = frozenset({CONFIG_VARIABLE, SECRETS_VARIABLE} | {f"{ENV_PREFIX}{name}" for name in _OTHERS})
"""Variables that share the prefix and belong to the command line, to the client or to the tests."""

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
_MAX_PORT = 65535

_config_file: ContextVar[Path | None] = ContextVar("_config_file", default=None)


# --- kinds of values --------------------------------------------------------------------------------------------------


def _split(value: object) -> object:
    """A list in an environment variable or a secret file is separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _name(value: str) -> str:
    if not is_name(value):
        raise ValueError(f"must be {NAME_RULE}")
    return value


def _public_url(value: str) -> str:
    url = urlsplit(value)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ValueError("must be an http or https URL with a host")
    if url.username is not None or url.password is not None:
        raise ValueError("must not carry a user name or a password")
    if "?" in value or "#" in value or value.endswith("/") or any(ch.isspace() for ch in value):
        raise ValueError("must have no query, no fragment, no space and no slash at its end")
    normal = issuers.normal_form(value)
    if normal != value:
        raise ValueError(f"must be in normal form, which is {normal}: issuers begin with it")
    return value


def _address(value: str) -> str:
    if value.startswith("unix:/"):
        return value
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match["port"]) > _MAX_PORT:
        raise ValueError("must be HOST:PORT, [IPv6]:PORT or unix:/path")
    return value


def _proxy(value: str) -> str:
    if value == "*":
        raise ValueError("must name addresses: with '*' anyone could forge the address of a caller")
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError("must be an IP address or a network such as 10.0.0.0/8") from None
    return value


def _not_empty(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("must have at least one entry")
    return values


def _default_node_name() -> str:
    """This machine's host name, changed to fit the grammar of names."""
    return re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-")[:63].rstrip("-") or "node"


Name = Annotated[str, AfterValidator(_name)]
"""A name by the grammar of `model.NAME_PATTERN`."""

PublicUrl = Annotated[str, AfterValidator(_public_url)]
Address = Annotated[str, AfterValidator(_address)]
Proxy = Annotated[str, AfterValidator(_proxy)]


# --- backends ---------------------------------------------------------------------------------------------------------


class BackendSettings(BaseModel):
    """The settings of every backend, whatever its type."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    sign_in_place: bool = Field(
        default=False,
        description="Sign on the calling thread: right for a module that answers in well under a millisecond.",
    )
    sign_timeout_ms: int = Field(default=2000, ge=50, le=30_000, description="Milliseconds.")
    waiting: int = Field(default=32, ge=1, le=256, description="Calls of one process that may wait for it at once.")
    stuck_limit: int = Field(
        default=8, ge=1, le=256, description="Calls that never came back after which the worker is started anew."
    )
    check_signatures: float = Field(
        default=0.05, ge=0, le=1, description="Share of the ECDSA, EdDSA and ML-DSA signatures verified before release."
    )

    @property
    def reads_stdin(self) -> bool:
        """Whether its PIN comes from standard input."""
        return False


class Pkcs11Management(BaseModel):
    """The custodian's own PIN: of a user that may make and destroy keys, where the module knows several users."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    pin_file: Path | None = None
    pin_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.pin_file is None) == (self.pin_env is None):
            raise ValueError("exactly one of pin_file, pin_env must say where the custodian's PIN comes from")
        return self


class Pkcs11Options(BackendSettings):
    """A token behind a PKCS#11 module: SoftHSM, or any HSM whose vendor ships such a module.

    The token is chosen by `token_label`, `token_serial`, `slot` or `uri`; where several are given, all must fit.
    """

    type: Literal["pkcs11"]
    module: Path = Field(description="The vendor's shared object.")
    token_label: str | None = Field(default=None, min_length=1, max_length=32)
    token_serial: str | None = Field(default=None, min_length=1, max_length=16)
    slot: int | None = Field(
        default=None, ge=0, description="The slot's number (CK_SLOT_ID), for modules that keep them stable."
    )
    uri: str | None = Field(
        default=None,
        max_length=1024,
        pattern=r"^(?i:pkcs11):",
        description="A PKCS#11 URI (RFC 7512) of the token, instead of the above or beside them.",
    )
    expected_serial: str | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="Refuse a token with another serial, whatever its label.",
    )
    pin_file: Path | None = None
    pin_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    pin_stdin: bool = False
    sessions: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Sessions of one process that may sign at once; one more session holds the login.",
    )
    locking: Literal["os", "process"] = Field(
        default="os",
        description="os: the module locks for itself (CKF_OS_LOCKING_OK) if it can; process: one call at a time.",
    )
    sign_in_place: bool = Field(
        default=True,
        description="Sign on the calling thread: right for a module that answers in well under a millisecond.",
    )
    management: Pkcs11Management | None = None
    environment: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="Variables set before the module is loaded; a module may keep secrets here.",
    )

    @property
    def reads_stdin(self) -> bool:
        """Whether its PIN comes from standard input."""
        return self.pin_stdin

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.token_label is None and self.token_serial is None and self.slot is None and self.uri is None:
            raise ValueError("one of token_label, token_serial, slot, uri must say which token to use")
        if (self.pin_file is not None) + (self.pin_env is not None) + self.pin_stdin != 1:
            raise ValueError("exactly one of pin_file, pin_env, pin_stdin must say where the PIN comes from")
        if self.token_serial and self.expected_serial and self.token_serial != self.expected_serial:
            raise ValueError("token_serial and expected_serial name different tokens")
        return self

    def for_custodian(self) -> Self:
        """The same options with the PIN of `management`, if there is one."""
        own = self.management
        if own is None:
            return self
        return self.model_copy(update={"pin_file": own.pin_file, "pin_env": own.pin_env, "pin_stdin": False})


class AwsKmsManagement(BaseModel):
    """The custodian's own credentials, with the rights to make, tag and destroy keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    profile: str | None = Field(default=None, min_length=1, max_length=128)
    role_arn: str | None = Field(default=None, pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/.+$")


def _parse_false(value: Any) -> Any:
    """Environment variables are text, and pydantic converts no text to a `Literal[False]`."""
    return False if str(value).lower() in ("false", "0", "no", "off", "f", "n") else value


class AwsKmsOptions(BackendSettings):
    """AWS KMS in one account and region.

    boto3's own chain finds the credentials (environment, profile, web identity, container, instance), with `profile`
    and `role_arn` where they are given. None are kept here.
    """

    type: Literal["aws-kms"]
    sign_in_place: Annotated[Literal[False], BeforeValidator(_parse_false)] = Field(
        default=False, description="Always false: a call to KMS does not run on the calling thread."
    )
    region: str = Field(pattern=r"^[a-z]{2,5}(-[a-z]+)+-\d{1,2}$")
    account: str | None = Field(
        default=None, pattern=r"^\d{12}$", description="Twelve digits. Credentials of another account are refused."
    )
    endpoint_url: str | None = Field(default=None, max_length=1024)
    profile: str | None = Field(
        default=None, min_length=1, max_length=128, description="A profile of AWS's shared configuration files."
    )
    role_arn: str | None = Field(
        default=None,
        pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/.+$",
        description="A role to assume with the credentials that were found.",
    )
    connect_timeout_ms: int = Field(default=1000, ge=100, le=10_000, description="Milliseconds.")
    read_timeout_ms: int = Field(
        default=2000,
        ge=100,
        le=30_000,
        description="Milliseconds that one attempt waits for an answer; less where the call's deadline comes sooner.",
    )
    key_policy_file: Path | None = Field(
        default=None, description="A key policy (JSON) for new keys; without it they get KMS's default policy."
    )
    management: AwsKmsManagement | None = None

    @model_validator(mode="after")
    def _check_endpoint(self) -> Self:
        url = urlsplit(self.endpoint_url or "https://kms")
        if url.scheme != "https" and (url.scheme != "http" or url.hostname not in ("127.0.0.1", "::1", "localhost")):
            # Without TLS another machine on the network could answer a request for a public key with its own.
            raise ValueError("endpoint_url must begin with https://, or with http:// and be on this machine")
        return self

    def for_custodian(self) -> Self:
        """The same options with the credentials of `management`, if there are any."""
        own = self.management
        if own is None:
            return self
        return self.model_copy(update={"profile": own.profile or self.profile, "role_arn": own.role_arn})


class ThirdPartyBackend(BackendSettings):
    """A backend of another package (entry-point group `kms_jwks.backends`), which validates further settings itself."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    type: Name
    management: dict[str, Any] | None = Field(default=None, repr=False)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Leave the further settings out: one of them may be a secret."""
        return [pair for pair in super().__repr_args__() if pair[0] not in (self.model_extra or {})]

    @property
    def options(self) -> Mapping[str, Any]:
        """The settings beyond those that every backend has."""
        return dict(self.model_extra or {})


def _type_of(section: type[BackendSettings]) -> str:
    """The one value of `type` that a class of backend settings accepts."""
    (only,) = get_args(section.model_fields["type"].annotation)
    return str(only)


_THIRD_PARTY: Final = "third-party"
BACKEND_TYPES: Final = frozenset(_type_of(section) for section in (Pkcs11Options, AwsKmsOptions))
"""The values of `type` that this package implements; any other value names another package's entry point."""


def _tag(value: Any) -> str:
    """The tag of the class that reads a backend's section."""
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind in BACKEND_TYPES else _THIRD_PARTY


Backend = Annotated[
    Annotated[Pkcs11Options, Tag(_type_of(Pkcs11Options))]
    | Annotated[AwsKmsOptions, Tag(_type_of(AwsKmsOptions))]
    | Annotated[ThirdPartyBackend, Tag(_THIRD_PARTY)],
    Discriminator(_tag),
]
"""One row per type of backend that comes with the package, and one for all others."""


# --- settings ---------------------------------------------------------------------------------------------------------


class Settings(BaseSettings):
    """The settings of one node. Durations are whole seconds unless the name ends in `_ms`; sizes are bytes."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    public_url: PublicUrl = "http://127.0.0.1:8080"
    default_key_set: Name = "default"
    node_name: Name = Field(default_factory=_default_node_name)
    database_url: str = Field(default="sqlite:///var/registry.sqlite3", min_length=1, repr=False)
    database_pool_size: int = Field(default=5, ge=2, le=64)
    database_timeout_ms: int = Field(default=5000, ge=500, le=60_000)
    state_dir: Path = Path("var/state")

    bind: Annotated[tuple[Address, ...], BeforeValidator(_split), AfterValidator(_not_empty)] = ("127.0.0.1:8080",)
    routes: Literal["public", "private", "all"] = "all"
    workers: int = Field(default=2, ge=1, le=64)
    threads: int = Field(default=8, ge=1, le=64)
    request_timeout: int = Field(default=30, ge=1, le=300)
    graceful_timeout: int = Field(default=30, ge=1, le=600)
    keepalive: int = Field(default=75, ge=1, le=3600)
    max_body: int = Field(default=65_536, ge=1024, le=16_777_216)
    max_batch_body: int = Field(default=1_048_576, ge=1024, le=67_108_864)
    forwarded_allow_ips: Annotated[tuple[Proxy, ...], BeforeValidator(_split)] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None

    signing_lease: int = Field(default=10, ge=1, le=60)
    poll_interval_ms: int = Field(default=250, ge=50, le=5000)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    default_backend: Name | None = None
    backends: dict[Name, Backend] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _only_backend_is_default(cls, data: Any) -> Any:
        backends = data.get("backends") if isinstance(data, dict) else None
        if isinstance(backends, Mapping) and len(backends) == 1 and data.get("default_backend") is None:
            return data | {"default_backend": next(iter(backends))}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_backend is not None and self.default_backend not in self.backends:
            raise ValueError("default_backend names no configured backend")
        if self.max_batch_body < self.max_body:
            raise ValueError("max_batch_body must not be smaller than max_body")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.poll_interval_ms * 2 > self.signing_lease * 1000:
            raise ValueError(
                "poll_interval_ms must be at most half of signing_lease, or a lease ends between two polls"
            )
        if sum(backend.reads_stdin for backend in self.backends.values()) > 1:
            raise ValueError("only one backend can read its PIN from standard input (pin_stdin)")
        self._refuse_contradicting_environments()
        return self

    def _refuse_contradicting_environments(self) -> None:
        seen: dict[str, str] = {}
        for backend in self.backends.values():
            for variable, value in backend.environment.items() if isinstance(backend, Pkcs11Options) else ():
                if seen.setdefault(variable, value) != value:
                    raise ValueError(f"backends set {variable} to different values, and a process has one environment")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of the sources, the strongest first."""
        del env_settings, dotenv_settings, file_secret_settings  # see _Variables for what they lack
        return (
            init_settings,
            _Variables(settings_cls, os.environ.items()),
            _Variables(settings_cls, _secret_files()),
            TomlConfigSettingsSource(settings_cls, toml_file=_toml_file()),
        )


class _Variables(PydanticBaseSettingsSource):
    """Variables and secret files, as `KMS_JWKS_A__B__C=value` → `{"a": {"b": {"c": "value"}}}`.

    pydantic-settings' own source folds the case of the whole name, which would change the names inside
    `environment`; it cannot name a backend with a hyphen (written as `_` here), and does not report names it ignored.
    Empty values count as unset: Compose and Kubernetes pass them for variables that were left out.
    """

    def __init__(self, settings_cls: type[BaseSettings], variables: Iterable[tuple[str, str]]) -> None:
        super().__init__(settings_cls)
        self._values: dict[str, Any] = {}
        for variable, value in variables:
            path = _path(variable)
            if path and path[0] in settings_cls.model_fields and value:
                self._put(path, value)

    def _put(self, path: tuple[str, ...], value: str) -> None:
        inner = self._values
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                break
        else:
            if not isinstance(inner.get(path[-1]), dict):
                inner[path[-1]] = value
                return
        raise ConfigurationError(f"{variable_name(path)}: both a value and a group of values are given")

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Required by the base class; `__call__` returns all fields at once."""
        del field
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def _path(variable: str) -> tuple[str, ...]:
    """The path of a variable in the settings; empty for a variable that is no setting."""
    if not variable.upper().startswith(ENV_PREFIX) or variable.upper() in NOT_SETTINGS:
        return ()
    path = variable[len(ENV_PREFIX) :].split("__")
    backend, inner = path[1:2], [part.lower() for part in path[2:3]]
    return (
        path[0].lower(),
        *(part.lower().replace("_", "-") for part in backend),
        *inner,
        *(path[3:] if inner == ["environment"] else (part.lower() for part in path[3:])),  # names there keep their case
    )


def variable_name(path: Iterable[str | int]) -> str:
    """The environment variable of a setting: `("backends", "hsm", "slot")` → `KMS_JWKS_BACKENDS__HSM__SLOT`."""
    parts = [str(part) for part in path]
    inner = parts[3:] if parts[2:3] == ["environment"] else [part.upper() for part in parts[3:]]
    return ENV_PREFIX + "__".join([part.upper().replace("-", "_") for part in parts[:3]] + inner)


def _secret_files() -> Iterator[tuple[str, str]]:
    folder = os.environ.get(SECRETS_VARIABLE)
    if not folder:
        return
    try:
        for file in sorted(Path(folder).iterdir()):
            if file.name.upper().startswith(ENV_PREFIX) and file.is_file():
                yield file.name, file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{SECRETS_VARIABLE}: {folder} cannot be read: {_reason(error)}") from None


def _toml_file() -> Path | None:
    if (path := _config_file.get()) is not None:
        return path
    named = os.environ.get(CONFIG_VARIABLE)
    return Path(named) if named else None


# --- loading ----------------------------------------------------------------------------------------------------------


def load_settings(path: Path | None = None) -> Settings:
    """Read and validate the settings; `path` is the TOML file, else the one that `KMS_JWKS_CONFIG` names.

    Raises `ConfigurationError`, which names every setting at fault and never repeats a value: it could be a secret.
    """
    token = _config_file.set(path)
    try:
        _check_file(_toml_file())
        settings = Settings()
    except ValidationError as error:
        raise ConfigurationError(_describe(error)) from None
    finally:
        _config_file.reset(token)
    _refuse_unknown(settings)
    return settings


def require_registry(settings: Settings) -> None:
    """Raise ConfigurationError unless a setting names the registry.

    The default is a file below the folder in which a command happens to run. There it could be another installation's
    registry, or a new and empty one.
    """
    if "database_url" not in settings.model_fields_set:
        raise ConfigurationError(
            "database_url is not set, and the registry is not guessed.",
            next_step=f"Name the settings with --config or {CONFIG_VARIABLE}, or set {ENV_PREFIX}DATABASE_URL.",
        )


def prepare_state_dir(settings: Settings) -> Path:
    """Make the folder for locks and the cached JWKS, readable by its owner alone, and return it.

    Raises ConfigurationError for one that every user could write to: what is in it may not be this service's.
    """
    folder = settings.state_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & stat.S_IWOTH:
            raise ConfigurationError(
                f"state_dir: every user may write to {folder}, so the JWKS in it may be anybody's.",
                next_step=f"Look at what is in it, then: chmod 700 {folder}",
            )
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigurationError(f"state_dir: {folder} cannot be made or kept private: {_reason(error)}") from error
    return folder


def _check_file(path: Path | None) -> None:
    """Read the file before pydantic-settings does, which silently ignores a missing file."""
    if path is None:
        return
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not valid TOML{_position(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {_reason(error)}") from None


def _position(error: tomllib.TOMLDecodeError) -> str:
    """Line and column; the rest of the message may quote the file."""
    match = re.search(r"\((at line \d+, column \d+|at end of document)\)", str(error))
    return f" ({match[1]})" if match else ""


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "not UTF-8"


def _refuse_unknown(settings: Settings) -> None:
    """Raise ConfigurationError for an unknown variable: a misspelt one may be the setting that keeps the node safe."""
    known = NOT_SETTINGS | set(_pin_variables(settings))
    unknown = sorted(
        name
        for name in {*os.environ, *(name for name, _ in _secret_files())}
        if name.upper().startswith(ENV_PREFIX) and name not in known and _path(name)[:1] not in _fields()
    )
    if unknown:
        raise ConfigurationError(f"unknown settings in the environment or the secret files: {', '.join(unknown)}")


def _pin_variables(settings: Settings) -> Iterator[str]:
    for backend in settings.backends.values():
        if isinstance(backend, Pkcs11Options):
            management = backend.management.pin_env if backend.management else None
            yield from (name for name in (backend.pin_env, management) if name)


def _fields() -> set[tuple[str, ...]]:
    return {(name,) for name in Settings.model_fields}


def _describe(error: ValidationError) -> str:
    return "; ".join(
        _line(_place(item["loc"]), item["msg"]) for item in error.errors(include_input=False, include_url=False)
    )


def _place(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path as the operator wrote it, without the class of backend that pydantic adds."""
    return location[:2] + location[3:] if location[:1] == ("backends",) else location


def _line(location: tuple[str | int, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    return f"{'.'.join(map(str, location))} ({variable_name(location)}): {message}"
