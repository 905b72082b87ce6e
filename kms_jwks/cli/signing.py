"""`kms-jwks jwks`, `sign` and `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import DURATION, content, json_object, key_arguments
from kms_jwks.cli.output import note, print_json, print_line

if TYPE_CHECKING:
    from kms_jwks import wire
    from kms_jwks.cli.api import Api

DEFAULT_KEY_SET = "default"


@api_command(None, "jwks")
@click.argument("key_set", metavar="[KEY_SET]", required=False)
@click.option("--post-quantum", is_flag=True, help="The document of its ML-DSA keys.")
def jwks(api: Api, key_set: str | None, post_quantum: bool) -> None:
    """Print the JWKS of a key set, or of the default one."""
    api.show(api.client.jwks(key_set, post_quantum=post_quantum), _print_indented)


@api_command(None, "sign")
@key_arguments
@click.option(
    "--claims", metavar="JSON|@FILE|-", required=True, help="The claims; @FILE reads a file, - standard input."
)
@click.option("--expires-in", type=DURATION, help="How long the token lives. [default: the key's profile]")
@click.option("--profile", metavar="NAME", help="The signing profile. [default: the key's only one]")
def sign(api: Api, key_set: str, key: str, claims: str, expires_in: int | None, profile: str | None) -> None:
    """Sign a JWT and print it."""
    made = api.client.sign_jwt(key_set, key, json_object(claims, "--claims"), expires_in=expires_in, profile=profile)
    api.show(made, lambda made: print_line(made.token))


@api_command(None, "verify", options_metavar="[OPTIONS] [KEY_SET] TOKEN|-")
@click.argument("words", nargs=-1, metavar="")
@click.option(
    "--audience",
    metavar="AUDIENCE",
    required=True,
    help="The audience it must have; any: not checked.",
)
@click.option("--typ", metavar="TYP", help="The typ it must have.")
def verify(api: Api, words: tuple[str, ...], audience: str, typ: str | None) -> None:
    """Verify a token and print its claims; `-` reads it from standard input.

    Without KEY_SET it is verified against the key set `default`. Exits with 1 when the token is not valid.
    """
    if not 1 <= len(words) <= 2:
        raise click.UsageError("Give [KEY_SET] and TOKEN, or - to read the token from standard input.")
    token = words[-1] if words[-1] != "-" else content("-", "TOKEN").strip()
    key_set = words[0] if len(words) == 2 else DEFAULT_KEY_SET
    api.show(api.client.verify(key_set, token, audience, typ), _print_verified)


def _print_verified(found: wire.Verified) -> None:
    note(f"Valid: signed by {found.kid}")
    _print_indented(found.claims)


def _print_indented(value: object) -> None:
    print_json(msgspec.json.format(msgspec.json.encode(value)))
