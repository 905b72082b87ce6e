"""Commands that work on the node itself, with its settings and without the API: init, serve, custodian, doctor, db."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kms_jwks import errors
from kms_jwks.cli.options import confirm, yes_option
from kms_jwks.cli.output import ExitCode, clean, note, print_json, print_line, print_styled, raw_output

if TYPE_CHECKING:
    from types import FrameType

    from kms_jwks.backends.calling import Backends
    from kms_jwks.config import Settings
    from kms_jwks.doctor import Check
    from kms_jwks.store import Store

F = TypeVar("F", bound=Callable[..., Any])

_PREFIX = "KMS_JWKS_"


def _config_option(function: F) -> F:
    return click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="KMS_JWKS_CONFIG",
        show_envvar=True,
        help="The TOML file with the settings; environment variables KMS_JWKS_… win over it.",
    )(function)


# --- init -------------------------------------------------------------------------------------------------------------


@click.command()
@_config_option
@click.option(
    "--softhsm",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Make a SoftHSM token with its PIN and the settings DIR/kms-jwks.toml first, where they are missing.",
)
@click.option("--key-set", metavar="NAME", help="Create this key set with a key `default` too.")
@click.option("--alg", default="ES256", show_default=True, help="The algorithm of that key.")
@click.option(
    "--admin-token-file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the API token of an administrator there (mode 0600).",
)
@click.option(
    "--signer-token-file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the API token of a client that may only sign with that key there.",
)
def init(
    config: Path | None,
    softhsm: Path | None,
    key_set: str | None,
    alg: str,
    admin_token_file: Path | None,
    signer_token_file: Path | None,
) -> None:
    """Bring the registry up to date and make the first administrator and key set.

    Existing things are kept, so it can be run at every start. The key pair is made once the service runs.
    """
    from kms_jwks import wiring
    from kms_jwks.config import prepare_state_dir
    from kms_jwks.service import bootstrap

    if signer_token_file is not None and key_set is None:
        raise click.UsageError("--signer-token-file needs --key-set.")
    if softhsm is not None:
        if config is not None:
            raise click.UsageError("--softhsm writes settings: give it without --config and KMS_JWKS_CONFIG.")
        from kms_jwks.cli.softhsm import prepare_node

        config = prepare_node(softhsm)
        print_line(f"settings: {config}")
    settings = _settings(config)
    prepare_state_dir(settings)
    _make_registry_folder(settings)
    backends = wiring.make_backends(settings)
    with _registry(settings) as store:
        try:
            lines = bootstrap.initialise(
                wiring.make_control(settings, store, backends),
                key_set=key_set,
                alg=alg,
                admin_token_file=admin_token_file,
                signer_token_file=signer_token_file,
            )
        except OSError as error:
            raise errors.ConfigurationError(f"{error.filename}: {error.strerror}.") from None
        finally:
            backends.close()
        _warn_of_rollback(settings, store)
    for line in lines:
        print_line(line)


# --- serve and custodian ----------------------------------------------------------------------------------------------


@click.command()
@_config_option
@click.option(
    "--routes",
    type=click.Choice(["public", "private", "all"]),
    help="What to answer: JWKS, discovery and health (public), the rest (private), or all. [default: the settings']",
)
@click.option(
    "--bind", metavar="HOST:PORT", multiple=True, help="Where to listen; repeatable. [default: the settings']"
)
@click.option("--workers", type=click.IntRange(min=1), help="Signing processes. [default: the settings']")
@click.option("--role", type=click.Choice(["all", "http"]), default="all", hidden=True)
def serve(config: Path | None, routes: str | None, bind: tuple[str, ...], workers: int | None, role: str) -> None:
    """Run the service: the workers and, unless only public routes are served, the custodian.

    TERM and INT stop it gracefully; HUP reads the settings again.
    """
    changes = {"ROUTES": routes, "BIND": ",".join(bind) or None, "WORKERS": workers}
    settings = _settings(config, {name: str(value) for name, value in changes.items() if value is not None})
    _refuse_exposed(settings)
    _refuse_wrong_schema(settings)
    if role == "http":
        from kms_jwks import wiring
        from kms_jwks.http.server import run_gunicorn

        if config is not None:
            # A reload reads the settings again.
            os.environ[f"{_PREFIX}CONFIG"] = str(config.absolute())
        with raw_output():
            run_gunicorn(settings, make_backends=wiring.make_backends, make_service=wiring.assemble)
        return
    from kms_jwks.cli import supervisor
    from kms_jwks.config import prepare_state_dir

    prepare_state_dir(settings)
    _refuse_taken_name(settings)
    with raw_output():
        code = supervisor.serve(settings, config)
    click.get_current_context().exit(code)


@click.command()
@_config_option
def custodian(config: Path | None) -> None:
    """Make, rotate and destroy keys until TERM or INT. `serve` runs a custodian already.

    One custodian of an installation acts; the others stand by.
    """
    from kms_jwks import wiring
    from kms_jwks.config import prepare_state_dir
    from kms_jwks.http import logs

    settings = _settings(config)
    _refuse_exposed(settings)
    _refuse_wrong_schema(settings)
    prepare_state_dir(settings)
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with raw_output():
        logs.configure(settings.log_level, settings.log_format)
        wiring.assemble_custodian(settings).run(stop)


# --- doctor -----------------------------------------------------------------------------------------------------------


@click.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the state and all checks.")
@click.option("--strict", is_flag=True, help="Warnings count as failures.")
@click.option("--remove-orphans", is_flag=True, help="Destroy the key pairs that no key version refers to; asks first.")
@yes_option
def doctor(config: Path | None, as_json: bool, strict: bool, remove_orphans: bool, sure: bool) -> None:
    """Examine this node: module, PIN, keys, registry, files, clocks; and say how to repair what is wrong.

    Changes nothing, unless --remove-orphans is given. Exits with 1 when a check fails; warnings alone exit with 0.
    """
    import msgspec

    from kms_jwks import doctor as examination
    from kms_jwks import wiring

    settings = _settings(config)
    # The checks need the rights that signing needs; removing orphans needs the custodian's.
    backends = wiring.make_backends(settings, management=remove_orphans)
    checks: list[Check] = []
    with _registry(settings) as store:
        try:
            if remove_orphans:
                _remove_orphans(settings, store, backends, sure=sure)
            for check in examination.examine(settings, store, backends):
                checks.append(check)
                if not as_json:
                    _print_check(check)
        finally:
            backends.close()
    worst = examination.worst(checks)
    if as_json:
        print_json(msgspec.json.encode({"state": worst, "checks": checks}))
    else:
        bad = [sum(check.state == state for check in checks) for state in ("failure", "warning")]
        print_line(f"{len(checks)} checks: {bad[0]} failed, {bad[1]} with a warning.")
    failed = worst is examination.State.FAILURE or (strict and worst is not examination.State.OK)
    click.get_current_context().exit(ExitCode.REFUSED if failed else ExitCode.DONE)


_MARKS = {"ok": ("ok", None), "warning": ("WARNING", "yellow"), "failure": ("FAILED", "red")}


def _print_check(check: Check) -> None:
    word, colour = _MARKS[check.state]
    mark = click.style(f"{word:8}", fg=colour, bold=colour is not None)
    print_styled(f"{mark} {clean(f'{check.name}: {check.detail}')}")
    if check.next_step:
        print_line(f"         → {check.next_step}")


def _remove_orphans(settings: Settings, store: Store, backends: Backends, *, sure: bool) -> None:
    from kms_jwks import doctor as examination

    # For a registry that has lost changes, the key pairs that were made since are orphans.
    if (rollback := examination.find_rollback(settings, store)) is not None:
        raise rollback
    found = examination.find_orphans(store, backends)
    if not found:
        note("There are no orphans.")
        return
    for orphan in found:
        note(f"orphan in {orphan.backend}: {orphan.label}")
    confirm(f"Destroy {len(found)} key pair(s)? They cannot be brought back.", sure=sure)
    for orphan in found:
        note(f"{examination.remove_orphan(orphan, store, backends)}: {orphan.label}")


# --- db ---------------------------------------------------------------------------------------------------------------


@click.group()
def db() -> None:
    """The registry's database."""


