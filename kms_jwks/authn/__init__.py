"""Who is calling: credentials as they come in a request, before the registry is asked about them.

Today a caller shows an API token. Client certificates and OIDC tokens join as further kinds of `Credential`.
"""

from __future__ import annotations

from typing import TypeAlias

from kms_jwks.authn.tokens import NewToken, TokenCredential, credential_from_header, matches, new_token, parse

Credential: TypeAlias = TokenCredential
"""What a request carried."""

__all__ = ["Credential", "NewToken", "TokenCredential", "credential_from_header", "matches", "new_token", "parse"]
