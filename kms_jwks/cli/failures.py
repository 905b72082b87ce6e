"""Errors as the command line shows them: one short message, the next step, an exit code; never a traceback."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import click

from kms_jwks import errors
from kms_jwks.cli.text import clean


class ExitCode(IntEnum):
    """What scripts can rely on."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    DENIED = 3
    LATER = 4


@dataclass
class State:
    """What a command leaves for the report of its failure."""

    json: bool = False


class Guarded(click.Group):
    """A group whose commands' errors are reported, not raised."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the domain's errors become a message and an exit code."""
        state = ctx.ensure_object(State)
        try:
            return super().invoke(ctx)
        except errors.Error as error:
            report(error, as_json=state.json)
            ctx.exit(exit_code(error))


def exit_code(error: errors.Error) -> ExitCode:
    """The exit code of an error, by its class; by its HTTP status where the class says too little."""
    match error:
        case errors.Unauthenticated() | errors.Forbidden():
            return ExitCode.DENIED
        case errors.ConfigurationError():
            return ExitCode.USAGE
        case errors.ServiceUnreachable() | errors.Unavailable() | errors.BackendTimeout():
            return ExitCode.LATER
        case errors.BackendError(retryable=True):
            return ExitCode.LATER
        case _:
            return ExitCode.LATER if error.status in (429, 502, 503, 504) else ExitCode.REFUSED


def report(error: errors.Error, *, as_json: bool) -> None:
    """Write an error to stderr: for people, or as the problem's JSON."""
    if as_json:
        click.echo(json.dumps(document(error)), err=True)
        return
    click.echo(f"Error: {clean(error.detail)}", err=True)
    if error.next_step:
        click.echo(f"Next: {clean(error.next_step)}", err=True)
    facts = [f"{name}: {_plain(value)}" for name, value in error.fields.items() if _plain(value) not in error.detail]
    if error.retry_after is not None:
        facts.append(f"retry after: {error.retry_after} s")
    if (request_id := error.request_id) is not None:
        facts.append(f"request id: {request_id}")
    if facts:
        click.echo(clean(f"({'; '.join(facts)})"), err=True)


def document(error: errors.Error) -> dict[str, object]:
    """An error as a problem document (RFC 9457); without `status` and `request_id` where no service answered."""
    found: dict[str, object] = {
        "type": f"urn:kms-jwks:problem:{error.code}",
        "title": error.title,
        "detail": error.detail,
        "next_step": error.next_step,
    }
    more = {"status": error.status, "request_id": error.request_id, "retry_after": error.retry_after}
    found |= {name: value for name, value in more.items() if value is not None}
    return found | {name: value for name, value in error.fields.items() if name not in found}


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
