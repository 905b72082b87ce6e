"""`kms-jwks version`."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from kms_jwks import wire
from kms_jwks.cli.api import api_command
from kms_jwks.cli.bars import check_bars, width
from kms_jwks.cli.options import (
    INSTANT,
    adopt_options,
    break_glass_options,
    confirm,
    confirmed,
    dry_run_option,
    given,
    group_adopt,
    key_arguments,
    version_arguments,
    yes_option,
)
from kms_jwks.cli.output import details, duration, legend, note, print_json, table, when, yes
from kms_jwks.cli.revocation import show_revoked
from kms_jwks.model import VersionState
from kms_jwks.timeline import MIN_DESTROY_AFTER

if TYPE_CHECKING:
    from kms_jwks.cli.api import Api


@click.group()
def version() -> None:
    """Key versions: one key pair each. VERSION is its number or its kid."""


@api_command(version, "list")
@key_arguments
@click.option(
    "--state",
    "states",
    type=click.Choice([state.value for state in VersionState]),
    multiple=True,
    help="Only versions in this state. Repeatable.",
)
def list_versions(api: Api, key_set: str, key: str, states: tuple[str, ...]) -> None:
    """List the versions of a key, destroyed ones included."""
    api.show_list(api.client.versions(key_set, key, states=states), VERSION_COLUMNS, version_row)


@api_command(version, "show")
@version_arguments
def show_version(api: Api, key_set: str, key: str, version: str) -> None:
    """Show a version and when it became what it is."""
    api.show(api.client.version(key_set, key, version), _print_version)


@api_command(version, "create")
@key_arguments
@adopt_options
def create_version(api: Api, key_set: str, key: str, **fields: Any) -> None:
    """Make a standby version, where there is none.

    With --adopt it is a key pair that the module holds already, beside the standby; `version activate` lets it sign.
    """
    adopt = group_adopt(given(fields)).get("adopt")
    request = wire.convert(adopt, wire.Adopt) if adopt else None
    api.show(api.client.create_version(key_set, key, adopt=request), _print_version)


@api_command(version, "activate")
@version_arguments
@break_glass_options
def activate_version(api: Api, key_set: str, key: str, version: str, break_glass: str | None) -> None:
    """Let a published version sign."""
    api.show(api.client.activate(key_set, key, version, break_glass=break_glass), _print_version)


@api_command(version, "retire")
@version_arguments
@break_glass_options
def retire_version(api: Api, key_set: str, key: str, version: str, break_glass: str | None) -> None:
    """Take a retiring version out of the JWKS. The custodian does so by itself once its tokens have expired."""
    api.show(api.client.retire(key_set, key, version, break_glass=break_glass), _print_version)


@api_command(version, "revoke")
@version_arguments
@click.option("--reason", default="", help="Why; stays on the version.")
@dry_run_option
@yes_option
def revoke_version(api: Api, key_set: str, key: str, version: str, reason: str, dry_run: bool, sure: bool) -> None:
    """Emergency: out of the JWKS, and it never signs again.

    The standby takes over at once. The command returns when no worker signs with the version any more, and says which
    verifiers may go on trusting it.
    """
    if not dry_run:
        confirm(f"Revoke version {version} of {key_set} {key}? That cannot be undone.", sure=sure)
    show_revoked(api, api.client.revoke(key_set, key, version, reason=reason, dry_run=dry_run))


@api_command(version, "destroy")
@version_arguments
@click.option(
    "--at",
    "destroy_at",
    type=INSTANT,
    help=f"When, at least {duration(MIN_DESTROY_AFTER)} ahead. [default: the key's policy]",
)
@confirmed("Destroy the key pair of version {version} of {key_set} {key} at that time?")
def destroy_version(api: Api, key_set: str, key: str, version: str, destroy_at: str | None) -> None:
    """Set when the key pair of a retired or revoked version is destroyed in its module."""
    at = datetime.fromisoformat(destroy_at) if destroy_at else None
    api.show(api.client.destroy(key_set, key, version, destroy_at=at), _print_version)


@api_command(version, "cancel-destroy")
@version_arguments
def cancel_destroy(api: Api, key_set: str, key: str, version: str) -> None:
    """Cancel a destruction that has not happened yet."""
    api.show(api.client.cancel_destroy(key_set, key, version), _print_version)


@api_command(version, "safety")
@version_arguments
def show_safety(api: Api, key_set: str, key: str, version: str) -> None:
    """Show each invariant of a version with both its sides, and what happens next."""
    api.show(api.client.safety(key_set, key, version), _print_safety)


def _print_safety(found: wire.Safety) -> None:
    details(
        ("kid", found.kid or "-"),
        ("state", found.state),
        ("now", when(found.now)),
        ("next", found.next),
        ("next at", when(found.next_at)),
    )
    click.echo()
    table(
        ("INVARIANT", "HOLDS", "LEFT", "RIGHT", "STATEMENT"),
        ((c.invariant, yes(c.holds), when(c.left), when(c.right), c.statement) for c in found.checks),
    )
    for warning in found.warnings:
        note(f"Warning: {warning}")
    if bars := check_bars(found, width()):
        click.echo("\n" + "\n".join(bars))
    print_external_keys(found)
    legend("LEFT", *(c.invariant for c in found.checks))


@api_command(version, "attributes")
@version_arguments
def show_attributes(api: Api, key_set: str, key: str, version: str) -> None:
    """Show the module's evidence that the private key was made in it and stays there."""
    api.show(api.client.attributes(key_set, key, version), _print_attributes)


