"""The command line: on the node itself, and as a client of the API.

Exit codes: 0 done · 1 refused (conflict, not found, not valid) · 2 used wrongly, settings included · 3 not
authenticated or not allowed · 4 not reachable, or not now: try again.
"""


def main() -> None:
    """The console script `kms-jwks`."""
    from kms_jwks.cli.app import cli

    cli(prog_name="kms-jwks")
