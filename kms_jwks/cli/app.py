"""The root command: its subcommands, and how an error ends a command: one message, the next step, an exit code."""

from __future__ import annotations

import inspect
from typing import Any

import click

from kms_jwks import __version__, errors
from kms_jwks.cli.clients import client, grant
from kms_jwks.cli.key_sets import external_key, key_set
from kms_jwks.cli.keys import key
from kms_jwks.cli.local import custodian, db, doctor, init, serve
from kms_jwks.cli.nodes import node
from kms_jwks.cli.output import ErrorFormat, clean, clean_output, exit_code, report
from kms_jwks.cli.revocation import revoke
from kms_jwks.cli.signing import jwks, sign, verify
from kms_jwks.cli.versions import version


class RootGroup(click.Group):
    """The root group: it cleans the output of every command, and reports the service's errors without a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line under `clean_output`."""
        with clean_output():
            return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the service becomes a message and an exit code."""
        error_format = ctx.ensure_object(ErrorFormat)
        try:
            return super().invoke(ctx)
        except errors.Error as error:
            report(error, as_json=error_format.json)
            ctx.exit(exit_code(error))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "kms_jwks":
                raise
            missing = _package_missing(error)
            report(missing, as_json=error_format.json)
            ctx.exit(exit_code(missing))
        except click.ClickException as error:
            # The message repeats arguments; a newline in one of them would forge a line.
            error.message = clean(error.message)  # type: ignore[misc]
            raise


def _package_missing(error: ModuleNotFoundError) -> errors.Error:
    """The error for a command of the node that runs where only the client was installed."""
    return errors.ConfigurationError(
        f"This command needs the Python package {error.name!r}, which is not installed.",
        next_step="Install the server too: pip install 'kms-jwks[server]' (with AWS KMS: 'kms-jwks[aws]').",
    )


@click.group(
    cls=RootGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""Exit codes: 0 done; 1 refused (conflict, not found, not valid); 2 wrong usage, wrong settings included;
    3 not authenticated or not allowed; 4 not reachable, or not possible now: try again.""",
)
@click.version_option(__version__, prog_name="kms-jwks")
def cli() -> None:
    """Signs tokens with keys that never leave their module, and publishes the JWKS that verifies them.

    init, serve, custodian, doctor and db work on the node itself, with its configuration. All other commands are
    clients of the API: KMS_JWKS_ADDR is the service's URL, KMS_JWKS_TOKEN (or KMS_JWKS_TOKEN_FILE) the API token.
    """


def _set_short_help(group: click.Group) -> None:
    """Let lists of commands show the whole first sentence of each; Click would cut it off."""
    for command in group.commands.values():
        paragraph = inspect.cleandoc(command.help or "").partition("\n\n")[0].replace("\n", " ")
        command.short_help = f"{paragraph.partition('. ')[0].rstrip('.')}."
        if isinstance(command, click.Group):
            _set_short_help(command)


for _command in (
    init, serve, custodian, doctor, db,
    key_set, key, version, external_key, client, grant, node, revoke, jwks, sign, verify,
):  # fmt: skip
    cli.add_command(_command)
_set_short_help(cli)
