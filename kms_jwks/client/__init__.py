"""The Python client of the service, for token issuers, administrators and the command line.

::

    with Client("https://keys.example.com", token_file("/run/secrets/signer.token")) as client:
        token = client.sign_jwt("orders", "default", {"sub": "alice", "aud": "shop"}).token

Answers are structs of `kms_jwks.wire`. A problem raises the class of `kms_jwks.errors` with its code.
"""

from kms_jwks.client.client import DEFAULT_ADDRESS, Client, token_file
from kms_jwks.client.transport import Reply

__all__ = ["DEFAULT_ADDRESS", "Client", "Reply", "token_file"]
