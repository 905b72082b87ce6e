"""What is known of one call while it passes through a use case."""

from __future__ import annotations

from dataclasses import dataclass, field

from kms_jwks.access import Caller
from kms_jwks.authn import Credential


@dataclass(slots=True, eq=False)
class RequestContext:
    """One call: what the server knew when it came in, and what the use case found out about it.

    `authorization` is the Authorization header and `peer_certificate` the client certificate in DER; neither is shown
    or logged. `peer` is the address of the connection's other end, `route` the path template that matched.
    """

    authorization: str | None = field(default=None, repr=False)
    peer_certificate: bytes | None = field(default=None, repr=False)
    request_id: str = ""
    peer: str | None = None
    route: str | None = None
    idempotency_key: str | None = None
    """The Idempotency-Key of a creation, without its quotes."""
    credential: Credential | None = field(default=None, repr=False)
    """Set by the guard: what the Authorization header holds, parsed once."""
    caller: Caller | None = None
    """Set by the guard once the credentials are known, also where the call is refused for missing rights."""
    backend: str | None = None
    """Set by the signing path before it asks a backend, so that a failure's log line names the backend."""
