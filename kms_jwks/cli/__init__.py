"""The command line: on the node itself, and as a client of the API.

Exit codes: 0 done · 1 refused (conflict, not found, not valid) · 2 wrong usage, wrong settings included · 3 not
authenticated or not allowed · 4 not reachable, or not possible now: try again.
"""

import contextlib
import sys


def main() -> None:
    """The console script `kms-jwks`."""
    from kms_jwks.cli.app import cli

    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show becomes `?`; the rest of the line is printed.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    cli(prog_name="kms-jwks")