@db.command()
@_config_option
def upgrade(config: Path | None) -> None:
    """Make the registry, or bring its schema up to date."""
    settings = _settings(config)
    _make_registry_folder(settings)
    with _registry(settings) as store:
        store.upgrade()
        print_line(f"The schema of {store.url} is up to date.")


@db.command()
@_config_option
def check(config: Path | None) -> None:
    """Check that the registry can be reached and has the schema this program needs."""
    settings = _settings(config)
    with _registry(settings) as store:
        store.check_schema()
        with store.read() as tx:
            epoch = tx.epoch()
        print_line(f"The schema of {store.url} is right; epoch {epoch.counter} of {epoch.incarnation}.")
        _warn_of_rollback(settings, store)


@db.command()
@_config_option
@click.option(
    "--accept",
    is_flag=True,
    help="Change nothing in the registry: make this node accept it as it is, although the node knows a later state.",
)
@yes_option
def restored(config: Path | None, accept: bool, sure: bool) -> None:
    """Declare that the registry was restored from a backup: disable every key until an operator enables it.

    A node refuses a registry that has lost changes which the node confirmed. Run this once, on the node that was up to
    date last: a backup may hold keys as active, and tokens as valid, that were revoked since. The other nodes accept
    the registry then. A node that had confirmed even later changes needs `--accept` on it.
    """
    from kms_jwks.custodian import transitions
    from kms_jwks.worker.epoch_record import EpochRecord

    settings = _settings(config)
    record = EpochRecord(settings.state_dir)
    if accept:
        confirm("Accept the registry as it is on this node, with every key and token that it holds?", sure=sure)
        with _registry(settings) as store:
            store.check_schema()
            with store.read() as tx:
                epoch = tx.epoch()
        record.replace(epoch)
        print_line(f"This node accepts the registry at epoch {epoch.counter} of {epoch.incarnation}.")
        return
    confirm("Begin a new incarnation and disable every key until an operator enables it?", sure=sure)
    with _registry(settings) as store:
        store.check_schema()
        known = record.load()
        with store.write() as tx:
            disabled = transitions.start_new_incarnation(tx, known)
            names = [f"{tx.key_set_by_id(k.key_set_id).name}/{k.name}" for k in disabled]  # type: ignore[union-attr]
        print_line(f"{len(names)} key(s) are disabled: {', '.join(names) or 'none'}.")
        note("Compare each with the revocations since the backup, then: kms-jwks key enable KEY_SET KEY")
        if known is None:
            note("This node had confirmed no epoch. On each other node: kms-jwks db restored --accept")
        note("API tokens, grants and external keys are those of the backup too: revoke and remove again what had been.")


