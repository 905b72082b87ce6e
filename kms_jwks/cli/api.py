"""What every command over the API shares: where the service is, who calls, tables or JSON, asking before destroying."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import click
import msgspec
from click.core import ParameterSource

from kms_jwks.cli.failures import State
from kms_jwks.cli.text import note
from kms_jwks.cli.values import DURATION
from kms_jwks.client import DEFAULT_ADDRESS, Client, Reply, token_file

P = ParamSpec("P")
R = TypeVar("R")


class Api:
    """The client of one command, and how its answers are shown."""

    def __init__(self, make: Callable[[Callable[[Reply], None]], Client], *, as_json: bool) -> None:
        self._replies: list[Reply] = []
        self.json = as_json
        self.client = make(self._replies.append)

    def show(self, render: Callable[[], None]) -> None:
        """The last answer: as the service's own JSON, or as `render` prints it."""
        reply = self._replies[-1] if self._replies else None
        if self.json and reply is not None:
            write(reply.body)
        elif not self.json:
            render()
        if reply is not None and reply.status == 202:
            note("Accepted: the custodian has not finished yet. Look again with `show`.")

    def show_list(self, items: Iterable[R], render: Callable[[Iterator[R]], None]) -> None:
        """A list of however many pages: as one JSON page, or as `render` prints its items."""
        if not self.json:
            render(iter(items))
            return
        for _ in items:
            pass
        pages = [msgspec.json.decode(reply.body, type=_RawPage).items for reply in self._replies]
        write(msgspec.json.encode(_RawPage([item for page in pages for item in page])))

    def done(self, text: str) -> None:
        """Say that something without an answer of its own is done."""
        if not self.json:
            click.echo(text)


class _RawPage(msgspec.Struct):
    items: list[msgspec.Raw]


def write(body: bytes) -> None:
    """Bytes on standard output, with a newline."""
    sys.stdout.flush()
    sys.stdout.buffer.write(body.rstrip(b"\n") + b"\n")
    sys.stdout.buffer.flush()


# A thumbprint (RFC 7638) is 43 characters of base64url, and one in 64 of them begins with a dash.
_DASHED_KID = re.compile(r"-[A-Za-z0-9_-]{42}")


class ApiCommand(click.Command):
    """A command whose help shows how to connect apart from what it does, and that takes a kid for no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """A kid that begins with a dash is the last argument, as if it stood after ``--``."""
        valued = {o for p in self.params if isinstance(p, click.Option) and not p.is_flag for o in p.opts}
        for place, word in enumerate(args):
            before = args[place - 1] if place else ""
            if _DASHED_KID.fullmatch(word) and before not in valued and "--" not in args:
                return super().parse_args(ctx, [*args[:place], *args[place + 1 :], "--", word])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two sections of options."""
        own: list[tuple[str, str]] = []
        connection: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                (connection if isinstance(parameter, _Connection) else own).append(record)
        for title, records in (("Options", own), ("Connection", connection)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class _Connection(click.Option):
    """An option about the connection."""


_CONNECTION: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "--addr",
        "addr",
        {"metavar": "URL", "envvar": "KMS_JWKS_ADDR", "default": DEFAULT_ADDRESS, "help": "The service."},
    ),
    (
        "--token-file",
        "token_path",
        {
            "metavar": "FILE",
            "envvar": "KMS_JWKS_TOKEN_FILE",
            "help": "A file with the API token. KMS_JWKS_TOKEN holds the token itself.",
        },
    ),
    ("--ca-cert", "ca_cert", {"metavar": "FILE", "envvar": "KMS_JWKS_CACERT", "help": "Trusted certificates (PEM)."}),
    (
        "--client-cert",
        "client_cert",
        {"metavar": "FILE", "envvar": "KMS_JWKS_CLIENT_CERT", "help": "Client certificate (PEM)."},
    ),
    (
        "--client-key",
        "client_key",
        {"metavar": "FILE", "envvar": "KMS_JWKS_CLIENT_KEY", "help": "Private key of the client certificate (PEM)."},
    ),
    ("--timeout", "timeout", {"type": DURATION, "default": "10s", "help": "How long to wait for an answer."}),
    ("--allow-insecure-http", "allow_insecure_http", {"is_flag": True, "help": "Allow plain http to other machines."}),
)


