"""Control characters from outside never reach a terminal: in each form of output of each command."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from datetime import UTC, datetime
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from kms_jwks import errors, wire
from kms_jwks.cli import output
from kms_jwks.cli.app import cli
from kms_jwks.cli.bars import check_bars, key_bars
from kms_jwks.cli.local import _print_check
from kms_jwks.cli.options import confirm
from kms_jwks.client.transport import Reply, Transport
from kms_jwks.doctor import Check, State
from tests.unit.test_cli import LEAVES, NODE_LOCAL, OFFLINE

BAD = "a\x1b[31m\x1b]0;title\x07b\nError: forged\rc\x7f\x9b2J\u202e\u2066d\u200f"
"""Escape sequences of C0 and C1, a bell, a line of its own, DEL, and controls that reverse the direction of text."""
ASCII = BAD.encode("ascii", "ignore").decode()
OVER_API = sorted(set(LEAVES) - NODE_LOCAL - OFFLINE)


def assert_clean(text: str) -> None:
    """No control character but the newline, and no line that was forged."""
    found = {ch for ch in text if unicodedata.category(ch) in ("Cc", "Cf", "Zl", "Zp") and ch != "\n"}
    assert not found, text
    assert not re.search(r"^Error: forged", text, re.MULTILINE), text


def hostile(kind: msgspec.inspect.Type) -> Any:
    """A value of a type in which every text is hostile."""
    match kind:
        case msgspec.inspect.StructType():
            return {f.encode_name: hostile(f.type) for f in kind.fields if f.encode_name != "next" or f.required}
        case msgspec.inspect.UnionType():
            return hostile(next(t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType)))
        case msgspec.inspect.ListType():
            return [hostile(kind.item_type)]
        case msgspec.inspect.DictType():
            return {BAD: BAD, "key_set": BAD}
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.IntType():
            return 1
        case msgspec.inspect.DateTimeType():
            return datetime(2026, 11, 1, tzinfo=UTC)
        case _:
            return BAD


BODY = json.dumps({"items": [{"name": BAD}], BAD: BAD}, ensure_ascii=False).encode()


@pytest.fixture
def hostile_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of the service is well formed and full of control characters."""

    def call(self: Transport, method: str, path: str, **_: Any) -> Reply:
        reply = Reply(method, path, 202, BODY, None)
        self._on_answer(reply)  # type: ignore[misc]
        return reply

    def decode(_reply: Reply, into: type[Any]) -> Any:
        return msgspec.convert(hostile(msgspec.inspect.type_info(into)), into)

    monkeypatch.setattr(Transport, "call", call)
    for module in ("administration", "signing"):
        monkeypatch.setattr(f"kms_jwks.client.{module}.decode", decode)


MORE = {
    "key-set update": ["--issuer", BAD],
    "key create": ["--alg", "ES256"],
    "key update": ["--typ", "JWT"],
    "external-key add": ["--alg", "ES256", "--remove-at", "30d", "--jwk", "{}"],
    "external-key update": ["--remove-at", "30d"],
    "grant create": ["--everything"],
    "revoke": ["--key-set", "a", "--reason", BAD],
    "sign": ["--claims", "{}"],
    "verify": ["--audience", BAD],
}


def run(path: str, *more: str) -> Result:
    command = LEAVES[path]
    words = [*path.split(), *MORE.get(path, []), *more]
    if any("--yes" in parameter.opts for parameter in command.params):
        words.append("--yes")
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            grammar = parameter.name == "name" or path == "grant create"
            choice = isinstance(parameter.type, click.Choice)
            words.append("signer" if choice else "a" if grammar else BAD)
    return CliRunner().invoke(cli, words)


@pytest.mark.usefixtures("hostile_service")
@pytest.mark.parametrize("path", sorted(set(OVER_API) - {"version public-key"}))
def test_what_a_hostile_service_answers(path: str) -> None:
    answer = run(path)
    assert answer.exit_code == 0, answer.output
    assert_clean(answer.stdout)
    assert_clean(answer.stderr)


@pytest.mark.usefixtures("hostile_service")
@pytest.mark.parametrize("path", sorted(set(OVER_API) - {"version public-key", "client token create"}))
def test_json_is_clean_and_keeps_its_meaning(path: str) -> None:
    answer = run(path, "--json")
    assert answer.exit_code == 0, answer.output
    assert_clean(answer.stdout)
    if answer.stdout:  # deletions answer nothing
        found = json.loads(answer.stdout)
        assert BAD in (found.get(BAD), found.get("items", [{}])[0].get("name"))


