"""`kms-jwks node`: the registered workers, and the acting custodian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import confirmed
from kms_jwks.cli.output import details, note, print_line, when, yes

if TYPE_CHECKING:
    from kms_jwks import wire
    from kms_jwks.cli.api import Api


@click.group()
def node() -> None:
    """Nodes: their workers, and the one custodian of the installation."""


@api_command(node, "list")
def list_nodes(api: Api) -> None:
    """List the registered workers: how far behind each is, how long it may sign, the state of its modules."""
    api.show_list(
        api.client.nodes(),
        ("NODE", "PID", "LIVE", "EPOCH", "LAG", "LEASE LEFT", "BACKENDS", "HEARTBEAT", "WORKER"),
        lambda n: (
            n.node,
            n.pid,
            yes(n.live),
            "-" if n.epoch is None else n.epoch,
            "-" if n.lag is None else n.lag,
            f"{n.lease_left} of {n.lease} s",
            ", ".join(f"{name}: {state}" for name, state in sorted(n.backends.items())) or "-",
            when(n.heartbeat_at),
            n.worker,
        ),
    )
    if not api.json:
        click.echo()
        print_line(_sentence(api.client.custodian()))


@api_command(node, "custodian")
def show_custodian(api: Api) -> None:
    """Show which custodian makes, rotates and destroys keys, and since when."""
    api.show(api.client.custodian(), _print_custodian)


def _print_custodian(found: wire.Custodian) -> None:
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
        note(f"Warning: the custodian is halted: {found.halted}")


@api_command(node, "forget")
@click.argument("worker")
@confirmed("Forget worker {worker}? Activations will no longer wait for it.")
def forget_worker(api: Api, worker: str) -> None:
    """Stop counting a worker that will not come back, such as one of a node that is gone."""
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
