"""Signs tokens with keys that never leave their module, and publishes the JWKS that verifies them."""

__version__ = "0.1.0"
