"""The root command and what its subcommands are."""

from __future__ import annotations

import inspect

import click

from kms_jwks import __version__
from kms_jwks.cli.callers import client, grant
from kms_jwks.cli.external_keys import external_key
from kms_jwks.cli.failures import Guarded
from kms_jwks.cli.key_sets import key_set
from kms_jwks.cli.keys import key
from kms_jwks.cli.node import custodian, db, doctor, init, serve
from kms_jwks.cli.operation import node
from kms_jwks.cli.revocation import revoke
from kms_jwks.cli.signing import jwks, sign, verify
from kms_jwks.cli.versions import version


@click.group(
    cls=Guarded,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""Exit codes: 0 done; 1 refused (conflict, not found, not valid); 2 used wrongly, settings included;
    3 not authenticated or not allowed; 4 not reachable, or not now: try again.""",
)
@click.version_option(__version__, prog_name="kms-jwks")
def cli() -> None:
    """Signs tokens with keys that never leave their module, and publishes the JWKS that verifies them.

    init, serve, custodian, doctor and db work on the node itself, with its configuration. All other commands are
    clients of the API: KMS_JWKS_ADDR says where the service is, KMS_JWKS_TOKEN (or KMS_JWKS_TOKEN_FILE) who calls.
    """


def _summarise(group: click.Group) -> None:
    """Let lists of commands show the first sentence of each, whole; click would cut it off."""
    for command in group.commands.values():
        paragraph = inspect.cleandoc(command.help or "").partition("\n\n")[0].replace("\n", " ")
        command.short_help = f"{paragraph.partition('. ')[0].rstrip('.')}."
        if isinstance(command, click.Group):
            _summarise(command)


for _command in (
    init, serve, custodian, doctor, db,
    key_set, key, version, external_key, client, grant, node, revoke, jwks, sign, verify,
):  # fmt: skip
    cli.add_command(_command)
_summarise(cli)
