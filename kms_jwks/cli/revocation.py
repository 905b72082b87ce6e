"""`kms-jwks revoke`, and how a revocation is shown: what it did, and which verifiers may go on trusting the key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from msgspec import UNSET

from kms_jwks import wire
from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import confirm, dry_run_option, yes_option
from kms_jwks.cli.output import details, duration, note, print_line, table, when

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from kms_jwks.cli.api import Api


@api_command(None, "revoke")
@click.option("--backend", metavar="NAME", help="Every version that has its key pair in this module.")
@click.option("--key-set", metavar="NAME", help="Every version of this key set.")
@click.option("--reason", required=True, help="Why; stays on the versions.")
@click.option(
    "--disable-keys/--no-disable-keys",
    default=None,
    help="Make no successors: disable the keys. [default: with --backend, where nothing else could make them]",
)
@click.option("--external-keys", is_flag=True, help="With --key-set: withdraw its external keys too, for ever.")
@dry_run_option
@yes_option
def revoke(
    api: Api,
    backend: str | None,
    key_set: str | None,
    reason: str,
    disable_keys: bool | None,
    external_keys: bool,
    dry_run: bool,
    sure: bool,
) -> None:
    """Emergency: revoke every version of a module or a key set at once, all or none.

    To revoke one version: `kms-jwks version revoke`. The caller needs the permission for every key that is touched.
    External keys that are a revoked key are withdrawn with it.
    """
    if (backend is None) == (key_set is None):
        raise click.UsageError("Give exactly one of --backend and --key-set.")
    if external_keys and key_set is None:
        raise click.UsageError("--external-keys goes with --key-set.")
    if not dry_run:
        what = f"in backend {backend}" if backend is not None else f"of key set {key_set}"
        more = " and withdraw its external keys" if external_keys else ""
        confirm(f"Revoke every version {what}{more}? That cannot be undone.", sure=sure)
    done = api.client.revoke_everything(
        wire.RevocationCreate(
            reason=reason,
            backend=UNSET if backend is None else backend,
            key_set=UNSET if key_set is None else key_set,
            disable_keys=UNSET if disable_keys is None else disable_keys,
            external_keys=external_keys,
            dry_run=dry_run,
        )
    )
    api.show(done, _print_revocation)
    _warn(done.unconfirmed)


def show_revoked(api: Api, done: wire.Revoked) -> None:
    """Print the revocation of one version, and warn of workers that have not confirmed it."""
    api.show(done, _print_revoked)
    _warn(done.unconfirmed)


def _print_revoked(done: wire.Revoked) -> None:
    verb = "was revoked before" if not done.changed else "would be revoked" if done.dry_run else "is revoked"
    print_line(f"Version {done.version.number} ({done.version.kid or 'without a key pair'}) {verb}.")
    if done.successor is not None:
        signs = "would sign" if done.dry_run else "signs now"
        seen = done.successor_visible_for
        age = "not every worker publishes it yet" if seen is None else f"verifiers could fetch it for {duration(seen)}"
        print_line(f"Version {done.successor.number} ({done.successor.kid}) {signs}; {age}.")
        for breach in done.successor.breaches:
            note(f"Warning: {breach.invariant} is overridden: {breach.reason}")
    if done.without_successor:
        note("Warning: there is no standby; the key does not sign until its next version is active.")
    _print_other_keys(done.external_keys, done.same_key, dry_run=done.dry_run)
    if done.exposure is not None:
        _print_exposure(done.exposure)


def _print_other_keys(
    external_keys: Iterable[wire.AffectedExternalKey], same_key: Iterable[wire.SameKey], *, dry_run: bool
) -> None:
    """External keys that were withdrawn or stay published, and where else a revoked key is in use."""
    for external in external_keys:
        which = f"External key {external.kid} of {external.key_set}"
        if external.withdrawn:
            why = f", which is the key of {external.same_key_as}," if external.same_key_as is not None else ""
            print_line(f"{which}{why} {'would be' if dry_run else 'is'} withdrawn for ever.")
        else:
            stays = f"{'would stay' if dry_run else 'stays'} published until {when(external.remove_at)}"
            note(f"Warning: {which} {stays}; --external-keys withdraws it too.")
    for place in same_key:
        kind = "external key" if place.key is None else f"key {place.key}, version"
        command = "external-key remove" if place.key is None else "version revoke"
        step = f"`kms-jwks {command}` there as well"
        note(
            f"Warning: key set {place.key_set} uses the key of {place.same_key_as} too ({kind} {place.kid}, "
            f"{place.state}), and was not touched: {step}."
        )


def _print_exposure(found: wire.Exposure) -> None:
    """Which verifiers may go on trusting a revoked kid, and until when."""
    click.echo()
    details(
        ("out of the JWKS by", when(found.withdrawn_at)),
        ("trusted until", f"{when(found.trusted_until)} at the latest, by verifiers that have a limit"),
        ("without a limit", ", ".join(found.unbounded) or "-"),
        ("second rotation", f"not before {when(found.second_rotation_not_before)}")
        if found.second_rotation_not_before is not None
        else ("second rotation", _no_second_rotation(found)),
    )
    click.echo()
    table(
        ("VERIFIER", "TRUSTS UNTIL", "BEHIND A CACHE", "ENDED BY", "2ND ROTATION", "SUCCESSOR'S KEY", "FIGURES OF"),
        (
            (
                v.verifier,
                _limit(v.trusts_until, v.ends),
                _limit(v.trusts_until_behind_cache, v.ends),
                _ENDS.get(v.ends, v.ends),
                _CURED[v.cured_by_second_rotation],
                _learned(v),
                v.source,
            )
            for v in found.verifiers
        ),
    )


def _no_second_rotation(found: wire.Exposure) -> str:
    if all(v.learns == "nothing" for v in found.verifiers):
        return "none before the key has a successor"
    return "not needed: no verifier holds the successor's kid"


def _learned(verifier: wire.ExposedVerifier) -> str:
    if verifier.learns_by is not None:
        return f"fetched by {when(verifier.learns_by)}"
    is_application = verifier.ends == "application" and verifier.learns == "unknown"
    return "the application" if is_application else _LEARNS.get(verifier.learns, verifier.learns)


_ENDS = {
    "expiry": "its copy expires",
    "successor": "successor's kid, restart",
    "second-rotation": "second rotation, restart",
    "restart": "restart",
    "application": "the application",
    "unknown": "not documented",
}
_CURED = {True: "ends it", False: "no effect", None: "not known"}
_LEARNS = {
    "knows": "held",
    "fetches": "held, or fetched at its kid",
    "unknown": "not documented",
    "nothing": "-",
}


def _limit(until: datetime | None, ends: str) -> str:
    if until is not None:
        return when(until)
    return "not known" if ends in ("unknown", "application") else "no limit"


def _print_revocation(done: wire.Revocation) -> None:
    verb = "would be revoked" if done.dry_run else "revoked"
    changed = sum(v.changed for v in done.versions)
    print_line(f"{changed} {'version' if changed == 1 else 'versions'} {verb}, {len(done.versions) - changed} before.")
    table(
        ("KEY SET", "KEY", "NUMBER", "KID", "SUCCESSOR"),
        (
            (v.key_set, v.key, v.version.number, v.version.kid or "-", v.successor.kid if v.successor else "-")
            for v in done.versions
        ),
    )
    for place in done.disabled:
        note(
            f"Key {place.key_set} {place.key} {'would be' if done.dry_run else 'is'} disabled: `key enable` undoes it."
        )
    for place in done.without_successor:
        note(f"Warning: key {place.key_set} {place.key} does not sign until its next version is active.")
    _print_other_keys(done.external_keys, done.same_key, dry_run=done.dry_run)
    for each in done.exposures:
        click.echo()
        print_line(each.key_set)
        _print_exposure(each.exposure)


def _warn(workers: Iterable[wire.UnconfirmedWorker]) -> None:
    for worker in workers:
        note(
            f"Warning: worker {worker.worker} on node {worker.node} has not confirmed and may publish the old JWKS; "
            f"last heard of at {when(worker.heartbeat_at)}."
        )
