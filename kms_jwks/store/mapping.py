"""How entities of the model become rows and come back, one table entry per class, and what a snapshot holds of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from sqlalchemy import RowMapping, Table

from kms_jwks.model import (
    Access,
    ApiToken,
    Bounds,
    Breach,
    Client,
    CustodianLease,
    Epoch,
    ExternalKey,
    ExternalKeyChange,
    Grant,
    Id,
    IdempotencyRecord,
    Instant,
    Intent,
    IntentKind,
    IntentState,
    Key,
    KeySet,
    KeyVersion,
    Origin,
    Policy,
    Purpose,
    SigningProfile,
    VersionState,
    Worker,
)
from kms_jwks.store import tables

Entity = KeySet | Key | KeyVersion | ExternalKey | Client | ApiToken | Grant | Worker | Intent | IdempotencyRecord


@dataclass(frozen=True)
class Mapper:
    """How one class becomes a row.

    `nested` fields are frozen values in several columns whose names begin with the field's name; `enums` are stored by
    value; `documents` are stored as JSON and read back by the given function.
    """

    cls: type[Any]
    table: Table
    nested: Mapping[str, type[Any]] = field(default_factory=dict)
    enums: Mapping[str, type[StrEnum]] = field(default_factory=dict)
    documents: Mapping[str, Callable[[Any], object]] = field(default_factory=dict)
    view: Callable[[Any], tuple[object, ...] | None] = lambda _: None
    """What a snapshot holds of the entity; None if it does not hold it."""

    def to_row(self, entity: object) -> dict[str, object]:
        """The columns of `entity`."""
        row: dict[str, object] = {}
        for name in _names(self.cls):
            value = getattr(entity, name)
            if name in self.nested:
                for part in _names(self.nested[name]):
                    row[f"{name}_{part}"] = None if value is None else getattr(value, part)
            elif name in self.documents:
                row[name] = None if value is None else _to_json(value)
            elif name in self.enums:
                row[name] = value.value
            else:
                row[name] = value
        return row

    def from_row(self, row: RowMapping) -> Any:
        """The entity of a row."""
        values: dict[str, object] = {}
        for name in _names(self.cls):
            if name in self.nested:
                parts = {part: row[f"{name}_{part}"] for part in _names(self.nested[name])}
                absent = all(value is None for value in parts.values())
                values[name] = None if absent else self.nested[name](**parts)
            elif name in self.documents:
                values[name] = None if row[name] is None else self.documents[name](json.loads(row[name]))
            elif name in self.enums:
                values[name] = self.enums[name](row[name])
            else:
                values[name] = row[name]
        return self.cls(**values)


def _names(cls: type[Any]) -> tuple[str, ...]:
    """The fields that make up the value: those that are compared. An epoch's link is none of them."""
    found = _NAMES.get(cls)
    if found is None:
        found = _NAMES[cls] = tuple(f.name for f in fields(cls) if f.compare)
    return found


_NAMES: dict[type[Any], tuple[str, ...]] = {}


def _to_json(value: object) -> str:
    if isinstance(value, tuple):
        value = [_plain(item) for item in value]
    return json.dumps(value if isinstance(value, list) else dict(value), sort_keys=True)  # type: ignore[call-overload]


def _plain(item: object) -> object:
    if isinstance(item, Breach | ExternalKeyChange):
        return asdict(item)
    return item


def _breaches(value: list[dict[str, Any]]) -> tuple[Breach, ...]:
    return tuple(Breach(**item) for item in value)


def _changes(value: list[dict[str, Any]]) -> tuple[ExternalKeyChange, ...]:
    return tuple(ExternalKeyChange(**item) for item in value)


# --- what a snapshot holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RegistryContents:
    """Everything that a snapshot is made of, from one consistent read."""

    epoch: Epoch
    installation: str
    now: Instant
    key_sets: tuple[KeySet, ...]
    keys: tuple[Key, ...]
    versions: tuple[KeyVersion, ...]
    external_keys: tuple[ExternalKey, ...]
    clients: tuple[Client, ...]
    tokens: tuple[ApiToken, ...]
    grants: tuple[Grant, ...]
    ever_published: frozenset[tuple[Id, str]]
    """Key set and `alg` of every key that a set publishes or ever published."""


def _all_but(*left_out: str) -> Callable[[Any], tuple[object, ...]]:
    def view(entity: Any) -> tuple[object, ...]:
        return tuple(_comparable(getattr(entity, name)) for name in _names(type(entity)) if name not in left_out)

    return view


def _comparable(value: object) -> object:
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


_PUBLISHED_VIEW = _all_but("destroy_at", "destroy_told", "evidence", "published_epoch", "absence")
_EXTERNAL_VIEW = _all_but("revoke_reason", "changes")
_WHOLE = _all_but()
_DEFINITION = _all_but("revision", "updated_at")


def _living(entity: KeySet | Key) -> tuple[object, ...] | None:
    return None if entity.deleted_at is not None else _DEFINITION(entity)


def _version_view(version: KeyVersion) -> tuple[object, ...] | None:
    if version.state is VersionState.CREATING:
        return None
    if version.revoked_at is not None:
        return (version.id, version.key_set_id, version.kid, version.revoked_at)
    return _PUBLISHED_VIEW(version) if version.state.in_jwks else None


def _external_view(external: ExternalKey) -> tuple[object, ...] | None:
    if external.revoked_at is not None:
        return (external.id, external.key_set_id, external.kid, external.revoked_at)
    return _EXTERNAL_VIEW(external) if external.removed_at is None else None


def snapshot_view(entity: Entity) -> tuple[object, ...] | None:
    """What a snapshot holds of `entity`, or None. The epoch grows when this changes, and at no other time."""
    return MAPPERS[type(entity)].view(entity)


MAPPERS: Mapping[type[Any], Mapper] = MappingProxyType(
    {
        mapper.cls: mapper
        for mapper in (
            Mapper(
                KeySet,
                tables.key_sets,
                enums={"access": Access, "purpose": Purpose},
                view=_living,
            ),
            Mapper(
                Key,
                tables.keys,
                nested={"policy": Policy, "profile": SigningProfile},
                view=_living,
            ),
            Mapper(
                KeyVersion,
                tables.versions,
                nested={"bounds": Bounds},
                enums={"state": VersionState, "origin": Origin},
                documents={
                    "ref": dict,
                    "public_jwk": dict,
                    "x5c": tuple,
                    "evidence": dict,
                    "breaches": _breaches,
                    "weaknesses": tuple,
                    "absence": dict,
                    "failure": dict,
                },
                view=_version_view,
            ),
            Mapper(
                ExternalKey,
                tables.external_keys,
                documents={"public_jwk": dict, "changes": _changes},
                view=_external_view,
            ),
            Mapper(Client, tables.clients, view=lambda c: None if c.deleted_at is not None else _WHOLE(c)),
            Mapper(ApiToken, tables.tokens, view=_all_but("last_used_at")),
            Mapper(Grant, tables.grants, view=lambda g: None if g.deleted_at is not None else _WHOLE(g)),
            Mapper(Worker, tables.workers, nested={"confirmed": Epoch}, documents={"backends": dict}),
            Mapper(Intent, tables.intents, enums={"kind": IntentKind, "state": IntentState}),
            Mapper(CustodianLease, tables.custodian),
            Mapper(IdempotencyRecord, tables.idempotency_records),
        )
    }
)
