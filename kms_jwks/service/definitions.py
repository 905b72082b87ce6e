"""Definitions of key sets and keys: a request held against every rule, then written with its first versions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from kms_jwks import errors, issuers, timeline, wire
from kms_jwks.algorithms import ALGORITHMS, DEFAULT_RSA_BITS
from kms_jwks.custodian import document_limits, transitions
from kms_jwks.model import Access, Id, Instant, Key, KeySet, KeyVersion, Policy, Purpose, SigningProfile, new_id
from kms_jwks.service import adoption
from kms_jwks.service.adoption import Candidate
from kms_jwks.service.control import Control, check_name, find_algorithm, read_instant
from kms_jwks.store import ReadTx, WriteTx

T = TypeVar("T", Policy, SigningProfile)


# --- key sets ---------------------------------------------------------------------------------------------------------


def add_key_set(
    tx: WriteTx, control: Control, request: wire.KeySetCreate, candidates: Sequence[Candidate | None] = ()
) -> tuple[KeySet, list[Id]]:
    """Write a key set and its first keys, some of them adopted. Returns it with the ids of their first versions."""
    now = tx.now()
    name = check_name(request.name)
    if tx.key_set(name) is not None:
        # The issuer may be taken too, and databases differ in which of the two they name.
        raise errors.NameTaken
    issuer = f"{control.public_url}/{name}" if request.issuer is UNSET else request.issuer
    key_set = KeySet(
        id=new_id(),
        name=name,
        issuer=check_issuer(tx, control, issuer, name),
        access=Access(request.access),
        purpose=Purpose(request.purpose),
        cache_lifetime=check_cache_lifetime(request.cache_lifetime),
        stale_if_error=request.stale_if_error,
        existing_issuer=request.existing_issuer,
        created_at=now,
        updated_at=now,
    )
    tx.add(key_set)
    found = candidates or [None] * len(request.keys)
    versions = [
        add_key(tx, control, key_set, wanted, candidate)[1].id
        for wanted, candidate in zip(request.keys, found, strict=True)
    ]
    adopted = [candidate for candidate in found if candidate is not None]
    if adopted:
        adoption.publish(tx, key_set, adopted)
    return key_set, versions


def check_issuer(tx: ReadTx, control: Control, issuer: str, name: str) -> str:
    """The issuer of the key set `name`, where it is in normal form and no other set's.

    Raises InvalidField, and IssuerTaken where clients or readers would take it for the issuer of another key set.
    """
    try:
        normal = issuers.normal_form(issuer)
    except ValueError as error:
        raise errors.InvalidField(f"issuer: {error}", fields={"field": "issuer"}) from None
    if normal != issuer:
        raise errors.InvalidField(
            f"issuer: not in normal form, which is {normal}",
            next_step="Send the normal form; where verifiers know the issuer in the other form, they have to change.",
            fields={"field": "issuer", "normal_form": normal},
        )
    owner = issuers.default_owner(issuer, control.public_url)
    if owner not in (None, name):
        raise errors.InvalidField(
            f"issuer: below public_url, {issuer} is kept for a key set named {owner!r}", fields={"field": "issuer"}
        )
    compared = issuers.comparable(issuer)
    if any(other.name != name and issuers.comparable(other.issuer) == compared for other in tx.key_sets()):
        raise errors.IssuerTaken(f"Another key set has the issuer {issuer}, or one that clients take for the same.")
    return issuer


def check_cache_lifetime(seconds: int) -> int:
    """A cache lifetime within `timeline.CACHE_LIFETIME`, in seconds. Raises InvalidField."""
    least, most = timeline.CACHE_LIFETIME
    if not least <= seconds <= most:
        raise errors.InvalidField(
            f"cache_lifetime: {seconds} is outside {least} to {most}", fields={"field": "cache_lifetime"}
        )
    return seconds


# --- keys -------------------------------------------------------------------------------------------------------------


def ask_backend(control: Control, request: wire.KeyCreate) -> Candidate | None:
    """Ask the backend before anything is written: for the pair to adopt, or whether it offers the algorithm.

    Only an adoption needs a backend that answers. Else a backend that is away is passed over here, and the custodian
    makes the pair later. Raises UnsupportedAlgorithmRequested, and what `adoption.examine` raises.
    """
    if request.adopt is not UNSET:
        bits = None if request.rsa_bits is UNSET else request.rsa_bits
        backend, alg = choose_backend(control, request), find_algorithm(request.alg)
        return adoption.examine(control.backends, backend, alg, request.adopt, bits)
    name = control.backends.default if request.backend is UNSET else request.backend
    if name not in control.backends.by_name or request.alg not in ALGORITHMS:
        return None  # `add_key` refuses the name
    with contextlib.suppress(errors.BackendError):
        offered = control.backends.ask(name, "capabilities", lambda backend: backend.capabilities())
        if request.alg not in offered:
            raise errors.UnsupportedAlgorithmRequested(
                f"Backend {name!r} does not offer {request.alg}.", fields={"algorithms": sorted(offered)}
            )
    return None


def add_key(
    tx: WriteTx,
    control: Control,
    key_set: KeySet,
    request: wire.KeyCreate,
    candidate: Candidate | None = None,
    *,
    who: str | None = None,
) -> tuple[Key, KeyVersion]:
    """Write a key and its first version, `creating`: the custodian makes its pair, or the caller publishes an adopted
    one.

    Raises every refusal of a key's definition.
    """
    now = tx.now()
    key = Key(
        id=new_id(),
        key_set_id=key_set.id,
        name=check_name(request.name),
        alg=request.alg,
        rsa_bits=_choose_rsa_bits(request) if candidate is None else candidate.rsa_bits,
        backend=choose_backend(control, request),
        policy=merge_policy(Policy(), request.policy, now),
        profile=merge(SigningProfile(), request.profile),
        created_at=now,
        updated_at=now,
    )
    check_policy(key.policy, key_set, control.confirmation.lease(tx))
    check_profile(key)
    document_limits.check_compatible_algorithms(tx, key_set, key.alg)
    document_limits.require_room(tx, key_set, key.alg, more_keys=1)
    tx.add(key)
    if candidate is None:
        return key, transitions.add_version(tx, key)
    return key, adoption.add_adopted(tx, key, candidate, who=who)


def choose_backend(control: Control, request: wire.KeyCreate) -> str:
    """The backend that a request names or leaves to the default. Raises InvalidField, BackendUnknown."""
    name = control.backends.default if request.backend is UNSET else request.backend
    if name is None and not control.backends.by_name:
        raise errors.InvalidField(
            "backend: none is configured",
            next_step="Add a [backends.NAME] section to the settings of every node.",
            fields={"field": "backend"},
        )
    if name is None:
        raise errors.InvalidField(
            "backend: several are configured and none is the default; name one", fields={"field": "backend"}
        )
    if name not in control.backends.by_name:
        raise errors.BackendUnknown(f"No backend {name!r} is configured.")
    return name


def _choose_rsa_bits(request: wire.KeyCreate) -> int | None:
    alg = find_algorithm(request.alg)
    if not alg.is_rsa:
        if request.rsa_bits is not UNSET:
            raise errors.InvalidField(f"rsa_bits: {alg.name} has no modulus", fields={"field": "rsa_bits"})
        return None
    return DEFAULT_RSA_BITS if request.rsa_bits is UNSET else request.rsa_bits


def merge(current: T, changes: msgspec.Struct | msgspec.UnsetType) -> T:
    """`current` with the fields of a request struct that were sent."""
    if changes is UNSET:
        return current
    given: dict[str, Any] = msgspec.structs.asdict(changes)
    return replace(current, **{name: value for name, value in given.items() if value is not UNSET})


def merge_policy(current: Policy, changes: wire.PolicyFields | msgspec.UnsetType, now: Instant) -> Policy:
    """`merge`, with the API's datetime as an instant. Raises InvalidField."""
    if changes is UNSET or changes.hold_until is UNSET or changes.hold_until is None:
        return merge(current, changes)
    until = read_instant(changes.hold_until, "hold_until", field="policy.hold_until")
    if until > timeline.later(now, timeline.FARTHEST):
        raise errors.InvalidField("hold_until: lies over 10 years ahead", fields={"field": "policy.hold_until"})
    return replace(merge(current, changes), hold_until=until)


def check_policy(policy: Policy, key_set: KeySet, lease: int) -> None:
    """Raise PolicyRefused with every rule that is broken. `lease`: the longest signing lease in force, in seconds."""
    problems = timeline.policy_problems(policy, cache_lifetime=key_set.cache_lifetime, lease=lease)
    if problems:
        raise errors.PolicyRefused("; ".join(problems) + ".", fields={"problems": problems})


def check_profile(key: Key) -> None:
    """Raise PolicyRefused for a default lifetime that no token could have."""
    lifetime, most = key.profile.default_lifetime, key.policy.max_token_ttl
    # The model's default may be above a small max_token_ttl: signing takes the smaller of the two.
    if lifetime < 1 or (lifetime > most and lifetime != SigningProfile().default_lifetime):
        raise errors.PolicyRefused(
            f"default_lifetime {lifetime} is outside 1 to max_token_ttl {most}.", fields={"limit": most}
        )
