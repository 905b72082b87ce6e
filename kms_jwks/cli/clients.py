"""`kms-jwks client` and `kms-jwks grant`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kms_jwks import wire
from kms_jwks.access import Role
from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import DURATION, confirmed
from kms_jwks.cli.output import details, duration, note, print_line, when
from kms_jwks.model import DEFAULT_API_TOKEN_LIFETIME, MAX_API_TOKEN_LIFETIME

if TYPE_CHECKING:
    from kms_jwks.cli.api import Api


_VALID = (
    f"How long it is valid, up to {duration(MAX_API_TOKEN_LIFETIME)}. [default: {duration(DEFAULT_API_TOKEN_LIFETIME)}]"
)


@click.group()
def client() -> None:
    """Clients: the callers of the API, and their API tokens."""


@api_command(client, "list")
def list_clients(api: Api) -> None:
    """List the clients."""
    api.show_list(
        api.client.clients(),
        ("NAME", "CREATED", "ID"),
        lambda c: (c.name, when(c.created_at), c.id),
    )


@api_command(client, "show")
@click.argument("name")
def show_client(api: Api, name: str) -> None:
    """Show a client."""
    api.show(api.client.client(name), _print_client)


@api_command(client, "create")
@click.argument("name")
def create_client(api: Api, name: str) -> None:
    """Create a client. It may do nothing until it has a grant, and needs a token to call."""
    api.show(api.client.create_client(name), _print_client)


@api_command(client, "delete")
@click.argument("name")
@confirmed("Delete client {name} with its tokens and grants? Its name stays taken.")
def delete_client(api: Api, name: str) -> None:
    """Delete a client with its tokens and grants."""
    api.client.delete_client(name)
    api.done(f"Client {name} is deleted.")


def _print_client(found: wire.Client) -> None:
    details(("name", found.name), ("id", found.id), ("created", when(found.created_at)))


# --- tokens -----------------------------------------------------------------------------------------------------------


@client.group()
def token() -> None:
    """API tokens of a client."""


@api_command(token, "create")
@click.argument("client")
@click.option("--expires-in", type=DURATION, help=_VALID)
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write it to a file (mode 0600) instead."
)
def create_token(api: Api, client: str, expires_in: int | None, output: Path | None) -> None:
    """Make an API token and print it; it is not shown again."""
    if output is not None:
        # The file is made first: a token that cannot be written would be lost.
        _write_secret(output, "")
    made = api.client.create_token(client, expires_in=expires_in)
    if output is not None:
        _write_secret(output, made.token + "\n")
        api.done(f"Token {made.id} of {client} is in {output}, valid until {when(made.expires_at)}.")
        return
    api.show(made, lambda made: print_line(made.token))
    if not api.json:
        note(f"Token {made.id}, valid until {when(made.expires_at)}. It is not shown again.")


@api_command(token, "list")
@click.argument("client")
def list_tokens(api: Api, client: str) -> None:
    """List the tokens of a client; the secrets are not shown."""
    api.show_list(
        api.client.tokens(client),
        ("ID", "CREATED", "EXPIRES", "REVOKED", "LAST USED"),
        lambda t: (t.id, when(t.created_at), when(t.expires_at), when(t.revoked_at), when(t.last_used_at)),
    )


@api_command(token, "revoke")
@click.argument("client")
@click.argument("token_id", metavar="ID")
@confirmed("Revoke token {token_id} of {client}?")
def revoke_token(api: Api, client: str, token_id: str) -> None:
    """Revoke a token; no worker accepts it once this returns."""
    api.client.revoke_token(client, token_id)
    api.done(f"Token {token_id} is revoked.")


def _write_secret(file: Path, text: str) -> None:
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            os.fchmod(handle, 0o600)
            stream.write(text)
    except OSError as error:
        raise click.UsageError(f"--output: {file} cannot be written: {error.strerror}.") from None


# --- grants -----------------------------------------------------------------------------------------------------------


@click.group()
def grant() -> None:
    """Grants: a client's role within everything, a key set, or a key."""


@api_command(grant, "list")
@click.option("--client", "of", metavar="NAME", help="Only this client's.")
def list_grants(api: Api, of: str | None) -> None:
    """List the grants."""
    if of is not None and api.json:
        raise click.UsageError("--client cannot be combined with --json: filter the items by `client`.")
    grants = api.client.grants()
    api.show_list(
        grants if of is None else (g for g in grants if g.client == of),
        ("CLIENT", "ROLE", "SCOPE", "ID"),
        lambda g: (g.client, g.role, _scope(g), g.id),
    )


@api_command(grant, "create")
@click.argument("client")
@click.argument("role", type=click.Choice([role.value for role in Role]))
@click.option("--key-set", metavar="NAME", help="Within this key set.")
@click.option("--key", metavar="NAME", help="Within this key of it.")
@click.option("--everything", is_flag=True, help="Within the whole installation.")
def create_grant(
    api: Api,
    client: str,
    role: str,
    key_set: str | None,
    key: str | None,
    everything: bool,
) -> None:
    """Give a client a role."""
    if everything == (key_set is not None):
        raise click.UsageError("Give the scope of the role: --key-set NAME [--key NAME], or --everything.")
    if key is not None and key_set is None:
        raise click.UsageError("--key needs --key-set.")
    scope = {name: value for name, value in (("key_set", key_set), ("key", key)) if value is not None}
    request = wire.convert({"client": client, "role": role, "scope": scope}, wire.GrantCreate)
    api.show(
        api.client.create_grant(request),
        lambda made: details(
            ("id", made.id),
            ("client", made.client),
            ("role", made.role),
            ("scope", _scope(made)),
            ("created", when(made.created_at)),
        ),
    )


@api_command(grant, "delete")
@click.argument("grant_id", metavar="ID")
@confirmed("Delete grant {grant_id}?")
def delete_grant(api: Api, grant_id: str) -> None:
    """Delete a grant."""
    api.client.delete_grant(grant_id)
    api.done(f"Grant {grant_id} is deleted.")


def _scope(found: wire.Grant) -> str:
    return " ".join(found.scope[name] for name in ("key_set", "key") if name in found.scope) or "everything"
