"""The state and the operations of the fake KMS: keys, aliases, tags and key states by account and region. No HTTP."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.fake_kms.signing import SPECS, Private, Refused, sign, spki

DAY = 86_400
TAGS = 50
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """The account of a caller's credentials, and the region of the endpoint."""

    account: str
    region: str

    def arn(self, name: str) -> str:
        return f"arn:aws:kms:{self.region}:{self.account}:{name}"


@dataclass
class Key:
    """`unseen`: how many more calls do not find the key; `late`: how many more signatures it makes though disabled."""

    place: Place
    spec: str
    private: Private
    key_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    usage: str = "SIGN_VERIFY"
    origin: str = "AWS_KMS"
    state: str = "Enabled"
    description: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    policy: str | None = None
    shared_with: set[str] = field(default_factory=set)
    deletion: float | None = None
    created: float = 0.0
    unseen: int = 0
    late: int = 0

    @property
    def arn(self) -> str:
        return self.place.arn(f"key/{self.key_id}")

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "AWSAccountId": self.place.account,
            "KeyId": self.key_id,
            "Arn": self.arn,
            "CreationDate": self.created,
            "Enabled": self.state == "Enabled",
            "Description": self.description,
            "KeyUsage": self.usage,
            "KeyState": self.state,
            "Origin": self.origin,
            "KeyManager": "CUSTOMER",
            "CustomerMasterKeySpec": self.spec,
            "KeySpec": self.spec,
            "SigningAlgorithms": list(SPECS[self.spec][1]),
            "MultiRegion": False,
        }
        if self.origin == "EXTERNAL":
            found["ExpirationModel"] = "KEY_MATERIAL_DOES_NOT_EXPIRE"
        if self.deletion is not None:
            found["DeletionDate"] = self.deletion
        return found


