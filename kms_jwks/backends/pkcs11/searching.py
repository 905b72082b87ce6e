"""C_FindObjects without python-pkcs11's noise: a search that could not begin is ended there and then."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pkcs11 import Object, PKCS11Error, Session, _pkcs11

if TYPE_CHECKING:
    from kms_jwks.backends.pkcs11.keys import Template

_BATCH = 10


class _Search(_pkcs11.SearchIter):  # type: ignore[name-defined,misc]  # its stubs leave it out
    """python-pkcs11's own leaves the end to its destructor, which asks the module once more and prints the answer."""

    def __enter__(self) -> Any:
        try:
            return super().__enter__()
        except PKCS11Error:
            with suppress(PKCS11Error):
                self._finalize()
            raise


def searched(session: Session, template: Template) -> list[Object]:
    """The objects that fit; to be called inside. Raises PKCS11Error."""
    with _Search(session, template, _BATCH) as batches:
        return [found for batch in batches for found in batch]
