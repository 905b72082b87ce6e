"""Verifiers as they cache in the field, one row each, and issuers that sign all the time, in a plant's virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kms_jwks import errors, jose, wire
from kms_jwks.model import SECOND
from kms_jwks.service.signing_job import SigningOperation
from tests.simulation.plant import Plant, SimWorker

FOR_EVER = math.inf


@dataclass(frozen=True)
class Habit:
    """How one client caches a JWKS. Seconds."""

    client: str
    keeps: float
    """How long a fetched document (or key) is used without asking again."""
    refetches: bool
    """Whether an unknown kid makes it fetch before `keeps` is over."""
    cool_down: float = 0
    """How long after a fetch (after `burst` of them) an unknown kid makes no other one."""
    burst: int = 1
    per_kid: bool = False
    """It keeps single keys, each for `keeps`, and not documents."""


HABITS = (
    Habit("panva/jose 6", 600, True, 30),
    Habit("PyJWT PyJWKClient", 300, True, 30),
    Habit("Authlib", FOR_EVER, True),
    Habit("node-jwks-rsa 4", 600, True, per_kid=True),
    Habit("jwks-rsa-java", 36_000, True, 60, burst=10, per_kid=True),
    Habit("Nimbus JWKSourceBuilder", 300, True, 30),
    Habit("Spring NimbusJwtDecoder", 300, True),
    Habit("go-oidc v3", FOR_EVER, True),
    Habit("kube-apiserver", 300, False),
    Habit("jwx v2", 900, False),
    Habit("keyfunc/jwkset", 3600, True, 300),
    Habit("Envoy", 600, False),
    Habit("Istio", 3600, False),
    Habit(".NET IdentityModel", 43_200, False),
    Habit("AWS API Gateway", 7200, False),
)


@dataclass
class Token:
    """What an issuer got, and when it ends."""

    kid: str
    text: str
    exp: int
    """True time, microseconds: one second before its last."""


@dataclass
class Verifier:
    """One client. `fetch` gives the kids of the document that some replica serves now."""

    habit: Habit
    fetch: Callable[[], frozenset[str]]
    kept: dict[str, float] = field(default_factory=dict)
    """Trusted kids and until when (µs)."""
    fetches: list[float] = field(default_factory=list)
    """When it fetched, as many as matter."""

    def accepts(self, kid: str, now: int) -> bool:
        """Whether it verifies a token of that kid, after everything it would try."""
        h = self.habit
        if not h.per_kid and (not self.fetches or now >= self.fetches[-1] + h.keeps * SECOND):
            self._ask(now)
        if self._trusts(kid, now):
            return True
        stale = h.per_kid and kid in self.kept
        cool = len(self.fetches) < h.burst or now >= self.fetches[-h.burst] + h.cool_down * SECOND
        if not (h.refetches or stale) or not cool:
            return False
        self._ask(now, kid)
        return self._trusts(kid, now)

    def _trusts(self, kid: str, now: int) -> bool:
        return now < self.kept.get(kid, -math.inf)

    def _ask(self, now: int, kid: str | None = None) -> None:
        kids = self.fetch()
        self.fetches = [*self.fetches[1 - self.habit.burst :], now] if self.habit.burst > 1 else [now]
        until = now + self.habit.keeps * SECOND
        if self.habit.per_kid:
            self.kept = {k: t for k, t in self.kept.items() if t > now and k != kid}
            if kid in kids:
                self.kept[kid] = until
        else:
            self.kept = dict.fromkeys(kids, until)


@dataclass
class Tally:
    """What came of it."""

    tokens: int = 0
    verified: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def rejections(self) -> int:
        return sum(self.rejected.values())


class Fleet:
    """Every habit several times over, each instance fetching from any replica, and two issuers."""

    def __init__(self, plant: Plant, *, each: int = 2, key: str = "default") -> None:
        self.plant = plant
        self.key = key
        self.verifiers = [Verifier(habit, self.kids) for habit in HABITS for _ in range(each)]
        self.tally = Tally()
        self._later: list[tuple[int, int, Token]] = []
        self._number = itertools.count()
        self._bodies: dict[bytes, Mapping[str, Any]] = {}

    def document(self, worker: SimWorker) -> Mapping[str, Any]:
        assert worker.snapshot is not None
        jwks = worker.snapshot.key_sets["main"].jwks
        assert jwks is not None
        if jwks.body not in self._bodies:
            self._bodies[jwks.body] = {jwk["kid"]: jwk for jwk in msgspec.json.decode(jwks.body)["keys"]}
        return self._bodies[jwks.body]

    def any_worker(self) -> SimWorker:
        return self.plant.random.choice(self.plant.workers)

    def kids(self) -> frozenset[str]:
        return frozenset(self.document(self.any_worker()))

    def issue(self, expires_in: int) -> Token:
        """A token from any worker, checked against the document that another one serves in the same moment."""
        worker = self.any_worker()
        try:
            made = worker.signing.handle(
                SigningOperation.JWT,
                self.plant.who,
                "main",
                self.key,
                {"claims": {"sub": "a"}, "expires_in": expires_in},
            )
        except errors.RegistryStale:
            # It has not polled since time jumped: as in life, the issuer asks again.
            worker.poll()
            return self.issue(expires_in)
        assert isinstance(made, wire.SignedJwt)
        header = jose.b64u_decode(made.token.split(".")[0])
        assert msgspec.json.decode(header)["kid"] == made.kid
        self.tally.tokens += 1
        return Token(made.kid, made.token, self.plant.now + (expires_in - 1) * SECOND)

    def verify(self, token: Token) -> None:
        """Every verifier sees the token now."""
        for verifier in self.verifiers:
            if verifier.accepts(token.kid, self.plant.now):
                self.tally.verified += 1
            else:
                name = verifier.habit.client
                self.tally.rejected[name] = self.tally.rejected.get(name, 0) + 1

    def work(self, expires_in: int) -> None:
        """Sign, have it verified at once, and once more just before the token ends."""
        token = self.issue(expires_in)
        self.verify(token)
        heapq.heappush(self._later, (token.exp, next(self._number), token))

    def wait(self, seconds: float) -> None:
        """Let time pass; tokens that end meanwhile are verified once more just before."""
        end = self.plant.now + round(seconds * SECOND)
        while self._later and self._later[0][0] <= end:
            at, _, token = heapq.heappop(self._later)
            if at > self.plant.now:
                self.plant.round(seconds=(at - self.plant.now) / SECOND)
            self.verify(token)
        if end > self.plant.now:
            self.plant.round(seconds=(end - self.plant.now) / SECOND)

    def restart_some(self) -> None:
        """Deployments: a few verifiers begin with nothing."""
        for index in self.plant.random.sample(range(len(self.verifiers)), 3):
            self.verifiers[index] = Verifier(self.verifiers[index].habit, self.kids)
