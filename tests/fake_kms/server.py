"""The fake KMS over HTTP: JSON 1.1 with checked request signatures (SigV4), and faults on request."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.fake_kms.operations import Key, Operations, Place
from tests.fake_kms.signing import SPECS, Refused

ACCOUNT = "111122223333"
OTHER_ACCOUNT = "444455556666"
REGION = "eu-central-1"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>\w+)/(?P<date>\d{8})/(?P<region>[\w-]+)/kms/aws4_request, "
    r"SignedHeaders=(?P<signed>[\w;-]+), Signature=(?P<signature>[0-9a-f]{64})"
)
_HANG_SECONDS = 30.0


@dataclass
class Fault:
    """A fault of an operation's next calls: an error, a delayed answer, a cut connection, or wrong bytes."""

    error: Refused | None = None
    delay: float = 0.0
    hang: bool = False
    cut: bool = False
    garbage: bytes | None = None


class FakeKms:
    """One endpoint for all accounts and regions; `url` is for `endpoint_url`. Use as a context manager.

    Access keys are AKIA and the account's twelve digits; their secrets are `secret-of-` and the access key.
    """

    def __init__(self) -> None:
        self.held = Operations()
        self.calls: Counter[str] = Counter()
        self.denied: set[tuple[str, str]] = set()
        self.expired_tokens: set[str] = set()
        self._faults: dict[str, deque[Fault]] = {}
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FakeKms:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    # --- what tests do directly, not through the backend

    @staticmethod
    def environment(account: str = ACCOUNT, *, token: str | None = None, secret: str | None = None) -> dict[str, str]:
        """Environment variables with credentials of an account, which exclude the machine's own."""
        key = f"AKIA{account}"
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret or f"secret-of-{key}",
            "AWS_CONFIG_FILE": "/nowhere/config",
            "AWS_SHARED_CREDENTIALS_FILE": "/nowhere/credentials",
            "AWS_EC2_METADATA_DISABLED": "true",
            **({"AWS_SESSION_TOKEN": token} if token else {}),
        }

    def fail(self, operation: str, code: str, *, times: int = 1, status: int = 400, text: str = "") -> None:
        """The next `times` calls of an operation are answered with this error."""
        self.fault(operation, Fault(error=Refused(code, text, status=status)), times=times)

    def fault(self, operation: str, fault: Fault, *, times: int = 1) -> None:
        with self._lock:
            self._faults.setdefault(operation, deque()).extend([fault] * times)

    def heal(self) -> None:
        """Remove every fault, and end calls that hang."""
        with self._lock:
            self._faults.clear()
            self.denied.clear()
            self.expired_tokens.clear()
        released, self._released = self._released, threading.Event()
        released.set()

    def make(self, spec: str = "ECC_NIST_P256", *, place: Place | None = None, **fields: Any) -> Key:
        """A key that was not made by the backend."""
        with self._lock:
            key = Key(place or Place(ACCOUNT, REGION), spec, SPECS[spec][0](), created=self.held.now(), **fields)
            self.held.keys[key.arn] = key
        return key

    def alias(self, name: str, key: Key) -> str:
        """An alias for a key; its ARN."""
        with self._lock:
            arn = key.place.arn(f"alias/{name}")
            self.held.aliases[arn] = key.arn
        return arn

    def advance(self, days: float) -> None:
        """Move the fake's clock forward by days."""
        with self._lock:
            self.held.offset += days * 86_400

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """How often each operation is called in the block."""
        with self._lock:
            before = self.calls.copy()
        found: Counter[str] = Counter()
        yield found
        with self._lock:
            found.update(self.calls - before)

    # --- answering

    def answer(self, request: _Handler, body: bytes) -> tuple[int, bytes] | None:
        """Status and body; None if the connection is cut."""
        if "X-Amz-Target" not in request.headers:  # another protocol: STS, which refuses every caller
            return 403, b"<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code></Error></ErrorResponse>"
        try:
            target, _, operation = request.headers["X-Amz-Target"].partition(".")
            if target != "TrentService" or request.headers["Content-Type"] != "application/x-amz-json-1.1":
                raise Refused("UnknownOperationException")
            with self._lock:
                self.calls[operation] += 1
                waiting = self._faults.get(operation)
                fault = waiting.popleft() if waiting else Fault()
            if fault.cut:
                return None
            if fault.garbage is not None:
                return 200, fault.garbage
            if fault.hang or fault.delay:
                self._released.wait(_HANG_SECONDS if fault.hang else fault.delay)
            if fault.error is not None:
                raise fault.error
            place = self._caller(request, body)
            parameters = json.loads(body)
            with self._lock:
                if (place.account, operation) in self.denied:
                    raise Refused(
                        "AccessDeniedException",
                        f"User: arn:aws:iam::{place.account}:user/x is not authorized to perform: kms:{operation}",
                    )
                return 200, json.dumps(self.held.answer(operation, place, parameters)).encode()
        except Refused as error:
            return error.status, json.dumps({"__type": error.code, "message": error.text}).encode()

    def _caller(self, request: _Handler, body: bytes) -> Place:
        """Verify the request's signature and return its caller. Raises Refused as AWS does."""
        found = _AUTHORIZATION.fullmatch(request.headers.get("Authorization", ""))
        if found is None:
            raise Refused("MissingAuthenticationTokenException", "Missing Authentication Token")
        account, token = found["key"].removeprefix("AKIA"), request.headers.get("X-Amz-Security-Token")
        if account not in (ACCOUNT, OTHER_ACCOUNT):
            raise Refused("UnrecognizedClientException", "The security token included in the request is invalid.")
        if token in self.expired_tokens:
            raise Refused("ExpiredTokenException", "The security token included in the request is expired")
        auth = SigV4Auth(Credentials(found["key"], f"secret-of-{found['key']}"), "kms", found["region"])
        signed = {name: request.headers[name] for name in found["signed"].split(";")}
        rebuilt = AWSRequest("POST", f"http://{request.headers['Host']}/", headers=signed, data=body)
        rebuilt.context["timestamp"] = request.headers["X-Amz-Date"]
        canonical = auth.canonical_request(rebuilt)
        if auth.signature(auth.string_to_sign(rebuilt, canonical), rebuilt) != found["signature"]:
            raise Refused("InvalidSignatureException", f"The Canonical String should have been '{canonical}'")
        return Place(account, found["region"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeKms

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closed its connection is not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = server.fake.answer(self, body)
        if answer is None:
            self.close_connection = True
            return
        status, data = answer
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header has the fake's time."""
        assert isinstance(self.server, _Server)
        return super().date_time_string(int(self.server.fake.held.now() if timestamp is None else timestamp))

    def log_message(self, *_: object) -> None:
        """Log nothing: requests contain credentials."""