class Operations:
    """The server calls it under a lock, one operation at a time. `offset` in seconds shifts `now`."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}
        self.aliases: dict[str, str] = {}
        self.offset = 0.0
        self.new_keys_unseen = 0
        self.disabled_late = 0

    def now(self) -> float:
        return time.time() + self.offset

    def answer(self, operation: str, place: Place, parameters: Parameters) -> dict[str, Any]:
        """The answer to one operation. Raises Refused."""
        row = OPERATIONS.get(operation)
        if row is None:
            raise Refused("UnknownOperationException")
        row.check(parameters)
        self._bury()
        return row.run(self, place, parameters)

    def _bury(self) -> None:
        for arn, key in list(self.keys.items()):
            if key.deletion is not None and key.deletion <= self.now():
                del self.keys[arn]
                self.aliases = {name: target for name, target in self.aliases.items() if target != arn}

    # --- lookup

    def find(self, place: Place, key_id: str, *, aliases: bool = True) -> Key:
        """Find a key by key id, key ARN, and where KMS allows it by alias or alias ARN. Raises Refused as KMS does."""
        arn = key_id
        if not key_id.startswith("arn:"):
            arn = place.arn(key_id if key_id.startswith("alias/") else f"key/{key_id}")
        parts = arn.split(":", 5)
        if len(parts) != 6 or parts[2] != "kms" or "/" not in parts[5]:
            raise Refused("InvalidArnException", f"Invalid arn {key_id}")
        if parts[3] != place.region:
            raise Refused("NotFoundException", f"Invalid arn {parts[3]}")
        if parts[5].startswith("alias/"):
            if not aliases:
                raise Refused("ValidationException", "an alias is not allowed here")
            arn = self.aliases.get(arn, arn)
        key = self.keys.get(arn)
        if parts[4] != place.account and (key is None or place.account not in key.shared_with):
            raise Refused("AccessDeniedException", f"no resource-based policy of {arn} allows it")
        if key is None:
            raise Refused("NotFoundException", f"{arn} does not exist")
        if key.unseen > 0:
            key.unseen -= 1
            raise Refused("NotFoundException", f"{arn} does not exist")
        return key

    def usable(self, place: Place, key_id: str) -> Key:
        key = self.find(place, key_id)
        if key.state == "Disabled":
            if key.late <= 0:
                raise Refused("DisabledException", f"{key.arn} is disabled.")
            key.late -= 1
        elif key.state != "Enabled":
            raise Refused("KMSInvalidStateException", f"{key.arn} is pending deletion.")
        return key

    def changeable(self, place: Place, key_id: str) -> Key:
        """For operations that KMS allows only in the key's own account, and not while its deletion is pending."""
        key = self.find(place, key_id, aliases=False)
        if key.place.account != place.account:
            raise Refused("AccessDeniedException")
        if key.state == "PendingDeletion":
            raise Refused("KMSInvalidStateException", f"{key.arn} is pending deletion.")
        return key

    # --- operations

    def create_key(self, place: Place, given: Parameters) -> dict[str, Any]:
        spec = given.get("KeySpec", "SYMMETRIC_DEFAULT")
        if spec not in SPECS:
            raise Refused("UnsupportedOperationException", f"no {spec}")
        if given.get("KeyUsage") != "SIGN_VERIFY":
            raise Refused("ValidationException", "KeyUsage")
        tags = _tags({}, given.get("Tags", []))
        key = Key(
            place,
            spec,
            SPECS[spec][0](),
            description=given.get("Description", ""),
            tags=tags,
            policy=given.get("Policy"),
            created=self.now(),
            unseen=self.new_keys_unseen,
        )
        self.keys[key.arn] = key
        return {"KeyMetadata": key.metadata()}

    def describe_key(self, place: Place, given: Parameters) -> dict[str, Any]:
        return {"KeyMetadata": self.find(place, given["KeyId"]).metadata()}

    def get_public_key(self, place: Place, given: Parameters) -> dict[str, Any]:
        key = self.usable(place, given["KeyId"])
        return {
            "KeyId": key.arn,
            "PublicKey": base64.b64encode(spki(key.private)).decode(),
            "KeySpec": key.spec,
            "KeyUsage": key.usage,
            "SigningAlgorithms": list(SPECS[key.spec][1]),
        }

    def sign(self, place: Place, given: Parameters) -> dict[str, Any]:
        key, algorithm = self.usable(place, given["KeyId"]), given["SigningAlgorithm"]
        if key.usage != "SIGN_VERIFY" or algorithm not in SPECS[key.spec][1]:
            raise Refused("InvalidKeyUsageException", f"{key.arn} does not sign with {algorithm}")
        signature = sign(key.private, algorithm, base64.b64decode(given["Message"]), given.get("MessageType", "RAW"))
        return {"KeyId": key.arn, "Signature": base64.b64encode(signature).decode(), "SigningAlgorithm": algorithm}

    def create_alias(self, place: Place, given: Parameters) -> dict[str, Any]:
        key, name = self.changeable(place, given["TargetKeyId"]), given["AliasName"]
        if not name.startswith("alias/") or name.startswith("alias/aws/"):
            raise Refused("InvalidAliasNameException", name)
        if place.arn(name) in self.aliases:
            raise Refused("AlreadyExistsException", name)
        self.aliases[place.arn(name)] = key.arn
        return {}

    def delete_alias(self, place: Place, given: Parameters) -> dict[str, Any]:
        if self.aliases.pop(place.arn(given["AliasName"]), None) is None:
            raise Refused("NotFoundException")
        return {}

    def list_aliases(self, place: Place, given: Parameters) -> dict[str, Any]:
        own = [{"AliasName": "alias/aws/ebs", "AliasArn": place.arn("alias/aws/ebs")}]
        for arn, target in self.aliases.items():
            if arn.startswith(place.arn("alias/")):
                name = arn.split(":", 5)[5]
                own.append({"AliasName": name, "AliasArn": arn, "TargetKeyId": target.rpartition("/")[2]})
        return _page("Aliases", own, given)

    def list_keys(self, place: Place, given: Parameters) -> dict[str, Any]:
        own = [{"KeyId": key.key_id, "KeyArn": key.arn} for key in self.keys.values() if key.place == place]
        return _page("Keys", own, given)

    def list_resource_tags(self, place: Place, given: Parameters) -> dict[str, Any]:
        tags = self.find(place, given["KeyId"], aliases=False).tags
        return {"Tags": [{"TagKey": k, "TagValue": v} for k, v in tags.items()], "Truncated": False}

    def tag_resource(self, place: Place, given: Parameters) -> dict[str, Any]:
        key = self.changeable(place, given["KeyId"])
        key.tags = _tags(key.tags, given["Tags"])
        return {}

    def schedule_key_deletion(self, place: Place, given: Parameters) -> dict[str, Any]:
        key, days = self.changeable(place, given["KeyId"]), given.get("PendingWindowInDays", 30)
        if not 7 <= days <= 30:
            raise Refused("ValidationException", "PendingWindowInDays")
        key.state, key.deletion = "PendingDeletion", self.now() + days * DAY
        return {"KeyId": key.arn, "DeletionDate": key.deletion, "KeyState": key.state, "PendingWindowInDays": days}

    def cancel_key_deletion(self, place: Place, given: Parameters) -> dict[str, Any]:
        key = self.find(place, given["KeyId"], aliases=False)
        if key.state != "PendingDeletion":
            raise Refused("KMSInvalidStateException", f"{key.arn} is not pending deletion.")
        key.state, key.deletion = "Disabled", None
        return {"KeyId": key.arn}

    def enable_key(self, place: Place, given: Parameters) -> dict[str, Any]:
        self.changeable(place, given["KeyId"]).state = "Enabled"
        return {}

    def disable_key(self, place: Place, given: Parameters) -> dict[str, Any]:
        key = self.changeable(place, given["KeyId"])
        key.state, key.late = "Disabled", self.disabled_late
        return {}


