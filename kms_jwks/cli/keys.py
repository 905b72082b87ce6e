"""`kms-jwks key`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from kms_jwks import wire
from kms_jwks.cli.adopting import adopt_options, adoption
from kms_jwks.cli.api import api_command, break_glass_options, glass, key_arguments, key_set_argument
from kms_jwks.cli.bars import key_bars, width
from kms_jwks.cli.text import details, duration, note, table, when, yes
from kms_jwks.cli.values import DURATION, INSTANT, given
from kms_jwks.cli.versions import version_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kms_jwks.cli.api import Api

F = TypeVar("F", bound="Callable[..., Any]")

_POLICY = {
    "rotate_every": "How often a new version takes over. [default: 90d]",
    "publish_lead": "How long verifiers can fetch a version before it signs. [default: 24h]",
    "max_token_ttl": "The longest life of a token. [default: 1h]",
    "clock_skew": "How far verifiers' clocks may be off. [default: 5m]",
    "handover": "How long a pinned kid signs on after a rotation. [default: 60s]",
    "destroy_after": "How long a retired version stays in the module. [default: 30d]",
    "rotate_jitter": "How much earlier a rotation may come, by chance. [default: 1h]",
}
_CALENDAR = ("rotate_window", "hold_until")
_UNSAFE = "allow_unsafe_publish_lead"


@click.group()
def key() -> None:
    """Keys: named, with one algorithm, a rotation policy and their versions."""


def _policy_options(function: F) -> F:
    function = click.option(
        "--allow-unsafe-publish-lead/--no-allow-unsafe-publish-lead",
        default=None,
        help="Accept a publish lead below its floor; shows in every report.",
    )(function)
    function = click.option("--no-hold", is_flag=True, default=None, help="Take --hold-until back.")(function)
    function = click.option("--hold-until", type=INSTANT, help="No planned activation before then.")(function)
    function = click.option(
        "--rotate-window",
        metavar="HOURS",
        help="When planned steps may happen, in UTC: 'mon-thu 09:00-16:00'; '' is any time. [default: '']",
    )(function)
    for name, text in reversed(_POLICY.items()):
        function = click.option(f"--{name.replace('_', '-')}", name, type=DURATION, help=text)(function)
    lifetime = click.option("--default-lifetime", type=DURATION, help="Life of a token whose caller says nothing.")
    typ = click.option("--typ", type=click.Choice(["JWT", "at+jwt"]), help="The typ of its tokens. [default: JWT]")
    return typ(lifetime(function))


def _grouped(fields: dict[str, Any]) -> dict[str, Any]:
    """Options as the API groups them."""
    if fields.pop("no_hold", False):
        if "hold_until" in fields:
            raise click.UsageError("--hold-until and --no-hold exclude each other.")
        fields["hold_until"] = None
    profile = {name: fields.pop(name) for name in ("typ", "default_lifetime") if name in fields}
    policy = {name: fields.pop(name) for name in (*_POLICY, *_CALENDAR, _UNSAFE) if name in fields}
    return {**fields, **({"policy": policy} if policy else {}), **({"profile": profile} if profile else {})}


@api_command(key, "list")
@key_set_argument
def list_keys(api: Api, key_set: str) -> None:
    """List the keys of a key set."""
    api.show_list(
        api.client.keys(key_set),
        lambda items: table(
            ("NAME", "ALG", "BACKEND", "ENABLED", "VERSIONS", "ACTIVE KID", "WARNINGS"),
            (
                (
                    k.name,
                    k.alg,
                    k.backend,
                    yes(k.enabled),
                    len(k.versions),
                    k.active_kid or "-",
                    "; ".join(k.warnings) or "-",
                )
                for k in items
            ),
        ),
    )


@api_command(key, "show")
@key_arguments
def show_key(api: Api, key_set: str, key: str) -> None:
    """Show a key with its policy and versions."""
    found = api.client.key(key_set, key)
    api.show(lambda: _show(found))


@api_command(key, "timeline")
@key_arguments
def key_timeline(api: Api, key_set: str, key: str) -> None:
    """Show a key's life as a bar of time: what was, what is, what happens next and when."""
    found = api.client.timeline(key_set, key)

    def render() -> None:
        click.echo("\n".join(key_bars(found, width())))
        click.echo()
        table(
            ("VERSION", "STATE", "INVARIANTS", "NEXT", "AT"),
            (
                (v.number, v.state, _invariants(v.checks), v.next, when(v.next_at))
                for v in found.versions
                if v.state != "destroyed"
            ),
        )
        click.echo()
        table(
            ("DUE", "STEP", "VERSION", "REASON"),
            ((when(s.due), s.kind, s.number or "new", _why(s)) for s in found.steps),
        )
        if not found.enabled:
            note("The key is disabled: its versions are only withdrawn and destroyed.")

    api.show(render)