def _print_attributes(found: wire.Attributes) -> None:
    details(
        ("kid", found.kid),
        ("backend", found.backend),
        ("made in the module", yes(found.generated_in_module)),
        ("not extractable", yes(found.non_extractable)),
        ("signs only", yes(found.sign_only)),
    )
    click.echo()
    recorded = found.recorded.get("attributes", found.recorded)
    then: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    table(
        ("ATTRIBUTE", "NOW", "WHEN IT WAS MADE"),
        ((name, _as_text(value), _as_text(then.get(name, "-"))) for name, value in sorted(found.attributes.items())),
    )


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


@api_command(version, "public-key")
@version_arguments
@click.option(
    "--format",
    "form",
    type=click.Choice(["jwk", "pem", "der"]),
    default="jwk",
    show_default=True,
    help="How it is written.",
)
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the screen.")
def public_key(api: Api, key_set: str, key: str, version: str, form: str, output: Path | None) -> None:
    """Print the public key of a version."""
    if form == "der" and output is None and sys.stdout.isatty():
        raise click.UsageError("DER is binary and would control the terminal: give --output FILE, or redirect it.")
    if form == "jwk":
        body = msgspec.json.encode(api.client.public_jwk(key_set, key, version)) + b"\n"
    elif form == "pem":
        body = api.client.public_pem(key_set, key, version).encode()
    else:
        body = api.client.public_der(key_set, key, version)
    if output is not None:
        try:
            output.write_bytes(body)
        except OSError as error:
            raise click.UsageError(f"--output: {output} cannot be written: {error.strerror}.") from None
    elif form == "jwk":
        print_json(body)
    elif form == "pem":
        click.echo(body.decode(), nl=False)
    else:
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()


VERSION_COLUMNS = ("NUMBER", "STATE", "ALG", "SINCE", "ORIGIN", "KID", "NOTES")


def version_row(v: wire.Version) -> tuple[object, ...]:
    """The row of a version in a table with the columns `VERSION_COLUMNS`."""
    origin = f"{v.origin}: {', '.join(v.weaknesses)}" if v.weaknesses else v.origin
    return v.number, v.state, v.alg, when(_since(v)), origin, v.kid or "-", _notes(v)


EXTERNAL_COLUMNS = ("EXTERNAL KEY", "ALG", "ADDED", "ADDED BY", "REMOVE AT")


def external_row(e: wire.ExternalKey) -> tuple[object, ...]:
    """The row of an external key in a table with the columns `EXTERNAL_COLUMNS`."""
    return e.kid, e.alg, when(e.created_at), e.created_by or "-", when(e.remove_at)


def print_external_keys(found: wire.KeySet | wire.Safety) -> None:
    """Print which foreign keys verifiers of the key set trust too, and how many they trusted before."""
    if found.external_keys:
        click.echo()
        table(EXTERNAL_COLUMNS, map(external_row, found.external_keys))
        note("Warning: the owner of an external key can sign for the key set's issuer.")
    if found.external_keys_removed:
        note(
            f"{found.external_keys_removed} external key(s) were published before and removed: "
            "kms-jwks external-key list KEY_SET"
        )


def _notes(found: wire.Version) -> str:
    """What every list shows of a version: overridden invariants, an emergency, why its key pair is not made yet."""
    notes = [f"{breach.invariant} overridden" for breach in found.breaches]
    if found.emergency:
        notes.append("emergency")
    if found.trouble is not None:
        notes.append(found.trouble)
    return "; ".join(notes)


def _since(found: wire.Version) -> datetime | None:
    """When the version entered its state."""
    entered = {
        "creating": found.created_at,
        "published": found.published_at,
        "active": found.activated_at,
        "retiring": found.deactivated_at,
        "retired": found.retired_at,
        "revoked": found.revoked_at,
        "destroyed": found.destroyed_at,
    }
    return entered.get(found.state)


def _print_version(found: wire.Version) -> None:
    details(
        ("number", found.number),
        ("kid", found.kid or "-"),
        ("state", found.state),
        ("alg", found.alg),
        ("backend", found.backend),
        ("origin", found.origin),
        ("created", when(found.created_at)),
        ("published", when(found.published_at)),
        ("visible since", when(found.visible_since)),
        ("usable at", when(found.usable_at)),
        ("activated", when(found.activated_at)),
        ("deactivated", when(found.deactivated_at)),
        ("retired", when(found.retired_at)),
        ("revoked", when(found.revoked_at) + (f" ({found.revoke_reason})" if found.revoke_reason else "")),
        ("destroy at", when(found.destroy_at)),
        ("destroyed", when(found.destroyed_at)),
        *((("absence", msgspec.json.encode(found.absence).decode()),) if found.absence is not None else ()),
    )
    if found.weaknesses:
        note(f"Warning: adopted although {', '.join(found.weaknesses)}.")
    for breach in found.breaches:
        by = f" by {breach.who}" if breach.who else ""
        note(f"Warning: {breach.invariant} was overridden at {when(breach.at)}{by}: {breach.reason}")
    if found.emergency:
        note("It took over in an emergency: a second rotation follows for verifiers that cache for ever.")
