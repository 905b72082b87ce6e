"""The life of a key pair in KMS: make it, name it, list it, schedule, cancel and confirm its destruction."""

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
from kms_jwks.times import format_instant, to_instant

if TYPE_CHECKING:
    from kms_jwks.backends.aws_kms.connection import Connection
    from kms_jwks.backends.base import KeyRef

T = TypeVar("T")

TAG: Final = "kms-jwks:"
"""The prefix of this program's tags: `label` on every key, and one tag for each entry of `purpose`."""
PENDING: Final = frozenset({"PendingDeletion", "PendingReplicaDeletion"})
"""The states of a key whose deletion is scheduled; the second is that of a multi-Region primary with replicas."""
MIN_DAYS: Final = 7
"""Days that KMS waits at least before it destroys a key."""
MAX_DAYS: Final = 30
_DAY: Final = 86_400
_PAUSES: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between lookups of a new key, the last one repeatedly: KMS is eventually consistent."""
_OVERDUE: Final = 60
"""Seconds until the next check of a key whose date has passed: KMS may take a day longer."""


def create_key(
    connection: Connection,
    deadline: float,
    label: str,
    spec: str,
    *,
    purpose: Mapping[str, str],
    policy_file: Path | None,
) -> dict[str, Any]:
    """Call CreateKey once, since a second attempt could make a second key. The KeyMetadata of the new key."""
    parameters: dict[str, Any] = {
        "KeySpec": spec,
        "KeyUsage": "SIGN_VERIFY",
        "Description": f"{label}: a token signing key of kms-jwks",
        "Tags": [{"TagKey": f"{TAG}{name}", "TagValue": value} for name, value in {"label": label, **purpose}.items()],
    }
    if policy_file is not None:
        parameters["Policy"] = _read_policy(policy_file)
    metadata: dict[str, Any] = connection.call("CreateKey", deadline, attempts=1, **parameters)["KeyMetadata"]
    return metadata


def _read_policy(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise BackendRefused(
            f"The key policy in {file} cannot be read as JSON ({type(error).__name__}).",
            next_step="Correct key_policy_file in the backend's settings, or what it names.",
        ) from error
    return text


def retry_until_found(look_up: Callable[[], T], deadline: float) -> T:
    """Repeat `look_up` while it raises BackendKeyNotFound and there is time for another lookup."""
    pauses = iter(_PAUSES)
    pause = 0.0
    while True:
        try:
            return look_up()
        except BackendKeyNotFound:
            pause = next(pauses, pause)
            if time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)


def create_alias(connection: Connection, deadline: float, alias: str, key_id: str) -> None:
    """Give a key its alias, which is unique in account and region. Raises KeyExists if another key has it.

    If the answer to a first attempt was lost, the alias exists already and points to the key.
    """
    try:
        connection.call("CreateAlias", deadline, AliasName=alias, TargetKeyId=key_id)
    except KeyExists:
        if connection.call("DescribeKey", deadline, KeyId=alias)["KeyMetadata"]["KeyId"] != key_id:
            raise


def discard_key(connection: Connection, deadline: float, key_id: str) -> None:
    """Schedule the deletion of a new key that will not be used, in the shortest time. Raises BackendError."""
    retry_until_found(
        lambda: connection.call("ScheduleKeyDeletion", deadline, KeyId=key_id, PendingWindowInDays=MIN_DAYS), deadline
    )


# --- finding ----------------------------------------------------------------------------------------------------------


def list_keys(connection: Connection, deadline: float, label_prefix: str, account: str | None) -> Iterator[StoredKey]:
    """The keys whose alias starts with the prefix, and keys without an alias whose label tag does.

    A crash between CreateKey and CreateAlias leaves a key without an alias. Keys whose deletion is scheduled are left
    out.
    """
    with_alias: set[str] = set()
    for alias in _fetch_pages(connection, deadline, "ListAliases", "Aliases"):
        arn, target = keys.Arn.parse(alias["AliasArn"]), alias.get("TargetKeyId")
        if arn is None or target is None:
            continue
        with_alias.add(target)
        if arn.name.startswith(label_prefix) and (
            found := _find_reference(connection, deadline, arn.with_key(target), account)
        ):
            yield StoredKey(found, arn.name)
    for key in _fetch_pages(connection, deadline, "ListKeys", "Keys"):
        if key["KeyId"] in with_alias:
            continue
        label = _read_label(connection, deadline, key["KeyArn"])
        if (
            label.startswith(label_prefix)
            and label
            and (found := _find_reference(connection, deadline, key["KeyArn"], account))
        ):
            yield StoredKey(found, label)


def _fetch_pages(connection: Connection, deadline: float, operation: str, member: str) -> Iterator[dict[str, Any]]:
    answer = connection.call(operation, deadline, Limit=100)
    yield from answer[member]
    while answer.get("Truncated"):
        answer = connection.call(operation, deadline, Limit=100, Marker=answer["NextMarker"])
        yield from answer[member]


def _find_reference(connection: Connection, deadline: float, key_id: str, account: str | None) -> KeyRef | None:
    try:
        metadata = connection.call("DescribeKey", deadline, KeyId=key_id)["KeyMetadata"]
    except BackendKeyNotFound:
        return None
    if metadata["KeyState"] in PENDING:
        return None
    return keys.make_reference(metadata, account or metadata["AWSAccountId"])


def _read_label(connection: Connection, deadline: float, key_id: str) -> str:
    """The label in a key's tags; empty if it has none, or if the key's policy denies reading them."""
    try:
        tags = _list_tags(connection, deadline, key_id)
        return next((tag["TagValue"] for tag in tags if tag["TagKey"] == f"{TAG}label"), "")
    except (BackendKeyNotFound, BackendRefused):
        return ""


def _list_tags(connection: Connection, deadline: float, key_id: str) -> list[dict[str, Any]]:
    tags: list[dict[str, Any]] = connection.call("ListResourceTags", deadline, KeyId=key_id, Limit=50)["Tags"]
    return tags


# --- destruction ------------------------------------------------------------------------------------------------------


def schedule_destroy(connection: Connection, deadline: float, ref: KeyRef, days: int) -> None:
    """Schedule the deletion in `days`. A key that is scheduled already is rescheduled if that is another day."""
    metadata, left = _describe_owned(connection, deadline, ref)
    days = min(max(days, MIN_DAYS), MAX_DAYS)
    if metadata["KeyState"] == "PendingReplicaDeletion":
        return  # KMS sets the date when the replicas are deleted
    if left is not None:
        if abs(left - days * _DAY) < _DAY:
            return
        connection.call("CancelKeyDeletion", deadline, KeyId=metadata["KeyId"])
    connection.call("ScheduleKeyDeletion", deadline, KeyId=metadata["KeyId"], PendingWindowInDays=days)


def cancel_destroy(connection: Connection, deadline: float, ref: KeyRef) -> None:
    """Cancel a key's deletion and enable the key, which CancelKeyDeletion leaves disabled.

    Only deletions that this program scheduled are cancelled, so a disabled key is one whose first cancellation stopped
    before EnableKey; a repeated call enables it.
    """
    metadata, left = _describe_owned(connection, deadline, ref)
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


def destroy(connection: Connection, deadline: float, ref: KeyRef) -> None:
    """Return if the key is gone. Otherwise schedule its deletion if necessary, and raise BackendUnavailable with the
    seconds until KMS destroys it."""
    try:
        metadata, left = _describe_owned(connection, deadline, ref)
        if left is None:
            connection.call("ScheduleKeyDeletion", deadline, KeyId=metadata["KeyId"], PendingWindowInDays=MIN_DAYS)
            left = MIN_DAYS * _DAY
    except BackendKeyNotFound:
        return
    date = datetime.now(UTC) + timedelta(seconds=left)
    raise BackendUnavailable(
        f"KMS destroys the key {metadata['Arn']} by {format_instant(to_instant(date))}.",
        next_step="No action is needed: the key is checked again then. Until then its deletion can be cancelled.",
        retry_after=left if left > 0 else _OVERDUE,
    )


def _describe_owned(connection: Connection, deadline: float, ref: KeyRef) -> tuple[dict[str, Any], int | None]:
    """The KeyMetadata of a key of this account, and the seconds until KMS destroys it (None: not scheduled).

    Raises BackendRefused for a key of another account: only the account that owns a key can destroy it.
    """
    answer = connection.call("DescribeKey", deadline, KeyId=ref["arn"])
    metadata: dict[str, Any] = answer["KeyMetadata"]
    if metadata["AWSAccountId"] != ref["account"]:
        raise BackendRefused(
            f"The key {ref['arn']} belongs to account {metadata['AWSAccountId']}: only its owner can destroy it.",
            next_step="Ask its owner to schedule or cancel the deletion in KMS.",
        )
    if metadata["KeyState"] not in PENDING:
        return metadata, None
    date = metadata.get("DeletionDate")
    if not isinstance(date, datetime):
        return metadata, MIN_DAYS * _DAY
    return metadata, int((date - _server_time(answer)).total_seconds())


def _server_time(answer: Mapping[str, Any]) -> datetime:
    """The time in the answer's Date header, since KMS's clock decides; this machine's if there is none."""
    try:
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError, TypeError):
        return datetime.now(UTC)
