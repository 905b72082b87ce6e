"""The command line as a whole: help, usage errors, exit codes, and asking before something is destroyed."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from kms_jwks import access, errors, times, wire
from kms_jwks.cli import options, output
from kms_jwks.cli.app import cli
from kms_jwks.cli.options import confirm
from kms_jwks.cli.output import ExitCode, exit_code
from kms_jwks.client.transport import Reply, Transport
from kms_jwks.http.examples import EXAMPLES


def commands(group: click.Group = cli, *path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


ALL = dict(commands())
LEAVES = {path: command for path, command in ALL.items() if not isinstance(command, click.Group)}
NODE_LOCAL = {"init", "serve", "custodian", "doctor", "db upgrade", "db check", "db restored"}
OFFLINE = {"external-key repair"}
"""Commands that need neither the service nor the node's settings."""
DESTRUCTIVE = {
    "version revoke": ["s", "k", "1"],
    "revoke": ["--key-set", "s", "--reason", "x"],
    "version destroy": ["s", "k", "1"],
    "external-key remove": ["s", "kid"],
    "client delete": ["c"],
    "client token revoke": ["c", "id"],
    "grant delete": ["id"],
    "node forget": ["w"],
}


def test_the_commands_are_those_that_were_promised() -> None:
    assert sorted(cli.commands) == sorted(
        {"init", "serve", "custodian", "doctor", "db"}
        | {"key-set", "key", "version", "external-key", "client", "grant", "node"}
        | {"revoke", "jwks", "sign", "verify"}
    )


@pytest.mark.parametrize("path", ALL)
def test_every_command_explains_itself(path: str) -> None:
    answer = CliRunner().invoke(cli, [*path.split(), "--help"], terminal_width=80)
    assert answer.exit_code == 0
    command = ALL[path]
    summary = (command.help or "").splitlines()[0]
    assert summary.endswith(".")
    assert summary[0].isupper()
    assert max(map(len, answer.output.splitlines())) <= 80
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help
            assert parameter.opts[0] in answer.output
    listed = CliRunner().invoke(cli, [*path.split()[:-1], "--help"], terminal_width=80).output
    assert (command.short_help or "?") in " ".join(listed.split())


@pytest.mark.parametrize("path", sorted(set(LEAVES) - NODE_LOCAL - OFFLINE))
def test_every_command_over_the_api_connects_in_the_same_way(path: str) -> None:
    options = {option for parameter in LEAVES[path].params for option in parameter.opts}
    assert {"--addr", "--token-file", "--ca-cert", "--client-cert", "--client-key", "--timeout", "--json"} <= options
    assert "--token" not in options, "what stands on the command line is seen by everybody on the machine"


