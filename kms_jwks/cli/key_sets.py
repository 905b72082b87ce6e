"""`kms-jwks key-set`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kms_jwks import wire
from kms_jwks.cli.api import api_command, key_set_argument
from kms_jwks.cli.text import details, duration, table, when, yes
from kms_jwks.cli.values import DURATION, KEY_SPEC, given
from kms_jwks.cli.versions import version_rows

if TYPE_CHECKING:
    from kms_jwks.cli.api import Api


@click.group("key-set")
def key_set() -> None:
    """Key sets: a named JWKS each, one per issuer."""


@api_command(key_set, "list")
def list_key_sets(api: Api) -> None:
    """List the key sets you may see."""
    api.show_list(
        api.client.key_sets(),
        lambda items: table(
            ("NAME", "PURPOSE", "ACCESS", "KEYS", "ISSUER"),
            ((s.name, s.purpose, s.access, ", ".join(k.name for k in s.keys) or "-", s.issuer) for s in items),
        ),
    )


@api_command(key_set, "show")
@key_set_argument
def show_key_set(api: Api, key_set: str) -> None:
    """Show a key set and its keys."""
    found = api.client.key_set(key_set)
    api.show(lambda: _show(found))


@api_command(key_set, "create")
@click.argument("name")
@click.option("--issuer", metavar="URL", help="The issuer of its tokens. [default: the service's URL and the name]")
@click.option("--access", type=click.Choice(["public", "restricted"]), help="Who may fetch the JWKS. [default: public]")
@click.option(
    "--purpose",
    type=click.Choice(["jwt", "raw"]),
    help="What its keys sign, for ever: JWTs, or any payload. [default: jwt]",
)
@click.option("--cache-lifetime", type=DURATION, help="How long verifiers keep the JWKS: 60s to 15m. [default: 5m]")
@click.option("--stale-if-error", type=DURATION, help="How long caches serve it on while we are away. [default: 1h]")
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
    """Create a key set NAME, with its first keys."""
    request = wire.convert({**given(fields), "keys": list(keys)}, wire.KeySetCreate)
    made = api.client.create_key_set(request)
    api.show(lambda: _show(made))


@api_command(key_set, "update")
@key_set_argument
@click.option("--issuer", metavar="URL", help="Only before one of its keys could sign.")
@click.option("--access", type=click.Choice(["public", "restricted"]), help="Who may fetch the JWKS.")
@click.option("--cache-lifetime", type=DURATION, help="How long verifiers keep the JWKS: 60s to 15m.")
@click.option("--stale-if-error", type=DURATION, help="How long caches serve it on while the service is away.")
@click.option("--revision", type=int, help="Change it only if it is still at this revision. [default: as it is now]")
def update_key_set(api: Api, key_set: str, revision: int | None, **fields: Any) -> None:
    """Change a key set."""
    changes = wire.convert(given(fields), wire.KeySetPatch)
    if not given(fields):
        raise click.UsageError("Nothing to change: give at least one option.")
    at = api.client.key_set(key_set).revision if revision is None else revision
    changed = api.client.update_key_set(key_set, changes, revision=at)
    api.show(lambda: _show(changed))


def _show(found: wire.KeySet) -> None:
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
        ("created", when(found.created_at)),
        ("revision", found.revision),
    )
    click.echo()
    columns, rows = version_rows([(k.name, v) for k in found.keys for v in k.versions], named=True)
    table(columns, rows)
