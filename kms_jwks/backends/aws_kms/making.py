"""Making key pairs, finding those that were made, and their end. Each function is a few calls of one connection."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kms_jwks.backends.aws_kms import keys
from kms_jwks.backends.base import StoredKey
from kms_jwks.errors import BackendError, BackendKeyNotFound, BackendRefused, BackendUnavailable, KeyExists

if TYPE_CHECKING:
    from kms_jwks.backends.aws_kms.connection import Connection
    from kms_jwks.backends.base import KeyRef

T = TypeVar("T")

TAG: Final = "kms-jwks:"
"""Begins the names of our tags; `label` is always there, what `purpose` says comes after it."""
PENDING: Final = frozenset({"PendingDeletion", "PendingReplicaDeletion"})
"""The states of a key whose deletion is scheduled; the second of a multi-Region primary that has replicas."""
SHORTEST: Final = 7
"""Days that KMS waits at least before it destroys a key; at most 30."""
LONGEST: Final = 30
_DAY: Final = 86_400
_PAUSES: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between looks for what was just made, the last one again and again: KMS is eventually consistent."""
_OVERDUE: Final = 60
"""Seconds to wait for a key whose date has passed: KMS takes up to a day more."""


def created(
    connection: Connection,
    deadline: float,
    label: str,
    spec: str,
    *,
    purpose: Mapping[str, str],
    policy_file: Path | None,
) -> dict[str, Any]:
    """CreateKey, once: what is asked twice may be made twice. The KeyMetadata of the new key."""
    parameters: dict[str, Any] = {
        "KeySpec": spec,
        "KeyUsage": "SIGN_VERIFY",
        "Description": f"{label}: a token signing key of kms-jwks",
        "Tags": [{"TagKey": f"{TAG}{name}", "TagValue": value} for name, value in {"label": label, **purpose}.items()],
    }
    if policy_file is not None:
        parameters["Policy"] = _policy(policy_file)
    metadata: dict[str, Any] = connection.call("CreateKey", deadline, attempts=1, **parameters)["KeyMetadata"]
    return metadata


def _policy(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise BackendRefused(
            f"The key policy in {file} cannot be read as JSON ({type(error).__name__}).",
            next_step="Correct key_policy_file in the backend's settings, or what it names.",
        ) from error
    return text


def seen(look: Callable[[], T], deadline: float) -> T:
    """`look` again and again while it finds nothing, for as long as there is time for a further look."""
    pauses = iter(_PAUSES)
    pause = 0.0
    while True:
        try:
            return look()
        except BackendKeyNotFound:
            pause = next(pauses, pause)
            if time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)


def named(connection: Connection, deadline: float, alias: str, key_id: str) -> None:
    """Give a key its alias, which no other key of account and region has. Raises KeyExists.

    An alias that a first attempt made, whose answer was lost, is there already and points to the key.
    """
    try:
        connection.call("CreateAlias", deadline, AliasName=alias, TargetKeyId=key_id)
    except KeyExists:
        if connection.call("DescribeKey", deadline, KeyId=alias)["KeyMetadata"]["KeyId"] != key_id:
            raise


def given_up(connection: Connection, deadline: float, key_id: str) -> None:
    """Have a key that nobody will use destroyed as soon as KMS does it; what fails is told by whoever calls."""
    seen(lambda: connection.call("ScheduleKeyDeletion", deadline, KeyId=key_id, PendingWindowInDays=SHORTEST), deadline)


# --- finding ----------------------------------------------------------------------------------------------------------


def listed(connection: Connection, deadline: float, label_prefix: str, account: str | None) -> Iterator[StoredKey]:
    """The keys whose alias starts so, and those without any alias whose tag does: a crash may come between the calls
    that make key and alias. Keys that wait for their destruction are left out."""
    owned: set[str] = set()
    for alias in _pages(connection, deadline, "ListAliases", "Aliases"):
        arn, target = keys.Arn.of(alias["AliasArn"]), alias.get("TargetKeyId")
        if arn is None or target is None:
            continue
        owned.add(target)
        if arn.name.startswith(label_prefix) and (found := _alive(connection, deadline, arn.key(target), account)):
            yield StoredKey(found, arn.name)
    for key in _pages(connection, deadline, "ListKeys", "Keys"):
        if key["KeyId"] in owned:
            continue
        label = _tagged(connection, deadline, key["KeyArn"])
        if label.startswith(label_prefix) and label and (found := _alive(connection, deadline, key["KeyArn"], account)):
            yield StoredKey(found, label)


def _pages(connection: Connection, deadline: float, operation: str, member: str) -> Iterator[dict[str, Any]]:
    answer = connection.call(operation, deadline, Limit=100)
    yield from answer[member]
    while answer.get("Truncated"):
        answer = connection.call(operation, deadline, Limit=100, Marker=answer["NextMarker"])
        yield from answer[member]


