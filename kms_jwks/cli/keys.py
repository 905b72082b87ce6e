"""`kms-jwks key`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
import msgspec

from kms_jwks import wire
from kms_jwks.algorithms import ALGORITHMS, DEFAULT_RSA_BITS, RSA_BITS
from kms_jwks.cli.api import api_command
from kms_jwks.cli.bars import key_bars, width
from kms_jwks.cli.options import (
    DURATION,
    INSTANT,
    adopt_options,
    break_glass_options,
    confirmed,
    given,
    group_adopt,
    key_arguments,
    key_set_argument,
)
from kms_jwks.cli.output import TERMS, details, duration, legend, note, table, when, yes
from kms_jwks.cli.versions import VERSION_COLUMNS, version_row
from kms_jwks.model import Policy, SigningProfile, Typ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kms_jwks.cli.api import Api

F = TypeVar("F", bound="Callable[..., Any]")

_DURATIONS = {
    "rotate_every": "How often a new version takes over.",
    "publish_lead": "How long verifiers can fetch a version before it signs.",
    "max_token_ttl": "The longest life of a token.",
    "clock_skew": "The most by which the clocks of issuers, verifiers and the service differ.",
    "handover": "How long a pinned kid signs on after a rotation.",
    "destroy_after": "How long a retired version stays in the module.",
    "rotate_jitter": "How much earlier a rotation may come, by chance.",
}
"""The durations of a policy, and their help."""
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
    policy, profile = Policy(), SigningProfile()
    for name, text in reversed(_DURATIONS.items()):
        shown = f"{text} [default: {duration(getattr(policy, name))}]"
        function = click.option(f"--{name.replace('_', '-')}", name, type=DURATION, help=shown)(function)
    lifetime = click.option(
        "--default-lifetime",
        type=DURATION,
        help=f"Life of a token whose caller names none. [default: {duration(profile.default_lifetime)}]",
    )
    typ = click.option(
        "--typ", type=click.Choice(get_args(Typ)), help=f"The typ of its tokens. [default: {profile.typ}]"
    )
    return typ(lifetime(function))


def _group_policy(fields: dict[str, Any]) -> dict[str, Any]:
    """The options with `policy` and `profile` gathered, as the API has them. Raises UsageError."""
    if fields.pop("no_hold", False):
        if "hold_until" in fields:
            raise click.UsageError("--hold-until cannot be combined with --no-hold.")
        fields["hold_until"] = None
    profile = {name: fields.pop(name) for name in ("typ", "default_lifetime") if name in fields}
    policy = {name: fields.pop(name) for name in (*_DURATIONS, *_CALENDAR, _UNSAFE) if name in fields}
    return {**fields, **({"policy": policy} if policy else {}), **({"profile": profile} if profile else {})}


@api_command(key, "list")
@key_set_argument
@click.option("--state", type=click.Choice(["enabled", "disabled"]), help="Only keys that may sign, or may not.")
@click.option("--backend", metavar="NAME", help="Only keys whose versions are made in this module.")
def list_keys(api: Api, key_set: str, state: str | None, backend: str | None) -> None:
    """List the keys of a key set."""
    api.show_list(
        api.client.keys(key_set, state=state, backend=backend),
        ("NAME", "ALG", "BACKEND", "ENABLED", "VERSIONS", "ACTIVE KID", "WARNINGS"),
        lambda k: (
            k.name,
            k.alg,
            k.backend,
            yes(k.enabled) if k.retired_at is None else "retired",
            len(k.versions),
            k.active_kid or "-",
            "; ".join(k.warnings) or "-",
        ),
    )


@api_command(key, "show")
@key_arguments
def show_key(api: Api, key_set: str, key: str) -> None:
    """Show a key with its policy and versions."""
    api.show(api.client.key(key_set, key), _print_key)


@api_command(key, "timeline")
@key_arguments
def key_timeline(api: Api, key_set: str, key: str) -> None:
    """Show a key's life as a bar of time: what was, what is, what happens next and when."""
    api.show(api.client.timeline(key_set, key), _print_timeline)


def _print_timeline(found: wire.Timeline) -> None:
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
        ((when(s.due), s.kind, s.number or "new", _reason(s)) for s in found.steps),
    )
    texts = [*(c.invariant for v in found.versions for c in v.checks), *map(_reason, found.steps)]
    legend(*(term for term in TERMS if re.search(rf"\b{term}\b", " ".join(texts))))
    if not found.enabled:
        note("The key is disabled or retired: its versions are only withdrawn and destroyed.")


def _reason(step: wire.TimelineStep) -> str:
    overrides = f" (overrides {step.breach})" if step.breach else ""
    return step.reason + overrides + (f"; waits: {step.waits_for}" if step.waits_for else "")