def _why(step: wire.TimelineStep) -> str:
    overrides = f" (overrides {step.breach})" if step.breach else ""
    return step.reason + overrides + (f"; waits: {step.waits_for}" if step.waits_for else "")


def _invariants(checks: Iterable[wire.SafetyCheck]) -> str:
    return ", ".join(f"{c.invariant} {'holds' if c.holds else f'not before {when(c.right)}'}" for c in checks) or "-"


@api_command(key, "create")
@key_set_argument
@click.argument("name")
@click.option(
    "--alg",
    required=True,
    help="RS256/384/512, PS256/384/512, ES256/384/512, ES256K, EdDSA or Ed25519, ML-DSA-44/65/87.",
)
@click.option("--rsa-bits", type=int, help="2048, 3072 or 4096. [default: 3072]")
@click.option("--backend", metavar="NAME", help="The module that makes it. [default: the service's]")
@adopt_options
@_policy_options
def create_key(api: Api, key_set: str, **fields: Any) -> None:
    """Create a key NAME in a key set.

    In a set that verifiers know already it signs after the publish lead. With --adopt its first version is a key pair
    that the module holds already.
    """
    made = api.client.create_key(key_set, wire.convert(_grouped(adoption(given(fields))), wire.KeyCreate))
    api.show(lambda: _show(made))


@api_command(key, "update")
@key_arguments
@_policy_options
@click.option("--revision", type=int, help="Change it only if it is still at this revision. [default: as it is now]")
def update_key(api: Api, key_set: str, key: str, revision: int | None, **fields: Any) -> None:
    """Change a key's policy or profile."""
    changes = _grouped(given(fields))
    if not changes:
        raise click.UsageError("Nothing to change: give at least one option.")
    request = wire.convert(changes, wire.KeyPatch)
    at = api.client.key(key_set, key).revision if revision is None else revision
    changed = api.client.update_key(key_set, key, request, revision=at)
    api.show(lambda: _show(changed))


@api_command(key, "rotate")
@key_arguments
@click.option("--expected-kid", metavar="KID", help="Rotate only while this kid is active: safe to repeat.")
@break_glass_options
def rotate_key(
    api: Api, key_set: str, key: str, expected_kid: str | None, break_glass: bool, reason: str | None, sure: bool
) -> None:
    """Let the standby version take over now.

    Refused, with the earliest time, while verifiers could not have fetched it for long enough.
    """
    why = glass(break_glass, reason, sure=sure)
    changed = api.client.rotate(key_set, key, expected_kid=expected_kid, break_glass=why)
    api.show(lambda: _show(changed))


@api_command(key, "disable")
@key_arguments
def disable_key(api: Api, key_set: str, key: str) -> None:
    """Stop a key from signing, on every worker; its versions stay published."""
    changed = api.client.disable_key(key_set, key)
    api.show(lambda: _show(changed))


@api_command(key, "enable")
@key_arguments
def enable_key(api: Api, key_set: str, key: str) -> None:
    """Let a disabled key sign again."""
    changed = api.client.enable_key(key_set, key)
    api.show(lambda: _show(changed))


@api_command(key, "active")
@key_arguments
def active_version(api: Api, key_set: str, key: str) -> None:
    """Show which version signs now, and which one comes next."""
    found = api.client.active(key_set, key)

    def render() -> None:
        following = found.next
        details(
            ("kid", found.kid),
            ("alg", found.alg),
            ("next kid", following.kid if following else "-"),
            ("not before", when(following.not_before) if following else "-"),
            ("refresh after", when(found.refresh_after)),
            ("public key", msgspec.json.encode(found.public_jwk).decode()),
        )

    api.show(render)


def _show(found: wire.Key) -> None:
    details(
        ("key set", found.key_set),
        ("name", found.name),
        ("alg", found.alg if found.rsa_bits is None else f"{found.alg} ({found.rsa_bits} bits)"),
        ("backend", found.backend),
        ("enabled", yes(found.enabled)),
        ("active kid", found.active_kid or "-"),
        *((name.replace("_", " "), duration(getattr(found.policy, name))) for name in _POLICY),
        ("rotate window", found.policy.rotate_window or "any time"),
        ("hold until", when(found.policy.hold_until)),
        ("typ", found.profile.typ),
        ("default lifetime", duration(found.profile.default_lifetime)),
        ("created", when(found.created_at)),
        ("revision", found.revision),
    )
    click.echo()
    columns, rows = version_rows([(found.name, v) for v in found.versions], named=False)
    table(columns, rows)
    for warning in found.warnings:
        note(f"Warning: {warning}")
