"""Credentials of callers, as a request carries them and before they are looked up in the registry.

The only kind is the API token. Client certificates and OIDC tokens are to become further kinds of `Credential`.
"""

from __future__ import annotations

from typing import TypeAlias

from kms_jwks.authn.tokens import NewToken, TokenCredential, credential_from_header, new_token, parse

Credential: TypeAlias = TokenCredential
"""A credential that a request carried."""

__all__ = ["Credential", "NewToken", "TokenCredential", "credential_from_header", "new_token", "parse"]
