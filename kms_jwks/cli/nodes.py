"""`kms-jwks node`: the registered workers, and the acting custodian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kms_jwks.cli.api import api_command
from kms_jwks.cli.options import confirmed
from kms_jwks.cli.output import details, legend, note, print_line, table, when, yes

if TYPE_CHECKING:
    from kms_jwks import wire
    from kms_jwks.cli.api import Api


@click.group()
def node() -> None:
    """Nodes: their workers, and the one custodian of the installation."""


@api_command(node, "list")
@click.option("--node", metavar="NAME", help="Only the workers of this node.")
@click.option("--state", type=click.Choice(["live", "silent"]), help="Only workers that report, or that do not.")
def list_nodes(api: Api, node: str | None, state: str | None) -> None:
    """List the registered workers: how far behind each is, how long it may sign, the state of its modules."""
    workers = api.client.nodes(node=node, state=state)
    if api.json:
        api.show_list(workers, (), lambda _: ())
        return
    found = list(workers)
    table(
        ("NODE", "PID", "LIVE", "EPOCH", "LAG", "LEASE LEFT", "HEARTBEAT"),
        (
            (
                n.node,
                n.pid,
                yes(n.live),
                "-" if n.epoch is None else n.epoch,
                "-" if n.lag is None else n.lag,
                f"{n.lease_left} of {n.lease} s",
                when(n.heartbeat_at),
            )
            for n in found
        ),
    )
    if found:
        click.echo()
        table(("WORKER", "NODE", "PID", "BACKENDS"), ((n.worker, n.node, n.pid, _backends(n)) for n in found))
    click.echo()
    print_line(_sentence(api.client.custodian()))
    legend("LIVE", "EPOCH", "LAG", "LEASE LEFT", "HEARTBEAT", "term")


def _backends(found: wire.Node) -> str:
    return ", ".join(f"{name}: {state}" for name, state in sorted(found.backends.items())) or "-"


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