def test_a_hostile_pem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transport, "call", lambda *_, **__: Reply("GET", "/", 200, ASCII.encode(), None))
    answer = run("version public-key", "--format", "pem")
    assert answer.exit_code == 0
    assert not re.search(r"[^\n -~]", answer.stdout)


def test_der_does_not_go_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transport, "call", lambda *_, **__: Reply("GET", "/", 200, b"\x1b[31m", None))
    assert run("version public-key", "--format", "der").stdout_bytes == b"\x1b[31m"
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    refused = run("version public-key", "--format", "der")
    assert refused.exit_code == 2
    assert "--output" in refused.stderr


@pytest.mark.parametrize("as_json", [False, True], ids=["people", "json"])
@pytest.mark.parametrize("cls", [errors.NotYetUsable, errors.UnexpectedAnswer, errors.ConfigurationError])
def test_hostile_problems(monkeypatch: pytest.MonkeyPatch, cls: type[errors.Error], as_json: bool) -> None:
    def call(*_: Any, **__: Any) -> Reply:
        error = cls(BAD, next_step=BAD, fields={BAD: BAD, "list": [BAD]})
        error.request_id = BAD
        raise error

    monkeypatch.setattr(Transport, "call", call)
    answer = run("key show", *(["--json"] if as_json else []))
    assert answer.exit_code != 0
    assert answer.stdout == ""
    assert_clean(answer.stderr)
    if as_json:
        assert json.loads(answer.stderr)["detail"] == BAD


@pytest.mark.parametrize(
    "words",
    [
        [BAD],
        [f"--{BAD}"],
        ["key", BAD],
        ["key", "show", f"--{BAD}"],
        ["key", "show", "a", "b", BAD],
        ["key", "create", "a", BAD, "--alg", "ES256"],
        ["key-set", "create", "a", "--key", BAD],
        ["key-set", "create", "a", "--access", BAD],
        ["grant", "create", "a", BAD, "--everything"],
        ["external-key", "add", "a", "b", "--alg", "ES256", "--jwk", "{}", "--remove-at", BAD],
        ["jwks", "--timeout", BAD],
        ["jwks", "--addr", BAD],
        ["jwks", "--token-file", f"/{BAD}"],
        ["sign", "a", "b", "--claims", f"@/{BAD}"],
        ["sign", "a", "b", "--claims", f'{{"{BAD}"'],
        ["client", "delete", BAD],
        ["node", "forget", BAD],
        ["db", "check", "--config", f"/{BAD}"],
    ],
    ids=repr,
)
def test_messages_that_repeat_an_argument(words: list[str]) -> None:
    answer = CliRunner().invoke(cli, words)
    assert answer.exit_code in (1, 2)
    assert_clean(answer.output)
    assert "Traceback" not in answer.output


def test_questions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    with output.clean_output():
        confirm(ASCII.replace("\n", " "), sure=False)
    assert_clean(capsys.readouterr().err)


def test_bars() -> None:
    timeline = msgspec.convert(hostile(msgspec.inspect.type_info(wire.Timeline)), wire.Timeline)
    safety = msgspec.convert(hostile(msgspec.inspect.type_info(wire.Safety)), wire.Safety)
    for line in (*key_bars(timeline, 80), *check_bars(safety, 80)):
        assert_clean(line)


@pytest.mark.parametrize("state", State)
def test_checks_of_the_doctor(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    with output.clean_output():
        _print_check(Check(BAD, state, BAD, BAD))
    assert_clean(capsys.readouterr().out)


def test_colours_on_a_terminal_are_only_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for chosen in (output.table, output.details):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        with output.clean_output():
            if chosen is output.table:
                output.table(("NAME",), [(BAD,)])
            else:
                output.details(("name", BAD))
        written = terminal.getvalue()
        assert "\x1b[1m" in written, "a terminal shows the headings in bold"
        assert "?[31m" in written
        assert "\x1b[31m" not in written
        assert_clean(re.sub(r"\x1b\[[01]m", "", written))


def test_text_streams_stay_text_streams() -> None:
    with output.clean_output():
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")  # type: ignore[arg-type]
        inside = sys.stdout
        with output.raw_output():
            assert sys.stdout is not inside
        assert sys.stdout is inside
    assert sys.stdout is not inside