# --- inside -----------------------------------------------------------------------------------------------------------


def _settings(config: Path | None, changes: dict[str, str] | None = None) -> Settings:
    """The settings, with the values of the command line; these are validated like all others."""
    from kms_jwks.config import load_settings, require_registry
    from kms_jwks.http import logs

    logs.configure_for_command()
    with _variables({f"{_PREFIX}{name}": value for name, value in (changes or {}).items()}):
        settings = load_settings(config)
    require_registry(settings)
    return settings


@contextmanager
def _variables(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _registry(settings: Settings) -> Iterator[Store]:
    from kms_jwks import wiring

    store = wiring.make_store(settings)
    try:
        yield store
    finally:
        store.dispose()


def _refuse_exposed(settings: Settings) -> None:
    """Raise ConfigurationError where every user gets at this node's files."""
    from kms_jwks.doctor import refuse_exposed

    refuse_exposed(settings)


def _refuse_wrong_schema(settings: Settings) -> None:
    """Raise SchemaMismatch, and PoolerUnsuitable. Only warn when the registry cannot be reached: the last JWKS is
    served until it can."""
    with _registry(settings) as store:
        try:
            store.check_schema()
        except errors.PoolerUnsuitable:
            raise
        except errors.StoreUnavailable as error:
            note(f"Warning: {clean(error.detail)} The last JWKS is served until the registry is back.")
            note(clean(error.next_step))
            return
        _warn_of_rollback(settings, store)


def _refuse_taken_name(settings: Settings) -> None:
    """Raise ConfigurationError where another node runs under this node's name. An unreachable registry says nothing."""
    from kms_jwks.worker.registration import living_namesake

    with _registry(settings) as store:
        try:
            other = living_namesake(store, settings.node_name, settings.state_dir)
        except errors.StoreUnavailable:
            return
    if other is not None:
        raise errors.ConfigurationError(
            f"node_name: another node runs under the name {settings.node_name}: its worker {other.id} has process id "
            f"{other.pid} and another state directory.",
            next_step="Stop it, or give each node a node_name and a state_dir of its own.",
        )


def _warn_of_rollback(settings: Settings, store: Store) -> None:
    """Say that this node refuses the registry, if it does."""
    from kms_jwks.doctor import find_rollback

    error = find_rollback(settings, store)
    if error is not None:
        note(f"Warning: {clean(error.detail)} This node refuses the registry; it only serves the last JWKS.")
        note(f"Next: {error.next_step}")


def _make_registry_folder(settings: Settings) -> None:
    """Make the folder of an SQLite registry, readable by its owner alone."""
    from kms_jwks.doctor import registry_file

    file = registry_file(settings)
    if file is None:
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ConfigurationError(f"database_url: {file.parent} cannot be made: {error.strerror}.") from None
