"""`kms-jwks key-set` and `kms-jwks external-key`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from kms_jwks import errors, wire
from kms_jwks.algorithms import repair_jwk
from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import (
    DURATION,
    INSTANT,
    KEY_SPEC,
    confirmed,
    content,
    given,
    json_object,
    key_set_argument,
    refuse_private,
)
from kms_jwks.cli.output import ExitCode, details, document, duration, note, print_json, table, when, yes
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
        (*EXTERNAL_COLUMNS, "WARNINGS", "REMOVED"),
        lambda e: (*external_row(e), "; ".join(e.warnings) or "-", when(e.removed_at)),
    )


@api_command(external_key, "add")
@key_set_argument
@click.argument("kid", required=False)
@click.option("--alg", help="The algorithm of its signatures. [default: the JWK's own]")
@click.option("--remove-at", type=INSTANT, required=True, help="2026-12-31T23:00:00Z, 2026-12-31, or from now on: 30d.")
@click.option("--jwk", metavar="JSON|@FILE|-", help="The public key as a JWK.")
@click.option("--pem", metavar="@FILE|-", help="The public key as PEM.")
@click.option("--jwks", metavar="@FILE|-", help="All keys of a JWKS, each under its own kid.")
@click.option("--kid", "only", metavar="KID", multiple=True, help="Of --jwks, this key alone. Repeatable.")
def add_external_key(
    api: Api,
    key_set: str,
    kid: str | None,
    jwk: str | None,
    pem: str | None,
    jwks: str | None,
    only: tuple[str, ...],
    **fields: Any,
) -> None:
    """Publish a foreign public key under KID, by default the JWK's own, or every key of a JWKS.

    A kid stays bound to its key for ever. An identical key that was removed can be added again.
    """
    if sum(value is not None for value in (jwk, pem, jwks)) != 1:
        raise click.UsageError("Give exactly one of --jwk, --pem and --jwks.")
    if jwks is not None:
        if kid is not None:
            raise click.UsageError("With --jwks, each key has its own kid; choose some by --kid.")
        _add_each(api, key_set, _choose(json_object(jwks, "--jwks"), only), given(fields))
        return
    if only:
        raise click.UsageError("--kid goes with --jwks; otherwise write KID behind KEY_SET.")
    if kid is None and pem is not None:
        raise click.UsageError("A PEM names no kid: write KID behind KEY_SET.")
    key: dict[str, Any] = (
        {"jwk": json_object(jwk, "--jwk")} if jwk is not None else {"pem": content(pem or "", "--pem")}
    )
    if "keys" in key.get("jwk", ()):
        raise click.UsageError("--jwk: that is a JWKS; give it as --jwks. Nothing was sent.")
    refuse_private(key.get("jwk", {}), key.get("pem", ""))
    request = wire.convert({**given({**fields, "kid": kid}), **key}, wire.ExternalKeyCreate)
    added = api.client.add_external_key(key_set, request)
    api.show(added, _print_external_key)
    _note_ignored(added)


def _choose(found: Mapping[str, Any], only: tuple[str, ...]) -> list[dict[str, Any]]:
    """The keys of a JWKS, or those with the kids `only`. Raises UsageError; then nothing was sent."""
    keys = found.get("keys")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        raise click.UsageError('--jwks: a JWKS is needed: {"keys": [{…}, …]} with at least one key (RFC 7517 §5).')
    for key in keys:
        refuse_private(key)
    kids = [key.get("kid") for key in keys]
    if missing := [kid for kid in only if kid not in kids]:
        held = ", ".join(str(kid) for kid in kids)
        raise click.UsageError(f"--kid: the JWKS has no key {', '.join(missing)}; it has {held}. Nothing was sent.")
    return [key for key in keys if not only or key.get("kid") in only]


def _add_each(api: Api, key_set: str, keys: list[dict[str, Any]], fields: Mapping[str, Any]) -> None:
    """Add the keys of a JWKS one after the other, say of each what became of it, and exit with 1 if one was refused."""
    results: list[tuple[dict[str, Any], wire.ExternalKey | errors.Error]] = []
    for key in keys:
        # An alg of the key itself counts; --alg is for keys without one.
        alg = {} if "alg" in key else {name: value for name, value in fields.items() if name == "alg"}
        try:
            request = wire.convert({"remove_at": fields["remove_at"], **alg, "jwk": key}, wire.ExternalKeyCreate)
            results.append((key, api.client.add_external_key(key_set, request)))
        except (errors.InvalidRequest, errors.Conflict) as error:
            results.append((key, error))
    refused = [(key, result) for key, result in results if isinstance(result, errors.Error)]
    if api.json:
        items = [
            {"kid": key.get("kid"), "added": True, "external_key": result}
            if isinstance(result, wire.ExternalKey)
            else {"kid": key.get("kid"), "added": False, "problem": document(result)}
            for key, result in results
        ]
        print_json(msgspec.json.encode({"items": items}))
    else:
        table(("KID", "ALG", "RESULT"), (_result_row(key, result) for key, result in results))
        for _, result in results:
            if isinstance(result, wire.ExternalKey):
                _note_ignored(result)
        for step in dict.fromkeys(error.next_step for _, error in refused):
            note(f"Next: {step}")
        if waiting := [str(key.get("kid")) for key, error in refused if isinstance(error, errors.LimitReached)]:
            note(
                f"{len(results) - len(refused)} of {len(results)} keys are published; there was no room for "
                f"{', '.join(waiting)}. Keys that no live token names can wait. --kid chooses which ones come first."
            )
    if refused:
        raise SystemExit(ExitCode.REFUSED)


def _result_row(key: Mapping[str, Any], result: wire.ExternalKey | errors.Error) -> tuple[object, object, str]:
    if isinstance(result, wire.ExternalKey):
        return result.kid, result.alg, "published"
    return key.get("kid", "-"), key.get("alg", "-"), f"refused: {result.detail}"


def _note_ignored(added: wire.ExternalKey) -> None:
    if added.ignored:
        note(f"Not published of {added.kid}: {', '.join(added.ignored)}.")


@api_command(external_key, "update")
@key_set_argument
@click.argument("kid")
@click.option("--remove-at", type=INSTANT, required=True, help="Its new date: 2026-12-31, or from now on: 30d.")
def update_external_key(api: Api, key_set: str, kid: str, remove_at: str) -> None:
    """Move the date at which an external key leaves the JWKS."""
    request = wire.convert({"remove_at": remove_at}, wire.ExternalKeyPatch)
    api.show(api.client.update_external_key(key_set, kid, request), _print_external_key)


@external_key.command("repair")
@click.option("--jwk", metavar="JSON|@FILE|-", required=True, help="A public JWK, or a JWKS.")
def repair_key(jwk: str) -> None:
    """Print a JWK or JWKS with its numbers in their canonical encoding; nothing is sent.

    Padding and the plain base64 alphabet become base64url (RFC 7515 section 2), leading zero octets of n are dropped,
    and short coordinates get their zeros back (RFC 7518 section 6). The key itself does not change.
    """
    found = json_object(jwk, "--jwk")
    keys = found["keys"] if isinstance(found.get("keys"), list) else [found]
    if not all(isinstance(key, dict) for key in keys):
        raise click.UsageError("--jwk: neither a JWK nor a JWKS.")
    for key in keys:
        refuse_private(key)
    repaired = [repair_jwk(key) for key in keys]
    print_json(msgspec.json.encode({**found, "keys": repaired} if "keys" in found else repaired[0]))


@api_command(external_key, "show")
@key_set_argument
@click.argument("kid")
def show_external_key(api: Api, key_set: str, kid: str) -> None:
    """Show an external key."""
    api.show(api.client.external_key(key_set, kid), _print_external_key)


@api_command(external_key, "remove")
@key_set_argument
@click.argument("kid")
@confirmed("Stop publishing {kid} in {key_set}? Its tokens verify no longer.")
def remove_external_key(api: Api, key_set: str, kid: str) -> None:
    """Stop publishing an external key before its date. The identical key can be added again."""
    api.client.remove_external_key(key_set, kid)
    api.done(f"{kid} is published no longer.")


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
    click.echo()
    table(
        ("CHANGE", "AT", "REMOVE AT", "BY"),
        ((c.what, when(c.at), when(c.remove_at), c.who or "-") for c in found.changes),
    )
    for warning in found.warnings:
        note(f"Warning: {warning}")
