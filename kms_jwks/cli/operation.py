"""`kms-jwks node`: the registered workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kms_jwks.cli.api import api_command, confirm, yes_option
from kms_jwks.cli.text import table, when, yes

if TYPE_CHECKING:
    from kms_jwks.cli.api import Api


@click.group()
def node() -> None:
    """Nodes and their workers."""


@api_command(node, "list")
def list_nodes(api: Api) -> None:
    """List the registered workers, and how far behind each one is."""
    api.show_list(
        api.client.nodes(),
        lambda items: table(
            ("NODE", "PID", "LIVE", "EPOCH", "LAG", "HEARTBEAT", "WORKER"),
            ((n.node, n.pid, yes(n.live), _or(n.epoch), _or(n.lag), when(n.heartbeat_at), n.worker) for n in items),
        ),
    )


@api_command(node, "forget")
@click.argument("worker")
@yes_option
def forget_worker(api: Api, worker: str, sure: bool) -> None:
    """Stop counting a worker that will not come back, such as one of a node that is gone."""
    confirm(f"Forget worker {worker}? Activations will no longer wait for it.", sure=sure)
    api.client.forget_worker(worker)
    api.done(f"Worker {worker} is forgotten.")


def _or(value: int | None) -> str:
    return "-" if value is None else str(value)
