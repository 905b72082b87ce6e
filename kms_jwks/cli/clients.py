"""`kms-jwks client` and `kms-jwks grant`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from kms_jwks import wire
from kms_jwks.access import Role
from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import DURATION, confirmed
from kms_jwks.cli.output import details, duration, note, print_line, when
from kms_jwks.model import (
    DEFAULT_API_TOKEN_LIFETIME,
    DEFAULT_TOKEN_OVERLAP,
    MAX_API_TOKEN_LIFETIME,
    MAX_TOKEN_OVERLAP,
)

if TYPE_CHECKING:
    from kms_jwks.cli.api import Api


_VALID = (
    f"How long it is valid, up to {duration(MAX_API_TOKEN_LIFETIME)}. [default: {duration(DEFAULT_API_TOKEN_LIFETIME)}]"
)
_ROLE = click.Choice([role.value for role in Role])


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


_output_option = click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write it to a file (mode 0600) instead."
)


@api_command(token, "create")
@click.argument("client")
@click.option("--expires-in", type=DURATION, help=_VALID)
@_output_option
def create_token(api: Api, client: str, expires_in: int | None, output: Path | None) -> None:
    """Make an API token and print it; it is not shown again."""
    if output is None:
        _show_token(api, api.client.create_token(client, expires_in=expires_in))
        return
    with _secret_file(output) as file:
        made = api.client.create_token(client, expires_in=expires_in)
        file.write(made.token + "\n")
    api.done(f"Token {made.id} of {client} is in {output}, valid until {when(made.expires_at)}.")


@api_command(token, "rotate")
@click.argument("client")
@click.argument("token_id", metavar="ID")
@click.option(
    "--overlap",
    type=DURATION,
    help=f"How long the old token still works, up to {duration(MAX_TOKEN_OVERLAP)} and never beyond its own end. "
    f"[default: {duration(DEFAULT_TOKEN_OVERLAP)}]",
)
@click.option("--expires-in", type=DURATION, help=_VALID)
@_output_option
def rotate_token(
    api: Api, client: str, token_id: str, overlap: int | None, expires_in: int | None, output: Path | None
) -> None:
    """Make an API token in place of another one and print it.

    It is not shown again. The old token still works for a while, so that its holder can change over.
    """
    if output is None:
        rotated = api.client.rotate_token(client, token_id, overlap=overlap, expires_in=expires_in)
        _show_token(api, rotated)
    else:
        with _secret_file(output) as file:
            rotated = api.client.rotate_token(client, token_id, overlap=overlap, expires_in=expires_in)
            file.write(rotated.token + "\n")
        api.done(f"Token {rotated.id} of {client} is in {output}, valid until {when(rotated.expires_at)}.")
    if not api.json:
        note(f"The old token {rotated.replaces} works until {when(rotated.replaced_expires_at)}.")


def _show_token(api: Api, made: wire.TokenCreated) -> None:
    api.show(made, lambda made: print_line(made.token))
    if not api.json:
        note(f"Token {made.id}, valid until {when(made.expires_at)}. It is not shown again.")


@api_command(token, "list")
@click.argument("client")
@click.option("--state", type=click.Choice(["valid", "expired", "revoked"]), help="Only tokens in this state.")
def list_tokens(api: Api, client: str, state: str | None) -> None:
    """List the tokens of a client; the secrets are not shown."""
    warnings: list[str] = []

    def row(t: wire.Token) -> tuple[object, ...]:
        warnings.extend(f"Warning: token {t.id} {warning}" for warning in t.warnings)
        ended = f"{when(t.expires_at)} (rotated)" if t.replaced_by else when(t.expires_at)
        return t.id, when(t.created_at), ended, when(t.revoked_at), when(t.last_used_at)

    api.show_list(api.client.tokens(client, state=state), ("ID", "CREATED", "EXPIRES", "REVOKED", "LAST USED"), row)
    for warning in warnings:
        note(warning)


@api_command(token, "revoke")
@click.argument("client")
@click.argument("token_id", metavar="ID")
@confirmed("Revoke token {token_id} of {client}?")
def revoke_token(api: Api, client: str, token_id: str) -> None:
    """Revoke a token; no worker accepts it once this returns."""
    api.client.revoke_token(client, token_id)
    api.done(f"Token {token_id} is revoked.")


@contextmanager
def _secret_file(file: Path) -> Iterator[TextIO]:
    """A file with mode 0600 that replaces `file` at the end of the `with`, unless that ends in an error.

    It is made before the token: one that cannot be written would be lost. The old file stays until then, since it may
    hold the very token that the call is made with.
    """
    target = file.resolve()
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise click.UsageError(f"--output: {file} cannot be written: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            part.unlink()


# --- grants -----------------------------------------------------------------------------------------------------------


@click.group()
def grant() -> None:
    """Grants: a client's role within everything, a key set, or a key."""


