"""`kms-jwks key-set` and `kms-jwks external-key`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from kms_jwks import wire
from kms_jwks.algorithms import PRIVATE_MEMBERS
from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import DURATION, INSTANT, KEY_SPEC, confirmed, content, given, json_object, key_set_argument
from kms_jwks.cli.output import details, duration, note, table, when, yes
from kms_jwks.cli.versions import (
    EXTERNAL_COLUMNS,
    VERSION_COLUMNS,
    external_row,
    print_external_keys,
    version_row,
)
from kms_jwks.model import DEFAULT_CACHE_LIFETIME, DEFAULT_STALE_IF_ERROR, Access, Purpose
from kms_jwks.timeline import CACHE_LIFETIME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kms_jwks.cli.api import Api

_PURPOSE = click.Choice([purpose.value for purpose in Purpose])
_ACCESS = click.Choice([access.value for access in Access])
_KEPT = f"How long verifiers keep the JWKS: {duration(CACHE_LIFETIME[0])} to {duration(CACHE_LIFETIME[1])}."
_STALE = "How long caches serve the JWKS on while the service is away."


@click.group("key-set")
def key_set() -> None:
    """Key sets: a named JWKS each, one per issuer."""


@api_command(key_set, "list")
@click.option("--purpose", type=_PURPOSE, help="Only key sets whose keys sign this.")
@click.option("--access", type=_ACCESS, help="Only key sets with this access.")
def list_key_sets(api: Api, purpose: str | None, access: str | None) -> None:
    """List the key sets you may see, and the names of their keys."""
    api.show_list(
        api.client.key_sets(purpose=purpose, access=access),
        ("NAME", "PURPOSE", "ACCESS", "KEYS", "EXTERNAL", "ISSUER"),
        lambda s: (
            s.name if s.retired_at is None else f"{s.name} (retired)",
            s.purpose,
            s.access,
            ", ".join(k.name for k in s.keys) or "-",
            len(s.external_keys) or "-",
            s.issuer,
        ),
    )


@api_command(key_set, "show")
@key_set_argument
def show_key_set(api: Api, key_set: str) -> None:
    """Show a key set and its keys."""
    api.show(api.client.key_set(key_set), _print_key_set)


@api_command(key_set, "create")
@click.argument("name")
@click.option("--issuer", metavar="URL", help="The issuer of its tokens. [default: the service's URL and the name]")
@click.option("--access", type=_ACCESS, help="Who may fetch the JWKS. [default: public]")
@click.option(
    "--purpose",
    type=_PURPOSE,
    help="What its keys sign, for ever: JWTs, or any payload. [default: jwt]",
)
@click.option("--cache-lifetime", type=DURATION, help=f"{_KEPT} [default: {duration(DEFAULT_CACHE_LIFETIME)}]")
@click.option("--stale-if-error", type=DURATION, help=f"{_STALE} [default: {duration(DEFAULT_STALE_IF_ERROR)}]")
@click.option(
    "--existing-issuer",
    is_flag=True,
    default=None,
    help="Verifiers know this issuer already: its first keys wait for the publish lead too.",
)
@click.option(
    "--key",
    "keys",
    type=KEY_SPEC,
    multiple=True,
    help="A first key, which may sign at once: default:ES256, rsa:RS256:3072. Repeatable.",
)
def create_key_set(api: Api, keys: tuple[dict[str, Any], ...], **fields: Any) -> None:
    """Create a key set NAME, with its first keys: at most 4."""
    request = wire.convert({**given(fields), "keys": list(keys)}, wire.KeySetCreate)
    api.show(api.client.create_key_set(request), _print_key_set)


@api_command(key_set, "update")
@key_set_argument
@click.option("--issuer", metavar="URL", help="Only before one of its keys could sign.")
@click.option("--access", type=_ACCESS, help="Who may fetch the JWKS.")
@click.option("--cache-lifetime", type=DURATION, help=_KEPT)
@click.option("--stale-if-error", type=DURATION, help=_STALE)
@click.option("--revision", type=int, help="Change it only if it is still at this revision. [default: as it is now]")
def update_key_set(api: Api, key_set: str, revision: int | None, **fields: Any) -> None:
    """Change a key set."""
    changes = wire.convert(given(fields), wire.KeySetPatch)
    if not given(fields):
        raise click.UsageError("Nothing to change: give at least one option.")
    at = api.client.key_set(key_set).revision if revision is None else revision
    api.show(api.client.update_key_set(key_set, changes, revision=at), _print_key_set)


@api_command(key_set, "retire")
@key_set_argument
@confirmed("Retire {key_set} with all its keys, for ever? None signs any longer; the JWKS is empty in the end.")
def retire_key_set(api: Api, key_set: str) -> None:
    """End a key set with its keys: they sign no longer, and leave the JWKS when no token they signed can be alive."""
    api.show(api.client.retire_key_set(key_set), _print_key_set)


@api_command(key_set, "delete")
@key_set_argument
@confirmed("Delete {key_set} with all its keys?")
def delete_key_set(api: Api, key_set: str) -> None:
    """Delete a key set that has never published anything; its name and issuer are free again."""
    api.client.delete_key_set(key_set)
    api.done(f"{key_set} is deleted.")


def _print_key_set(found: wire.KeySet) -> None:
    details(
        ("name", found.name),
        ("issuer", found.issuer),
        ("jwks", found.jwks_uri),
        *((("jwks (ML-DSA)", found.jwks_pq_uri),) if found.jwks_pq_uri else ()),
        ("purpose", found.purpose),
        ("access", found.access),
        ("cache lifetime", duration(found.cache_lifetime)),
        ("stale if error", duration(found.stale_if_error)),
        ("existing issuer", yes(found.existing_issuer)),
        ("first published", when(found.first_published_at)),
        *((("retired", when(found.retired_at)),) if found.retired_at else ()),
        ("created", when(found.created_at)),
        ("revision", found.revision),
    )
    click.echo()
    table(("KEY", *VERSION_COLUMNS), ((k.name, *version_row(v)) for k in found.keys for v in k.versions))
    print_external_keys(found)
    for warning in found.warnings:
        note(f"Warning: {warning}")


# --- external keys ----------------------------------------------------------------------------------------------------


@click.group("external-key")
def external_key() -> None:
    """External keys: foreign public keys that a key set publishes, to verify only, until a date."""


@api_command(external_key, "list")
@key_set_argument
def list_external_keys(api: Api, key_set: str) -> None:
    """List the external keys of a key set, removed ones included."""
    api.show_list(
        api.client.external_keys(key_set),
        (*EXTERNAL_COLUMNS, "REMOVED"),
        lambda e: (*external_row(e), when(e.removed_at)),
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
    request = wire.convert({**fields, **key}, wire.ExternalKeyCreate)
    api.show(api.client.add_external_key(key_set, request), _print_external_key)


@api_command(external_key, "show")
@key_set_argument
@click.argument("kid")
def show_external_key(api: Api, key_set: str, kid: str) -> None:
    """Show an external key."""
    api.show(api.client.external_key(key_set, kid), _print_external_key)


@api_command(external_key, "remove")
@key_set_argument
@click.argument("kid")
@confirmed("Stop publishing {kid} in {key_set}? Its tokens verify no longer, and its kid stays taken.")
def remove_external_key(api: Api, key_set: str, kid: str) -> None:
    """Stop publishing an external key before its date."""
    api.client.remove_external_key(key_set, kid)
    api.done(f"{kid} is published no longer.")


def _refuse_private(key: Mapping[str, Any]) -> None:
    """Raise UsageError for a private key before it leaves this machine."""
    if "PRIVATE KEY-----" in key.get("pem", "") or not {*PRIVATE_MEMBERS}.isdisjoint(key.get("jwk", ())):
        raise click.UsageError(
            "That is a private key; nothing was sent. Its public half: openssl pkey -in FILE -pubout -out PUBLIC"
        )


def _print_external_key(found: wire.ExternalKey) -> None:
    details(
        ("kid", found.kid),
        ("alg", found.alg),
        ("added", when(found.created_at)),
        ("added by", found.created_by or "-"),
        ("remove at", when(found.remove_at)),
        ("removed", when(found.removed_at)),
        ("public key", msgspec.json.encode(found.public_jwk).decode()),
    )
