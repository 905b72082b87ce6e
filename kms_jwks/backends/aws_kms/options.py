"""What an AWS KMS backend is told: plain values, checked once. Reads nothing and opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsKmsOptions:
    """One region, seen by the credentials of one account. Raises ValueError where the parts cannot go together.

    Credentials are found by boto3's own chain (environment, profile, web identity, container, instance), with
    `profile` and `role_arn` where they are given; none is kept here.
    """

    region: str
    account: str | None = None
    """Twelve digits. Credentials of another account are refused."""
    endpoint_url: str | None = None
    profile: str | None = None
    """A profile of AWS's shared configuration files."""
    role_arn: str | None = None
    """A role to assume with the credentials that were found; its temporary ones are renewed before they expire."""
    connect_timeout: float = 1.0
    """Seconds."""
    read_timeout: float = 2.0
    """Seconds that KMS may be silent in one attempt; less where a call's deadline comes sooner."""
    connections: int = 32
    """Connections of one process that are kept open: as many as threads call at once."""
    key_policy_file: Path | None = None
    """A key policy (JSON) for the keys it makes; KMS's default policy where None."""

    def __post_init__(self) -> None:
        if self.connect_timeout <= 0 or self.read_timeout <= 0:
            raise ValueError("timeouts must be more than 0 seconds")
        if self.connections < 1:
            raise ValueError("connections must be at least 1")