@api_command(grant, "list")
@click.option("--client", metavar="NAME", help="Only this client's.")
@click.option("--role", type=_ROLE, help="Only those of this role.")
@click.option("--key-set", metavar="NAME", help="Only those that name this key set.")
def list_grants(api: Api, client: str | None, role: str | None, key_set: str | None) -> None:
    """List the grants."""
    api.show_list(
        api.client.grants(client=client, role=role, key_set=key_set),
        ("CLIENT", "ROLE", "SCOPE", "ID", "NOTES"),
        lambda g: (g.client, g.role, _scope(g), g.id, _duties(g)),
    )


@api_command(grant, "create")
@click.argument("client")
@click.argument("role", type=_ROLE)
@click.option("--key-set", metavar="NAME", help="Within this key set.")
@click.option("--key", metavar="NAME", help="Within this key of it.")
@click.option("--everything", is_flag=True, help="Within the whole installation.")
@click.option(
    "--accept-combined-duties",
    is_flag=True,
    help="Even if the client then administrates what it signs or overrides. Every list of grants shows it.",
)
def create_grant(
    api: Api,
    client: str,
    role: str,
    key_set: str | None,
    key: str | None,
    everything: bool,
    accept_combined_duties: bool,
) -> None:
    """Give another client a role.

    A client with the role admin is refused the roles signer, raw-signer and break-glass within the same scope, and the
    other way round.
    """
    if everything == (key_set is not None):
        raise click.UsageError("Give the scope of the role: --key-set NAME [--key NAME], or --everything.")
    if key is not None and key_set is None:
        raise click.UsageError("--key needs --key-set.")
    scope = {name: value for name, value in (("key_set", key_set), ("key", key)) if value is not None}
    request = wire.convert(
        {"client": client, "role": role, "scope": scope, "accept_combined_duties": accept_combined_duties},
        wire.GrantCreate,
    )
    api.show(api.client.create_grant(request), _print_grant)


def _print_grant(made: wire.Grant) -> None:
    details(
        ("id", made.id),
        ("client", made.client),
        ("role", made.role),
        ("scope", _scope(made)),
        ("created", when(made.created_at)),
        ("created by", made.created_by or "-"),
    )
    if made.combined_with:
        note(f"Warning: {_duties(made)}")


def _duties(found: wire.Grant) -> str:
    """What every list shows of a grant that combines duties with another one of its client."""
    if not found.combined_with:
        return ""
    accepted = " (accepted)" if found.accepted_combined_duties else ""
    return f"combines duties with {', '.join(found.combined_with)}{accepted}"


@api_command(grant, "delete")
@click.argument("grant_id", metavar="ID")
@confirmed("Delete grant {grant_id}?")
def delete_grant(api: Api, grant_id: str) -> None:
    """Delete a grant."""
    api.client.delete_grant(grant_id)
    api.done(f"Grant {grant_id} is deleted.")


def _scope(found: wire.Grant) -> str:
    return " ".join(found.scope[name] for name in ("key_set", "key") if name in found.scope) or "everything"