def _invariants(checks: Iterable[wire.SafetyCheck]) -> str:
    return ", ".join(f"{c.invariant} {'holds' if c.holds else f'not before {when(c.right)}'}" for c in checks) or "-"


@api_command(key, "create")
@key_set_argument
@click.argument("name")
@click.option("--alg", required=True, help=f"{', '.join(ALGORITHMS)}.")
@click.option("--rsa-bits", type=int, help=f"{', '.join(map(str, RSA_BITS))}. [default: {DEFAULT_RSA_BITS}]")
@click.option("--backend", metavar="NAME", help="The module that makes it. [default: the service's]")
@adopt_options
@_policy_options
def create_key(api: Api, key_set: str, **fields: Any) -> None:
    """Create a key NAME in a key set.

    In a set that verifiers know already it signs after the publish lead. With --adopt its first version is a key pair
    that the module holds already. A key set holds at most 4 keys.
    """
    request = wire.convert(_group_policy(group_adopt(given(fields))), wire.KeyCreate)
    api.show(api.client.create_key(key_set, request), _print_key)


@api_command(key, "update")
@key_arguments
@_policy_options
@click.option("--revision", type=int, help="Change it only if it is still at this revision. [default: as it is now]")
def update_key(api: Api, key_set: str, key: str, revision: int | None, **fields: Any) -> None:
    """Change a key's policy or profile."""
    changes = _group_policy(given(fields))
    if not changes:
        raise click.UsageError("Nothing to change: give at least one option.")
    request = wire.convert(changes, wire.KeyPatch)
    at = api.client.key(key_set, key).revision if revision is None else revision
    api.show(api.client.update_key(key_set, key, request, revision=at), _print_key)


@api_command(key, "rotate")
@key_arguments
@click.option("--expected-kid", metavar="KID", help="Rotate only while this kid is active: safe to repeat.")
@break_glass_options
def rotate_key(api: Api, key_set: str, key: str, expected_kid: str | None, break_glass: str | None) -> None:
    """Let the standby version take over now.

    Refused, with the earliest time, while verifiers could not have fetched it for long enough.
    """
    api.show(api.client.rotate(key_set, key, expected_kid=expected_kid, break_glass=break_glass), _print_key)


@api_command(key, "disable")
@key_arguments
def disable_key(api: Api, key_set: str, key: str) -> None:
    """Stop a key from signing, on every worker; its versions stay published."""
    api.show(api.client.disable_key(key_set, key), _print_key)


@api_command(key, "enable")
@key_arguments
def enable_key(api: Api, key_set: str, key: str) -> None:
    """Let a disabled key sign again."""
    api.show(api.client.enable_key(key_set, key), _print_key)


@api_command(key, "retire")
@key_arguments
@confirmed("Retire {key} in {key_set}, for ever? It signs no longer, and its key pairs are destroyed on their dates.")
def retire_key(api: Api, key_set: str, key: str) -> None:
    """End a key: it signs no longer, and leaves the JWKS when no token it signed can be alive."""
    api.show(api.client.retire_key(key_set, key), _print_key)


@api_command(key, "delete")
@key_arguments
@confirmed("Delete {key} in {key_set}?")
def delete_key(api: Api, key_set: str, key: str) -> None:
    """Delete a key that has never published anything; its name is free again."""
    api.client.delete_key(key_set, key)
    api.done(f"{key} is deleted.")


@api_command(key, "active")
@key_arguments
def active_version(api: Api, key_set: str, key: str) -> None:
    """Show which version signs now, and which one comes next."""
    api.show(
        api.client.active(key_set, key),
        lambda found: details(
            ("kid", found.kid),
            ("alg", found.alg),
            ("next kid", found.next.kid if found.next else "-"),
            ("not before", when(found.next.not_before) if found.next else "-"),
            ("refresh after", when(found.refresh_after)),
            ("public key", msgspec.json.encode(found.public_jwk).decode()),
        ),
    )


def _print_key(found: wire.Key) -> None:
    details(
        ("key set", found.key_set),
        ("name", found.name),
        ("alg", found.alg if found.rsa_bits is None else f"{found.alg} ({found.rsa_bits} bits)"),
        ("backend", found.backend),
        ("enabled", yes(found.enabled)),
        *((("retired", when(found.retired_at)),) if found.retired_at else ()),
        ("active kid", found.active_kid or "-"),
        *((name.replace("_", " "), duration(getattr(found.policy, name))) for name in _DURATIONS),
        ("rotate window", found.policy.rotate_window or "any time"),
        ("hold until", when(found.policy.hold_until)),
        ("typ", found.profile.typ),
        ("default lifetime", duration(found.profile.default_lifetime)),
        ("created", when(found.created_at)),
        ("revision", found.revision),
    )
    click.echo()
    table(VERSION_COLUMNS, map(version_row, found.versions))
    for warning in found.warnings:
        note(f"Warning: {warning}")
