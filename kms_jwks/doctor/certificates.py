"""Checks of certificates: the service's own, those that the database connection uses, and the command line's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509

from kms_jwks.config import Settings
from kms_jwks.doctor.checks import Check, State
from kms_jwks.model import DAY, SECOND, Instant, ends_soon
from kms_jwks.times import format_instant, to_instant


def certificates(settings: Settings, now: Instant, environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Check each certificate file that this node is told to use: readable, and not about to expire."""
    query = parse_qs(urlsplit(settings.database_url).query)
    named = {
        "TLS certificate": str(settings.tls_cert or ""),
        "database's CA certificate": query.get("sslrootcert", [""])[0],
        "database client certificate": query.get("sslcert", [""])[0],
        "command line's CA certificate": environment.get("KMS_JWKS_CACERT", ""),
        "command line's client certificate": environment.get("KMS_JWKS_CLIENT_CERT", ""),
    }
    for name, file in named.items():
        # libpq takes the word for the system's certificates.
        if file and file != "system":
            yield check_certificate(name, Path(file), now)


def check_certificate(name: str, file: Path, now: Instant) -> Check:
    """A file of certificates (PEM): a chain ends with its first certificate, a bundle of trusted CAs with its last."""
    try:
        found = x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:
        return Check(name, State.FAILURE, f"{file}: {error.strerror}", f"Let this user ({os.geteuid()}) read it.")
    except ValueError:
        return Check(name, State.FAILURE, f"{file} holds no certificate in PEM", "Put the certificate chain there.")
    which = max if "CA" in name else min
    chosen = which(found, key=lambda certificate: certificate.not_valid_after_utc)
    made, end = to_instant(chosen.not_valid_before_utc), to_instant(chosen.not_valid_after_utc)
    if end <= now:
        return Check(name, State.FAILURE, f"{file} expired at {format_instant(end)}", "Renew it.")
    words = f"{file} is valid until {format_instant(end)}"
    if made > now:
        return Check(name, State.FAILURE, f"{file} is valid only from {format_instant(made)} on", "Correct the clock.")
    if ends_soon(made, end, now):
        days = (end - now) // (DAY * SECOND)
        return Check(name, State.WARNING, f"{words}, for {days} more days", "Renew it.")
    return Check(name, State.OK, words)
