"""`./dev bench` runs, and its report has the shape that programs rely on. How fast it was is not judged here.

Two kinds of keys; all four with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kms_jwks import errors, strictjson
from tests.bench import measure, parser

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
ROWS = ["ES256", "RS256-2048", "RS256-3072", "EdDSA"] if LONG else ["ES256", "EdDSA"]


def figures(found: dict[str, Any]) -> bool:
    return all(
        isinstance(found[name], int | float) and found[name] >= 0
        for name in ("per_second", "requests", "p50_ms", "p99_ms", "load_generator_cpus")
    )


@pytest.mark.slow
@pytest.mark.softhsm
def test_the_report_has_its_shape() -> None:
    chosen = [] if LONG else [f"--only={name}" for name in ROWS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick", "--json", "--workers", "1", *chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {
        "machine",
        "workers",
        "seconds_per_figure",
        "load",
        "algorithms",
        "jwks",
        "json_ms_per_mib",
        "took_seconds",
    }
    assert [row["name"] for row in report["algorithms"]] == ROWS
    for row in report["algorithms"]:
        assert set(row) == {"name", "raw", "http", "http_one_connection", "http_batch", "ratios"}
        assert row["raw"]["module_per_second"] > 0
        assert row["raw"]["backend_per_second"] > 0
        assert row["http_batch"]["size"] == 64
        assert all(figures(row[name]) for name in ("http", "http_one_connection", "http_batch"))
        assert all(ratio > 0 for ratio in row["ratios"].values())
    assert figures(report["jwks"]["full"])
    assert figures(report["jwks"]["not_modified"])
    assert set(report["json_ms_per_mib"]) == {name for name, _ in parser.shapes()}


def test_hostile_json_is_a_mebibyte_and_is_read_or_refused() -> None:
    outcomes = {}
    for name, body in parser.shapes():
        assert 0.75 * parser.MIB < len(body) <= parser.MIB, name
        try:
            strictjson.loads(body)
        except errors.MalformedBody as error:
            outcomes[name] = error.detail
    assert "20000 structural characters" in outcomes["arrays nested 29 deep"]
    assert "truncated" in outcomes["allowed: the same, truncated"]
    assert "twice" in outcomes["allowed: the same, a name twice"]
    assert "twice" in outcomes["allowed: many names, one twice"]
    assert "allowed: objects nested 29 deep" not in outcomes


def test_every_kind_of_key_is_measured_unless_some_are_named() -> None:
    assert [row.name for row in measure.ROWS] == ["ES256", "RS256-2048", "RS256-3072", "EdDSA"]
    assert measure.chosen_rows(None) == measure.ROWS
    assert [row.name for row in measure.chosen_rows(["EdDSA"])] == ["EdDSA"]


def test_a_wrong_option_is_refused_before_anything_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--workers", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "--workers" in done.stderr
