"""`kms-jwks external-key`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from kms_jwks import wire
from kms_jwks.cli.api import api_command, confirm, key_set_argument, yes_option
from kms_jwks.cli.text import details, table, when
from kms_jwks.cli.values import INSTANT, content, json_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kms_jwks.cli.api import Api


@click.group("external-key")
def external_key() -> None:
    """External keys: foreign public keys that a key set publishes, to verify only, until a date."""


@api_command(external_key, "list")
@key_set_argument
def list_external_keys(api: Api, key_set: str) -> None:
    """List the external keys of a key set."""
    api.show_list(
        api.client.external_keys(key_set),
        lambda items: table(("KID", "ALG", "REMOVE AT"), ((e.kid, e.alg, when(e.remove_at)) for e in items)),
    )


@api_command(external_key, "add")
@key_set_argument
@click.argument("kid")
@click.option("--alg", required=True, help="The algorithm of its signatures.")
@click.option("--remove-at", type=INSTANT, required=True, help="2026-12-31T23:00:00Z, 2026-12-31, or from now on: 30d.")
@click.option("--jwk", metavar="JSON|@FILE|-", help="The public key as a JWK.")
@click.option("--pem", metavar="@FILE|-", help="The public key as PEM.")
def add_external_key(api: Api, key_set: str, jwk: str | None, pem: str | None, **fields: Any) -> None:
    """Publish a foreign public key under KID, which stays taken for ever."""
    if (jwk is None) == (pem is None):
        raise click.UsageError("Give exactly one of --jwk and --pem.")
    key = {"jwk": json_object(jwk, "--jwk")} if jwk is not None else {"pem": content(pem or "", "--pem")}
    _refuse_private(key)
    made = api.client.add_external_key(key_set, wire.convert({**fields, **key}, wire.ExternalKeyCreate))
    api.show(lambda: _show(made))


@api_command(external_key, "show")
@key_set_argument
@click.argument("kid")
def show_external_key(api: Api, key_set: str, kid: str) -> None:
    """Show an external key."""
    found = api.client.external_key(key_set, kid)
    api.show(lambda: _show(found))


@api_command(external_key, "remove")
@key_set_argument
@click.argument("kid")
@yes_option
def remove_external_key(api: Api, key_set: str, kid: str, sure: bool) -> None:
    """Stop publishing an external key before its date."""
    confirm(f"Stop publishing {kid} in {key_set}? Its tokens verify no longer, and its kid stays taken.", sure=sure)
    api.client.remove_external_key(key_set, kid)
    api.done(f"{kid} is published no longer.")


def _refuse_private(key: Mapping[str, Any]) -> None:
    """A private key must not leave the machine it is on, not even to be refused."""
    from kms_jwks.jose import PRIVATE_MEMBERS

    if "PRIVATE KEY-----" in key.get("pem", "") or not {*PRIVATE_MEMBERS}.isdisjoint(key.get("jwk", ())):
        raise click.UsageError(
            "That is a private key; nothing was sent. Its public half: openssl pkey -in FILE -pubout -out PUBLIC"
        )


def _show(found: wire.ExternalKey) -> None:
    details(
        ("kid", found.kid),
        ("alg", found.alg),
        ("created", when(found.created_at)),
        ("remove at", when(found.remove_at)),
        ("removed", when(found.removed_at)),
        ("public key", msgspec.json.encode(found.public_jwk).decode()),
    )
