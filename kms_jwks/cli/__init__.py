"""The command line: on the node itself, and as a client of the API.

Exit codes: 0 done · 1 refused (conflict, not found, not valid) · 2 used wrongly, settings included · 3 not
authenticated or not allowed · 4 not reachable, or not now: try again.
"""

import contextlib
import sys


def main() -> None:
    """The console script `kms-jwks`."""
    from kms_jwks.cli.app import cli

    for stream in (sys.stdout, sys.stderr):
        # On a terminal that cannot show a character the rest of the line is still worth reading.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    cli(prog_name="kms-jwks")
