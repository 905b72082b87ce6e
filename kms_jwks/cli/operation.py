"""`kms-jwks node`: the registered workers, and who is the custodian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kms_jwks.cli.api import api_command, confirm, yes_option
from kms_jwks.cli.text import details, note, table, when, yes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kms_jwks import wire
    from kms_jwks.cli.api import Api


@click.group()
def node() -> None:
    """Nodes: their workers, and the one custodian of the installation."""


@api_command(node, "list")
def list_nodes(api: Api) -> None:
    """List the registered workers: how far behind each is, how long it may sign, how it finds its modules."""
    api.show_list(
        api.client.nodes(),
        lambda items: table(
            ("NODE", "PID", "LIVE", "EPOCH", "LAG", "LEASE LEFT", "BACKENDS", "HEARTBEAT", "WORKER"),
            (
                (
                    n.node,
                    n.pid,
                    yes(n.live),
                    _or(n.epoch),
                    _or(n.lag),
                    f"{n.lease_left} of {n.lease} s",
                    _states(n.backends),
                    when(n.heartbeat_at),
                    n.worker,
                )
                for n in items
            ),
        ),
    )
    if not api.json:
        found = api.client.custodian()
        click.echo()
        click.echo(_sentence(found))


@api_command(node, "custodian")
def show_custodian(api: Api) -> None:
    """Show who makes, rotates and destroys keys, and since when."""
    found = api.client.custodian()

    def render() -> None:
        details(
            ("acting", yes(found.acting)),
            ("node", found.node or "-"),
            ("term", found.term),
            ("since", when(found.since)),
            ("renewed", when(found.renewed_at)),
            ("expires", when(found.expires_at)),
            ("holder", found.holder or "-"),
        )
        if found.halted is not None:
            note(f"Warning: it is halted: {found.halted}")

    api.show(render)


@api_command(node, "forget")
@click.argument("worker")
@yes_option
def forget_worker(api: Api, worker: str, sure: bool) -> None:
    """Stop counting a worker that will not come back, such as one of a node that is gone."""
    confirm(f"Forget worker {worker}? Activations will no longer wait for it.", sure=sure)
    api.client.forget_worker(worker)
    api.done(f"Worker {worker} is forgotten.")


def _sentence(found: wire.Custodian) -> str:
    if found.node is None:
        return "No custodian has ever acted: no key is made, rotated or destroyed."
    who = f"node {found.node}, term {found.term}, since {when(found.since)}"
    if found.acting:
        return f"The custodian acts on {who}."
    if found.halted is not None:
        return f"The custodian is halted on {who}: {found.halted}."
    return f"No custodian acts since {when(found.expires_at)}; the last one was on {who}."


def _states(backends: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {state}" for name, state in sorted(backends.items())) or "-"


def _or(value: int | None) -> str:
    return "-" if value is None else str(value)
