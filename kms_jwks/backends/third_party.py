"""Backends of other packages: found by entry point, made when the process starts, their errors translated.

A package that cannot be found, loaded or used raises a ConfigurationError that names it; no other backend replaces it.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from kms_jwks.backends.base import Backend, StoredKey
from kms_jwks.config import BACKEND_TYPES
from kms_jwks.errors import BackendError, BackendRefused, ConfigurationError

if TYPE_CHECKING:
    from kms_jwks.config import ThirdPartyBackend

log = structlog.get_logger(__name__)

GROUP: Final = "kms_jwks.backends"
"""The entry-point group: the name of an entry is a `type` of the configuration, its object a `BackendFactory`."""

_MEMBERS: Final = tuple(
    sorted({name for name in {**vars(Backend), **Backend.__annotations__} if not name.startswith("_")})
)

_ABSENT: Final = object()


def make_third_party(name: str, options: ThirdPartyBackend, state_dir: Path, management: bool) -> Backend:
    """The backend that another package makes from a configuration section. Raises ConfigurationError."""
    kind = options.type
    place = f"backends.{name}"
    entry = _entry_point(place, kind)
    description = f"type {kind!r} of {_package(entry)}"
    try:
        factory = entry.load()
    except ImportError as error:
        raise ConfigurationError(f"{place}: {description} cannot be loaded: {error}.") from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{place}: {description} cannot be loaded ({type(error).__name__}).") from error
    try:
        backend = factory(
            name, options.options, state_dir, dict(options.management) if management and options.management else None
        )
        missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error.detail}", next_step=error.next_step) from error
    except (Exception, SystemExit) as error:
        # Its message may repeat an option, and an option may be a secret.
        raise ConfigurationError(f"{place}: {description} cannot be made ({type(error).__name__}).") from error
    if missing:
        raise ConfigurationError(f"{place}: {description} is no backend: it has no {', '.join(missing)}.")
    return cast("Backend", ErrorTranslatingBackend(backend, name, kind, sign_in_place=options.sign_in_place))


def _entry_point(place: str, kind: str) -> EntryPoint:
    if kind in BACKEND_TYPES:
        raise ConfigurationError(f"{place}.type: {kind!r} comes with kms-jwks alone, and this one does not have it.")
    # One package may be found twice, on two entries of sys.path.
    found = {entry.value + _package(entry): entry for entry in entry_points(group=GROUP, name=kind)}
    if not found:
        known = sorted(BACKEND_TYPES | {entry.name for entry in entry_points(group=GROUP)})
        raise ConfigurationError(
            f"{place}.type: no installed package offers {kind!r}; there are {', '.join(known)}.",
            next_step=f"Install the package with the entry point {kind!r} of the group {GROUP}, or correct the type.",
        )
    if len(found) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in found.values()))
        raise ConfigurationError(
            f"{place}.type: {kind!r} is claimed by {packages}.", next_step="Uninstall all but one."
        )
    return next(iter(found.values()))


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


class ErrorTranslatingBackend:
    """A third party's backend whose exceptions other than BackendError become BackendRefused.

    Name, kind and `sign_in_place` are those of the configuration; the rest of the contract is the backend's own.
    """

    def __init__(self, backend: Any, name: str, kind: str, *, sign_in_place: bool) -> None:
        self._backend = backend
        self.name = name
        self.kind = kind
        self.sign_in_place = sign_in_place

    def __getattr__(self, member: str) -> Any:
        found = self._member(member)
        if found is _ABSENT:
            raise AttributeError(member)
        return self._translating(member, found) if callable(found) else found

    def bind(self, *arguments: Any) -> None:
        """See `Backend.bind`: raises nothing."""
        self._call_quietly("bind", *arguments)

    def distrust(self, *arguments: Any) -> None:
        """See `Backend.distrust`: raises nothing."""
        self._call_quietly("distrust", *arguments)

    def close(self) -> None:
        """See `Backend.close`. An error does not delay the end of the process."""
        self._call_quietly("close")

    def sign(self, *arguments: Any) -> bytes:
        """See `Backend.sign`."""
        signature = self._translating("sign", self._member("sign"))(*arguments)
        if not isinstance(signature, bytes):
            raise BackendRefused(f"Backend {self.name!r} gave a {type(signature).__name__} for a signature.")
        return signature

    def list_keys(self, *arguments: Any, **more: Any) -> list[StoredKey]:
        """See `Backend.list_keys`. The list is made here, so that an error of a generator is translated too."""
        call = self._member("list_keys")
        listed: list[StoredKey] = self._translating("list_keys", lambda: list(call(*arguments, **more)))()
        return listed

    def _member(self, name: str) -> Any:
        """A member of the backend; `_ABSENT` where it is missing and no part of the contract. A property may raise."""
        default = () if name in _MEMBERS else (_ABSENT,)
        return self._translating(name, lambda: getattr(self._backend, name, *default))()

    def _translating(self, member: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def translating(*arguments: Any, **more: Any) -> Any:
            try:
                return call(*arguments, **more)
            except BackendError:
                raise
            except (Exception, SystemExit) as error:
                # Its text may hold secrets. Type and place are enough for the author of the backend.
                place = traceback.extract_tb(error.__traceback__)[-1]
                log.error(
                    "foreign_error",
                    backend=self.name,
                    call=member,
                    error=type(error).__name__,
                    place=f"{place.filename}:{place.lineno}",
                )
                raise BackendRefused(
                    f"Backend {self.name!r} failed in a way it must not ({type(error).__name__} in {member}).",
                    next_step=f"Report it to the author of the backend of type {self.kind!r}.",
                ) from error

        return translating

    def _call_quietly(self, member: str, *arguments: Any) -> None:
        try:
            self._translating(member, self._member(member))(*arguments)
        except BackendError as error:
            log.warning("foreign_error_ignored", backend=self.name, call=member, error=error.detail)