def _alive(connection: Connection, deadline: float, key_id: str, account: str | None) -> KeyRef | None:
    try:
        metadata = connection.call("DescribeKey", deadline, KeyId=key_id)["KeyMetadata"]
    except BackendKeyNotFound:
        return None
    if metadata["KeyState"] in PENDING:
        return None
    return keys.reference(metadata, account or metadata["AWSAccountId"])


def _tagged(connection: Connection, deadline: float, key_id: str) -> str:
    """The label in a key's tags; empty where it has none, or where its policy keeps them from us."""
    try:
        tags = _pages_of_tags(connection, deadline, key_id)
        return next((tag["TagValue"] for tag in tags if tag["TagKey"] == f"{TAG}label"), "")
    except (BackendKeyNotFound, BackendRefused):
        return ""


def _pages_of_tags(connection: Connection, deadline: float, key_id: str) -> list[dict[str, Any]]:
    tags: list[dict[str, Any]] = connection.call("ListResourceTags", deadline, KeyId=key_id, Limit=50)["Tags"]
    return tags


# --- the end ----------------------------------------------------------------------------------------------------------


def scheduled(connection: Connection, deadline: float, ref: KeyRef, days: int) -> None:
    """Have KMS destroy the key in `days`; one that waits already gets the new date where that is another day."""
    metadata, left = _owned(connection, deadline, ref)
    days = min(max(days, SHORTEST), LONGEST)
    if metadata["KeyState"] == "PendingReplicaDeletion":
        return  # its date comes once the replicas are gone
    if left is not None:
        if abs(left - days * _DAY) < _DAY:
            return
        connection.call("CancelKeyDeletion", deadline, KeyId=metadata["KeyId"])
    connection.call("ScheduleKeyDeletion", deadline, KeyId=metadata["KeyId"], PendingWindowInDays=days)


def cancelled(connection: Connection, deadline: float, ref: KeyRef) -> None:
    """Take a key's deletion back and enable it: KMS leaves it disabled. Said again, it enables what was left disabled.

    It is called only to take back our own schedule, so a disabled key is one whose first call stopped half-way.
    """
    metadata, left = _owned(connection, deadline, ref)
    if left is not None:
        connection.call("CancelKeyDeletion", deadline, KeyId=metadata["KeyId"])
    elif metadata["KeyState"] != "Disabled":
        return
    try:
        connection.call("EnableKey", deadline, KeyId=metadata["KeyId"])
    except BackendError as error:
        step = f"The deletion is cancelled and the key is disabled: enable {metadata['Arn']} in KMS."
        error.next_step = f"{step} {error.next_step}"
        raise


def ended(connection: Connection, deadline: float, ref: KeyRef) -> None:
    """Return when the key is gone. Raises BackendUnavailable with the seconds that are left until KMS destroys it."""
    try:
        metadata, left = _owned(connection, deadline, ref)
        if left is None:
            connection.call("ScheduleKeyDeletion", deadline, KeyId=metadata["KeyId"], PendingWindowInDays=SHORTEST)
            left = SHORTEST * _DAY
    except BackendKeyNotFound:
        return
    date = datetime.now(UTC) + timedelta(seconds=left)
    raise BackendUnavailable(
        f"KMS destroys the key {metadata['Arn']} by {date:%Y-%m-%dT%H:%MZ}.",
        next_step="Nothing is to be done: it is looked for again then. Until then its deletion can be cancelled.",
        retry_after=left if left > 0 else _OVERDUE,
    )


def _owned(connection: Connection, deadline: float, ref: KeyRef) -> tuple[dict[str, Any], int | None]:
    """The KeyMetadata of a key that this account may destroy, and in how many seconds KMS will, if it is to.

    Raises BackendRefused for a key of another account: KMS lets nobody else.
    """
    answer = connection.call("DescribeKey", deadline, KeyId=ref["arn"])
    metadata: dict[str, Any] = answer["KeyMetadata"]
    if metadata["AWSAccountId"] != ref["account"]:
        raise BackendRefused(
            f"The key {ref['arn']} is account {metadata['AWSAccountId']}'s, which alone can destroy it.",
            next_step="Have its owner schedule or cancel the deletion in KMS.",
        )
    if metadata["KeyState"] not in PENDING:
        return metadata, None
    date = metadata.get("DeletionDate")
    if not isinstance(date, datetime):
        return metadata, SHORTEST * _DAY
    return metadata, int((date - _now(answer)).total_seconds())


def _now(answer: Mapping[str, Any]) -> datetime:
    """KMS's own time, which its dates go by; this machine's where the answer does not say."""
    try:
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError, TypeError):
        return datetime.now(UTC)