@pytest.mark.parametrize("path", sorted(NODE_LOCAL))
def test_commands_on_the_node_take_its_settings(path: str, tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    answer = CliRunner().invoke(cli, [*path.split(), "--config", str(missing)])
    assert answer.exit_code == ExitCode.USAGE
    assert str(missing) in answer.stderr
    assert "Traceback" not in answer.output


@pytest.mark.parametrize(("path", "words"), DESTRUCTIVE.items(), ids=DESTRUCTIVE)
def test_what_destroys_asks_and_without_anybody_to_ask_does_nothing(path: str, words: list[str]) -> None:
    assert any("--yes" in parameter.opts for parameter in LEAVES[path].params)
    answer = CliRunner().invoke(cli, [*path.split(), *words], input="y\n")
    assert answer.exit_code == ExitCode.USAGE, "the socket is never used: unit tests have none"
    assert "--yes" in answer.stderr


@pytest.mark.parametrize(("typed", "done"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_on_a_terminal_the_answer_counts(typed: str, done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    if done:
        confirm("Destroy it?", sure=False)
    else:
        with pytest.raises(click.Abort):
            confirm("Destroy it?", sure=False)


def test_yes_asks_nobody() -> None:
    confirm("Destroy it?", sure=True)


USAGE = [
    ["key-set", "create"],
    ["key-set", "create", "a", "--access", "secret"],
    ["key-set", "create", "a", "--key", "noalg"],
    ["key-set", "create", "a", "--cache-lifetime", "5 minutes"],
    ["key-set", "update", "a"],
    ["key", "update", "a", "b"],
    ["key", "create", "a", "b"],
    ["external-key", "add", "s", "kid", "--alg", "ES256", "--remove-at", "30d"],
    ["external-key", "add", "s", "kid", "--alg", "ES256", "--remove-at", "tomorrow", "--jwk", "{}"],
    ["external-key", "add", "s", "kid", "--alg", "ES256", "--remove-at", "30d", "--jwk", "{}", "--pem", "x"],
    ["external-key", "add", "s", "--remove-at", "30d", "--pem", "x"],
    ["external-key", "add", "s", "kid", "--remove-at", "30d", "--jwks", '{"keys":[{}]}'],
    ["external-key", "add", "s", "kid", "--remove-at", "30d", "--jwk", "{}", "--kid", "a"],
    ["external-key", "add", "s", "--remove-at", "30d", "--jwks", '{"keys":[]}'],
    ["external-key", "add", "s", "--remove-at", "30d", "--jwks", '{"keys":[{"kid":"a","d":"AA"}]}'],
    ["external-key", "add", "s", "--remove-at", "30d", "--jwk", '{"keys":[{"kid":"a","d":"AA"}]}'],
    ["external-key", "repair", "--jwk", '{"kty":"EC","d":"AA"}'],
    ["external-key", "repair", "--jwk", '{"keys":[1]}'],
    ["external-key", "update", "s", "kid"],
    ["version", "create", "s", "k", "--adopt", "x", "--accept", "--public-key", '{"kty":"EC","d":"AA"}'],
    ["version", "create", "s", "k", "--adopt", "x", "--accept", "--public-key", "-----BEGIN PRIVATE KEY-----"],
    ["revoke", "--backend", "b", "--reason", "x", "--external-keys", "--dry-run"],
    ["grant", "create", "c", "signer"],
    ["grant", "create", "c", "signer", "--everything", "--key-set", "s"],
    ["grant", "create", "c", "signer", "--everything", "--key", "k"],
    ["grant", "create", "c", "king", "--everything"],
    ["sign", "s", "k"],
    ["sign", "s", "k", "--claims", "[1]"],
    ["sign", "s", "k", "--claims", '{"a":1,"a":2}'],
    ["sign", "s", "k", "--claims", "@/does/not/exist"],
    ["verify", "s", "t"],
    ["verify", "--audience", "a"],
    ["verify", "--audience", "a", "b", "c", "d"],
    ["jwks", "--timeout", "soon"],
    ["jwks", "--addr", "http://keys.example.com"],
    ["jwks", "--addr", "ftp://127.0.0.1"],
    ["jwks", "--token-file", "/does/not/exist"],
    ["init", "--signer-token-file", "x"],
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage_exits_with_2_and_says_why(words: list[str]) -> None:
    answer = CliRunner().invoke(cli, words)
    assert answer.exit_code == ExitCode.USAGE, answer.output
    assert answer.stdout == ""
    assert "Error: " in answer.stderr
    assert "Traceback" not in answer.stderr


# --- exit codes -------------------------------------------------------------------------------------------------------


def expected(cls: type[errors.Error]) -> ExitCode:
    if issubclass(cls, errors.Unauthenticated | errors.Forbidden):
        return ExitCode.DENIED
    later = (errors.Unavailable, errors.ServiceUnreachable, errors.BackendTimeout)
    if issubclass(cls, later) or getattr(cls, "retryable", False):
        return ExitCode.LATER
    return ExitCode.USAGE if issubclass(cls, errors.ConfigurationError) else ExitCode.REFUSED


@pytest.mark.parametrize("cls", errors.BY_CODE.values(), ids=lambda cls: cls.__name__)
def test_every_error_has_its_exit_code(cls: type[errors.Error]) -> None:
    assert exit_code(cls()) is expected(cls)


@pytest.mark.parametrize(("status", "code"), [(429, 4), (502, 4), (503, 4), (504, 4), (500, 1), (404, 1), (None, 1)])
def test_an_answer_of_something_between_has_the_exit_code_of_its_status(status: int | None, code: int) -> None:
    error = errors.UnexpectedAnswer("what")
    error.status = status
    assert exit_code(error) == code


def test_a_report_is_short_and_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.NotYetUsable(
        "Version 2 is \x1b[2Jtoo young.", retry_after=9, fields={"usable_at": "2026-11-24T00:00:00Z", "n": 3}
    )
    error.request_id = "req-1"
    output.report(error, as_json=False)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "Error: Version 2 is ?[2Jtoo young.",
        "Next: Repeat the call at usable_at or later.",
        "(usable_at: 2026-11-24T00:00:00Z; n: 3; retry after: 9 s; request id: req-1)",
    ]


def test_errors_for_programs_are_problem_documents() -> None:
    error = errors.NotYetUsable("Too young.", fields={"usable_at": "x", "type": "never"})
    assert output.document(error) == {
        "type": "urn:kms-jwks:problem:not_yet_usable",
        "title": errors.NotYetUsable.title,
        "detail": "Too young.",
        "next_step": errors.NotYetUsable.next_step,
        "usable_at": "x",
    }


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("0", 0), ("90", 90), ("60s", 60), ("5m", 300), ("24h", 86_400), ("90d", 7_776_000), ("1w", 604_800)],
)
def test_durations(written: str, seconds: int) -> None:
    assert options.DURATION.convert(written, None, None) == seconds


@pytest.mark.parametrize("written", ["", "-1", "1.5h", "h", "5 m", "1h30m", "٣", "99999999999"])
def test_what_is_no_duration(written: str) -> None:
    with pytest.raises(click.BadParameter):
        options.DURATION.convert(written, None, None)


@pytest.mark.parametrize(
    ("written", "instant"),
    [
        ("2026-12-31", "2026-12-31T00:00:00Z"),
        ("2026-12-31T23:00:00Z", "2026-12-31T23:00:00Z"),
        ("2026-12-31T23:00:00+02:00", "2026-12-31T21:00:00Z"),
    ],
)
def test_instants(written: str, instant: str) -> None:
    assert options.INSTANT.convert(written, None, None) == instant


def test_an_instant_from_now_on() -> None:
    found = datetime.fromisoformat(options.INSTANT.convert("30d", None, None))
    assert 29.99 < (found - datetime.now(UTC)).total_seconds() / 86_400 <= 30


@pytest.mark.parametrize("written", ["", "tomorrow", "2026-13-01", "2026-12-31T23:00:00", "20261231", "30"])
def test_what_is_no_instant(written: str) -> None:
    with pytest.raises(click.BadParameter):
        options.INSTANT.convert(written, None, None)


def test_keys_to_create() -> None:
    assert options.KEY_SPEC.convert("a:ES256", None, None) == {"name": "a", "alg": "ES256"}
    assert options.KEY_SPEC.convert("a:RS256:3072", None, None) == {"name": "a", "alg": "RS256", "rsa_bits": 3072}


@pytest.mark.parametrize("written", ["a", "a:", ":ES256", "a:RS256:big", "a:RS256:1:2"])
def test_what_is_no_key_to_create(written: str) -> None:
    with pytest.raises(click.BadParameter):
        options.KEY_SPEC.convert(written, None, None)


def test_values_from_files(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    file.write_text('{"sub": "ä"}', encoding="utf-8")
    assert options.json_object(f"@{file}", "--claims") == {"sub": "ä"}
    file.write_bytes(b'{"sub": "\xff"}')
    with pytest.raises(click.UsageError, match="not UTF-8"):
        options.json_object(f"@{file}", "--claims")
    file.write_bytes(b" " * 3_000_000)
    with pytest.raises(click.UsageError, match="not read"):
        options.json_object(f"@{file}", "--claims")


# --- what people see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0s"), (61, "61s"), (300, "5m"), (7200, "2h"), (86_400, "1d")])
def test_durations_are_shown_in_their_largest_unit(seconds: int, shown: str) -> None:
    assert output.duration(seconds) == shown


def test_tables_fit_80_columns_and_lose_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kid = "k" * 43
    row = ("orders", "jwt", "public", "default, other", "https://issuer.example.com/orders", kid)
    monkeypatch.setenv("COLUMNS", "80")
    output.table(("A", "B", "C", "D", "E", "F"), [row])
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("k") == 43
    monkeypatch.delenv("COLUMNS")
    output.table(("A", "B", "C", "D", "E", "F"), [row])
    assert "  ".join(row) in capsys.readouterr().out.splitlines()[1].replace("   ", "  ")


def test_times_are_whole_in_tables_where_longer_words_are_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    time, kid = "2026-11-01T12:00:00Z", "k" * 43
    monkeypatch.setenv("COLUMNS", "80")
    output.table(("NUMBER", "SINCE", "UNTIL", "KID", "NOTES"), [(1, time, time, kid, "a note of several words")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].count(time) == 2


@pytest.mark.parametrize(
    ("words", "answers", "whole", "terms"),
    [
        (
            ["node", "list"],
            {
                "/v1/nodes": {"items": [EXAMPLES[wire.Node] | {"node": "orders-node-12"}]},
                "/v1/custodian": wire.Custodian,
            },
            [EXAMPLES[wire.Node]["worker"], "2026-11-20T14:30:00Z", "9 of 10 s", "softhsm: ok"],
            ["EPOCH", "LAG", "LIVE", "LEASE LEFT", "HEARTBEAT", "term"],
        ),
        (["key", "timeline", "shop", "main"], {"timeline": EXAMPLES[wire.Timeline]}, ["2027-01-31T09:00:01Z"], ["I1"]),
        (
            ["version", "safety", "shop", "main", "1"],
            {"safety": EXAMPLES[wire.Safety]},
            ["2026-11-03T09:00:01Z"],
            ["I1", "LEFT"],
        ),
    ],
    ids=["node list", "key timeline", "version safety"],
)
def test_reports_fit_80_columns_and_explain_their_terms(
    words: list[str], answers: dict[str, Any], whole: list[str], terms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Transport, method: str, path: str, **_: Any) -> Reply:
        found = next(answer for end, answer in answers.items() if path.endswith(end))
        return Reply(
            method,
            path,
            200,
            msgspec.json.encode(EXAMPLES.get(found, found) if isinstance(found, type) else found),
            None,
        )

    monkeypatch.setattr(Transport, "call", call)
    answer = CliRunner().invoke(cli, words, env={"COLUMNS": "80"})
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for text in whole:
        assert text in answer.stdout
    for term in terms:
        assert any(line.startswith(f"{term} ") and len(line.split("  ", 1)) == 2 for line in lines[-12:]), term


def test_times_have_one_form_everywhere() -> None:
    """RFC 3339 in UTC with `Z`: `times` writes them, and nothing else does but what parses or shortens one."""
    source = Path(times.__file__).parent
    others = re.compile(r"strftime\(|isoformat\(\)|:%[YHmd]")
    found = {str(file.relative_to(source)) for file in source.rglob("*.py") if others.search(file.read_text())}
    assert found == {"times.py", "cli/bars.py", "cli/options.py"}
    moment = datetime(2026, 11, 1, 12, 0, 0, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert output.when(moment) == times.format_instant(times.to_instant(moment)) == "2026-11-01T10:00:00Z"
    assert times.format_earliest(times.to_instant(moment)) == "2026-11-01T10:00:01Z"
    assert output.when(None) == "-"


def test_output_that_is_no_terminal_has_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A",), [("\x1b[31mred",)])
    output.details(("name", "value\x07"))
    output.table(("A",), [])
    assert capsys.readouterr().out == "A\n?[31mred\nname  value?\n(none)\n"


def test_every_role_can_be_granted() -> None:
    roles = next(p for p in LEAVES["grant create"].params if p.name == "role")
    assert isinstance(roles.type, click.Choice)
    assert set(roles.type.choices) == set(access.Role)
    for role in access.Role:
        wire.convert({"client": "c", "role": role.value, "scope": {}}, wire.GrantCreate)
