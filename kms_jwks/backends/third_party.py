"""Backends of other packages: found by entry point, made at the start, and held to the contract's errors.

A package that cannot be found, loaded or used is an error at the start that names it; nothing takes its place.
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
"""The entry-point group: a name in it is a configuration's `type`, its object a `BackendFactory`."""
_MEMBERS: Final = tuple(
    sorted({name for name in {**vars(Backend), **Backend.__annotations__} if not name.startswith("_")})
)

_ABSENT: Final = object()


def make_third_party(name: str, options: ThirdPartyBackend, state_dir: Path, management: bool) -> Backend:
    """The backend that another package makes of a configuration section. Raises ConfigurationError."""
    kind = options.type
    place = f"backends.{name}"
    entry = _entry_point(place, kind)
    whose = f"type {kind!r} of {_package(entry)}"
    try:
        factory = entry.load()
    except ImportError as error:
        raise ConfigurationError(f"{place}: {whose} cannot be loaded: {error}.") from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{place}: {whose} cannot be loaded ({type(error).__name__}).") from error
    try:
        backend = factory(
            name, options.options, state_dir, dict(options.management) if management and options.management else None
        )
        missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error.detail}", next_step=error.next_step) from error
    except (Exception, SystemExit) as error:
        # Its message may repeat an option, and an option may be a secret.
        raise ConfigurationError(f"{place}: {whose} cannot be made ({type(error).__name__}).") from error
    if missing:
        raise ConfigurationError(f"{place}: {whose} is no backend: it has no {', '.join(missing)}.")
    return cast("Backend", ErrorTranslatingBackend(backend, name, kind, sign_in_place=options.sign_in_place))


def _entry_point(place: str, kind: str) -> EntryPoint:
    if kind in BACKEND_TYPES:
        raise ConfigurationError(f"{place}.type: {kind!r} comes with kms-jwks alone, and this one does not have it.")
    # One package may be found twice, along two entries of the path.
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
    """A foreign backend between the service and its calls: what it raises that is no BackendError becomes one.

    Everything else of the contract is the backend's own, but for name, kind and `sign_in_place`, which are the
    configuration's.
    """

    def __init__(self, backend: Any, name: str, kind: str, *, sign_in_place: bool) -> None:
        self._backend = backend
        self.name = name
        self.kind = kind
        self.sign_in_place = sign_in_place

    def __getattr__(self, member: str) -> Any:
        found = self._found(member)
        if found is _ABSENT:
            raise AttributeError(member)
        return self._held(member, found) if callable(found) else found

    def bind(self, *arguments: Any) -> None:
        """See `Backend.bind`: raises nothing."""
        self._quietly("bind", *arguments)

    def distrust(self, *arguments: Any) -> None:
        """See `Backend.distrust`: raises nothing."""
        self._quietly("distrust", *arguments)

    def close(self) -> None:
        """See `Backend.close`. The end of a process waits for no error."""
        self._quietly("close")

    def sign(self, *arguments: Any) -> bytes:
        """See `Backend.sign`."""
        signature = self._held("sign", self._found("sign"))(*arguments)
        if not isinstance(signature, bytes):
            raise BackendRefused(f"Backend {self.name!r} gave a {type(signature).__name__} for a signature.")
        return signature

    def list_keys(self, *arguments: Any, **more: Any) -> list[StoredKey]:
        """See `Backend.list_keys`. Listed here, so that what raises on the way raises here."""
        call = self._found("list_keys")
        listed: list[StoredKey] = self._held("list_keys", lambda: list(call(*arguments, **more)))()
        return listed

    def _found(self, member: str) -> Any:
        """What the backend has there; `_ABSENT` for what the contract does not ask for. A property may raise too."""
        default = () if member in _MEMBERS else (_ABSENT,)
        return self._held(member, lambda: getattr(self._backend, member, *default))()

    def _held(self, member: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def held(*arguments: Any, **more: Any) -> Any:
            try:
                return call(*arguments, **more)
            except BackendError:
                raise
            except (Exception, SystemExit) as error:
                # Its text may hold secrets. Type and place say enough to whoever wrote it.
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
                    next_step=f"Report it to whoever wrote the backend of type {self.kind!r}.",
                ) from error

        return held

    def _quietly(self, member: str, *arguments: Any) -> None:
        try:
            self._held(member, self._found(member))(*arguments)
        except BackendError as error:
            log.warning("foreign_error_passed_over", backend=self.name, call=member, error=error.detail)
