"""What every command over the API shares: its connection to the service, and how it shows the answer."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from kms_jwks.cli.options import DURATION
from kms_jwks.cli.output import ErrorFormat, note, print_json, print_line, table
from kms_jwks.client import DEFAULT_ADDRESS, Client, Reply, token_file

R = TypeVar("R")


class Api:
    """The client of one command, and how its answers are shown."""

    def __init__(self, make: Callable[[Callable[[Reply], None]], Client], *, as_json: bool) -> None:
        self._replies: list[Reply] = []
        self.json = as_json
        self.client = make(self._replies.append)

    def show(self, answer: R, render: Callable[[R], None]) -> None:
        """Print the last answer: as the service's own JSON, or as `render` prints it."""
        reply = self._replies[-1] if self._replies else None
        if self.json and reply is not None:
            print_json(reply.body)
        elif not self.json:
            render(answer)
        if reply is not None and reply.status == 202:
            note("Accepted: the custodian has not finished yet. Look again with `show`.")

    def show_list(self, items: Iterable[R], columns: Sequence[str], row: Callable[[R], Sequence[object]]) -> None:
        """Print a list of any number of pages: as one JSON page, or as a table with a row for each item."""
        if not self.json:
            table(columns, map(row, items))
            return
        for _ in items:  # fetches the pages
            pass
        pages = [msgspec.json.decode(reply.body, type=_RawPage).items for reply in self._replies]
        print_json(msgspec.json.encode(_RawPage([item for page in pages for item in page])))

    def done(self, text: str) -> None:
        """Say that a change without an answer of its own is done."""
        if not self.json:
            print_line(text)


class _RawPage(msgspec.Struct):
    items: list[msgspec.Raw]


# A thumbprint (RFC 7638) is 43 characters of base64url, and one in 64 of them begins with a dash.
_DASHED_KID = re.compile(r"-[A-Za-z0-9_-]{42}")


class ApiCommand(click.Command):
    """A command whose help lists the options of the connection apart, and that never takes a kid for an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take a kid that begins with a dash as the last argument, as if it stood after ``--``."""
        valued = {o for p in self.params if isinstance(p, click.Option) and not p.is_flag for o in p.opts}
        for place, word in enumerate(args):
            before = args[place - 1] if place else ""
            if _DASHED_KID.fullmatch(word) and before not in valued and "--" not in args:
                return super().parse_args(ctx, [*args[:place], *args[place + 1 :], "--", word])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write two sections of options."""
        own: list[tuple[str, str]] = []
        connection: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                (connection if isinstance(parameter, _ConnectionOption) else own).append(record)
        for title, records in (("Options", own), ("Connection", connection)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class _ConnectionOption(click.Option):
    """An option about the connection; its environment variable and its default stand in the help."""

    def __init__(self, *names: str, **attributes: Any) -> None:
        super().__init__(names, show_envvar="envvar" in attributes, show_default="default" in attributes, **attributes)


def _connection_options() -> list[click.Option]:
    make = _ConnectionOption
    return [
        make("--addr", metavar="URL", envvar="KMS_JWKS_ADDR", default=DEFAULT_ADDRESS, help="The service."),
        make(
            "--token-file",
            metavar="FILE",
            envvar="KMS_JWKS_TOKEN_FILE",
            help="A file with the API token. KMS_JWKS_TOKEN holds the token itself.",
        ),
        make("--ca-cert", metavar="FILE", envvar="KMS_JWKS_CACERT", help="Trusted certificates (PEM)."),
        make("--client-cert", metavar="FILE", envvar="KMS_JWKS_CLIENT_CERT", help="Client certificate (PEM)."),
        make(
            "--client-key",
            metavar="FILE",
            envvar="KMS_JWKS_CLIENT_KEY",
            help="Private key of the client certificate (PEM).",
        ),
        make("--timeout", type=DURATION, default="10s", help="How long to wait for an answer."),
        make("--allow-insecure-http", is_flag=True, help="Allow plain http to other machines."),
    ]


_CONNECTION = tuple(str(option.name) for option in _connection_options())


def api_command(
    group: click.Group | None, name: str, **attributes: Any
) -> Callable[[Callable[..., None]], click.Command]:
    """A command over the API: its function gets an `Api` first. Adds the options `--json` and the connection's."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            connection = {parameter: options.pop(parameter) for parameter in _CONNECTION}
            as_json = bool(options.pop("as_json"))
            click.get_current_context().find_root().ensure_object(ErrorFormat).json = as_json
            api = Api(functools.partial(_client, connection), as_json=as_json)
            with api.client:
                function(api, **options)

        decorator = click.command if group is None else group.command
        command = decorator(name, cls=ApiCommand, **attributes)(run)
        json_help = "Print the API's own JSON, and errors as problem documents."
        command.params += [*_connection_options(), click.Option(["--json", "as_json"], is_flag=True, help=json_help)]
        return command

    return decorate


def _client(connection: dict[str, Any], on_answer: Callable[[Reply], None]) -> Client:
    file = connection["token_file"]
    named = click.get_current_context().get_parameter_source("token_file") is ParameterSource.COMMANDLINE
    # A token file that stands on the command line wins over the environment.
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