def api_command(
    group: click.Group | None, name: str, **attributes: Any
) -> Callable[[Callable[..., None]], click.Command]:
    """A command over the API: its function gets an `Api` first. Adds the options `--json` and the connection's."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            connection = {parameter: options.pop(parameter) for _, parameter, _ in _CONNECTION}
            as_json = bool(options.pop("as_json"))
            context = click.get_current_context()
            context.find_root().ensure_object(State).json = as_json
            named = context.get_parameter_source("token_path") is ParameterSource.COMMANDLINE
            api = Api(functools.partial(_client, connection, named), as_json=as_json)
            with api.client:
                function(api, **options)

        for flag, parameter, settings in reversed(_CONNECTION):
            shown = {"show_envvar": "envvar" in settings, "show_default": "default" in settings}
            click.option(flag, parameter, cls=_Connection, **settings, **shown)(run)
        decorator = click.command if group is None else group.command
        command = decorator(name, cls=ApiCommand, **attributes)(run)
        json_help = "Print the API's own JSON, and errors as problem documents."
        command.params.append(click.Option(["--json", "as_json"], is_flag=True, help=json_help))
        return command

    return decorate


def _client(connection: dict[str, Any], named: bool, on_answer: Callable[[Reply], None]) -> Client:
    file = connection["token_path"]
    # What stands on the command line wins over the environment.
    in_environment = None if named else os.environ.get("KMS_JWKS_TOKEN")
    return Client(
        connection["addr"],
        in_environment or (token_file(file) if file else None),
        ca_cert=connection["ca_cert"] or None,
        client_cert=connection["client_cert"] or None,
        client_key=connection["client_key"] or None,
        timeout=float(connection["timeout"]),
        allow_insecure_http=connection["allow_insecure_http"],
        on_answer=on_answer,
    )


# --- arguments and options that many commands have --------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


def key_set_argument(function: F) -> F:
    """The argument KEY_SET."""
    return click.argument("key_set", metavar="KEY_SET")(function)


def key_arguments(function: F) -> F:
    """The arguments KEY_SET KEY."""
    return key_set_argument(click.argument("key", metavar="KEY")(function))


def version_arguments(function: F) -> F:
    """The arguments KEY_SET KEY VERSION."""
    return key_arguments(click.argument("version", metavar="VERSION")(function))


def dry_run_option(function: F) -> F:
    """The option --dry-run of revocations."""
    return click.option("--dry-run", is_flag=True, help="Say what would happen, and change nothing.")(function)


def break_glass_options(function: F) -> F:
    """The options of steps that may override an invariant; `glass` makes a reason of them."""
    reason = click.option("--reason", help="Why; stays on the version for ever. Goes with --break-glass.")
    flag = click.option(
        "--break-glass", is_flag=True, help="Override the invariant in the way; needs the role break-glass."
    )
    return flag(reason(yes_option(function)))


def glass(break_glass: bool, reason: str | None, *, sure: bool) -> str | None:
    """The reason to override an invariant with, after asking; None where nobody wants that."""
    if break_glass != (reason is not None):
        raise click.UsageError("--break-glass and --reason go together.")
    if reason is not None:
        confirm("Override the invariant? Tokens may be rejected, and it stays on the version for ever.", sure=sure)
    return reason


def yes_option(function: F) -> F:
    """The option --yes of commands that destroy something."""
    return click.option("--yes", "-y", "sure", is_flag=True, help="Do not ask.")(function)


def confirm(question: str, *, sure: bool) -> None:
    """Ask before something is destroyed. Without a terminal to ask on, and without --yes, nothing is done."""
    if sure:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: give --yes.")
    click.confirm(question, abort=True, err=True)