def _tags(held: dict[str, str], more: list[dict[str, str]]) -> dict[str, str]:
    names = [tag["TagKey"] for tag in more]
    tags = held | {tag["TagKey"]: tag["TagValue"] for tag in more}
    if len(tags) > TAGS or len(set(names)) != len(names) or any(name.startswith("aws:") for name in names):
        raise Refused("TagException", "too many tags, or one that is not allowed")
    return tags


def _page(member: str, items: list[dict[str, str]], given: Parameters) -> dict[str, Any]:
    start, limit = int(given.get("Marker", 0)), given.get("Limit", 50)
    more = start + limit < len(items)
    return {
        member: items[start : start + limit],
        "Truncated": more,
        **({"NextMarker": str(start + limit)} if more else {}),
    }


@dataclass(frozen=True)
class Row:
    """An operation: its function, and its parameters with their types; those in `needs` are required."""

    run: Callable[[Operations, Place, Parameters], dict[str, Any]]
    parameters: Mapping[str, type]
    needs: tuple[str, ...] = ()

    def check(self, given: Parameters) -> None:
        wrong = [n for n, value in given.items() if not isinstance(value, self.parameters.get(n, type(None)))]
        wrong += [name for name in self.needs if name not in given]
        if wrong:
            raise Refused("ValidationException", f"unknown, missing or of the wrong type: {', '.join(wrong)}")


_ONE = ({"KeyId": str}, ("KeyId",))
_PAGED = ({"Limit": int, "Marker": str}, ())
OPERATIONS: Mapping[str, Row] = {
    "CreateKey": Row(
        Operations.create_key,
        {"KeySpec": str, "KeyUsage": str, "Description": str, "Tags": list, "Policy": str, "MultiRegion": bool},
    ),
    "DescribeKey": Row(Operations.describe_key, *_ONE),
    "GetPublicKey": Row(Operations.get_public_key, *_ONE),
    "Sign": Row(
        Operations.sign,
        {"KeyId": str, "Message": str, "MessageType": str, "SigningAlgorithm": str},
        ("KeyId", "Message", "SigningAlgorithm"),
    ),
    "CreateAlias": Row(Operations.create_alias, {"AliasName": str, "TargetKeyId": str}, ("AliasName", "TargetKeyId")),
    "DeleteAlias": Row(Operations.delete_alias, {"AliasName": str}, ("AliasName",)),
    "ListAliases": Row(Operations.list_aliases, *_PAGED),
    "ListKeys": Row(Operations.list_keys, *_PAGED),
    "ListResourceTags": Row(Operations.list_resource_tags, {"KeyId": str, "Limit": int, "Marker": str}, ("KeyId",)),
    "TagResource": Row(Operations.tag_resource, {"KeyId": str, "Tags": list}, ("KeyId", "Tags")),
    "ScheduleKeyDeletion": Row(
        Operations.schedule_key_deletion, {"KeyId": str, "PendingWindowInDays": int}, ("KeyId",)
    ),
    "CancelKeyDeletion": Row(Operations.cancel_key_deletion, *_ONE),
    "EnableKey": Row(Operations.enable_key, *_ONE),
    "DisableKey": Row(Operations.disable_key, *_ONE),
}
"""By the name in X-Amz-Target, after the dot."""
