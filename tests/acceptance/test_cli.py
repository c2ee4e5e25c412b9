"""The command line beside a running gateway, and without one."""

from __future__ import annotations

import csv
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import jwt
import pytest

from dispatchers.engine.models import MICRO_SAMPLES
from gateway.commands.local import LocalGateway, local_gateway

CLIP = MICRO_SAMPLES / "clip02.wav"
SAID = "we need to cancel the address before friday"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "data"


@pytest.fixture(scope="module")
def gateway(data_dir: Path) -> Iterator[LocalGateway]:
    with local_gateway(data_dir, model="micro") as running:
        yield running


def stenogate(data_dir: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env={**os.environ, "STENOGATE_DATA_DIR": str(data_dir), "COLUMNS": "160"},
        input=stdin,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def ok(data_dir: Path, *arguments: str, stdin: str | None = None) -> str:
    done = stenogate(data_dir, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_tenant_is_served_billed_and_shut_out(gateway: LocalGateway, data_dir: Path) -> None:
    ok(data_dir, "tenant", "create", "acme", "--name", "Acme Ltd")
    assert "Acme Ltd" in ok(data_dir, "tenant", "list")
    ok(data_dir, "budget", "set", "--tenant", "acme", "10.00", "--period", "day")
    ok(data_dir, "price", "set", "3.60", "--tenant", "acme")
    assert " 3.6 " in ok(data_dir, "price", "list")

    token = ok(data_dir, "token", "--tenant", "acme", "--ttl", "5m").removesuffix("\n")
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 300

    said = ok(data_dir, "transcribe", str(CLIP), "--model", "micro", "--token", token)
    assert said == f"{SAID}\n"

    rows = list(csv.DictReader(ok(data_dir, "statement", "--tenant", "acme").splitlines()))
    line = next(row for row in rows if row["record"] == "line")
    assert line["billed_ms"] == "3883"
    assert line["amount"] == "0.00"  # 3.883 s at 3.60 an hour is 0.003883
    bill = json.loads(ok(data_dir, "statement", "--tenant", "acme", "--format", "json"))
    assert bill["reconciliation"]["difference_ms"] == 0
    assert bill["reconciliation"]["ledger_amount"] == "0.003883000"

    spare = ok(data_dir, "token", "--tenant", "acme").strip()
    ok(data_dir, "revoke", "-", stdin=spare)
    assert "TOKEN_REVOKED" in stenogate(data_dir, "transcribe", str(CLIP), "--token", spare).stderr

    ok(data_dir, "tenant", "suspend", "acme")
    refused = stenogate(data_dir, "transcribe", str(CLIP), "--token", token)
    assert refused.returncode == 1
    assert "TENANT_SUSPENDED" in refused.stderr


def test_a_policy_is_shown_changed_and_refused(gateway: LocalGateway, data_dir: Path) -> None:
    ok(data_dir, "tenant", "create", "strict")
    shown = json.loads(ok(data_dir, "policy", "show", "--tenant", "strict"))
    body = shown["body"] | {"max_streams": 1, "models": ["micro"]}
    ok(data_dir, "policy", "set", "--tenant", "strict", "-", stdin=json.dumps(body))
    assert json.loads(ok(data_dir, "policy", "show", "--tenant", "strict")) == {
        "version": shown["version"] + 1,
        "body": body,
    }
    wrong = stenogate(data_dir, "policy", "set", "--tenant", "strict", "-", stdin='{"max_streams": "many"}')
    assert wrong.returncode == 1
    assert "max_streams" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_policys_versions_are_scheduled_compared_and_rolled_back(gateway: LocalGateway, data_dir: Path) -> None:
    def policy(verb: str, *words: str, **more: str) -> str:
        return ok(data_dir, "policy", verb, "--tenant", "versioned", *words, **more)

    ok(data_dir, "tenant", "create", "versioned")
    policy("set", "-", stdin='{"max_streams": 2}')
    assert policy("diff", "1", "2") == "max_streams: 8 → 2\n"
    assert "2099-01-01" in policy("set", "-", "--from", "2099-01-01T00:00Z", stdin='{"max_streams": 3}')
    listed = policy("list")
    assert all(status in listed for status in ("scheduled", "in force", "past"))
    policy("withdraw", "3")
    assert "version 4 is in force" in policy("rollback", "1")
    assert json.loads(policy("show", "--version", "2"))["body"]["max_streams"] == 2
    assert json.loads(policy("show"))["body"]["max_streams"] == 8

    assert policy("check", "-", stdin='{"max_streams": 1}') == "max_streams: 8 → 1\n"
    draft = '{"backends": ["deepgrm"], "aliases": {"a": "b", "b": "a"}}'
    for words in (("check", "-"), ("set", "-", "--newest", "4")):
        wrong = stenogate(data_dir, "policy", words[0], "--tenant", "versioned", *words[1:], stdin=draft)
        assert wrong.returncode == 1
        assert "circle" in wrong.stdout + wrong.stderr
    late = stenogate(data_dir, "policy", "set", "-t", "versioned", "-", "--newest", "2", stdin="{}")
    assert (late.returncode, "Version 4 was put meanwhile" in late.stderr) == (1, True)
    past = stenogate(data_dir, "policy", "set", "-t", "versioned", "-", "--from", "2020-01-01", stdin="{}")
    assert (past.returncode, "has passed" in past.stderr) == (1, True)


def test_a_file_goes_as_a_stream_as_text_and_as_subtitles(gateway: LocalGateway, data_dir: Path) -> None:
    assert ok(data_dir, "transcribe", str(CLIP), "--stream", "--model", "micro") == f"{SAID}\n"
    subtitles = ok(data_dir, "transcribe", str(CLIP), "--model", "micro", "--format", "srt")
    assert " --> " in subtitles
    assert SAID.split(maxsplit=1)[0] in subtitles


def test_the_pasted_curl_line_works(gateway: LocalGateway, data_dir: Path) -> None:
    announced = json.loads((data_dir / "serve.json").read_text())
    assert stat.S_IMODE((data_dir / "serve.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((data_dir / "signing.key").stat().st_mode) == 0o600
    answer = subprocess.run(
        [
            *("curl", "-sS", f"{announced['url']}/v1/audio/transcriptions", "-F", "model=micro", "-F", f"file=@{CLIP}"),
            *("-H", f"Authorization: Bearer {announced['token']}"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert json.loads(answer.stdout)["text"] == SAID


def test_the_doctor_finds_nothing_amiss(gateway: LocalGateway, data_dir: Path) -> None:
    report = stenogate(data_dir, "doctor")
    assert report.returncode == 0, report.stdout
    assert "embedded" in report.stdout


def test_without_a_gateway_a_chore_brings_its_own_database(tmp_path: Path) -> None:
    ok(tmp_path, "tenant", "create", "alone")
    assert "alone" in ok(tmp_path, "tenant", "list")
    unserved = stenogate(tmp_path, "transcribe", str(CLIP))
    assert unserved.returncode == 1
    assert "stenogate serve" in unserved.stderr  # the remedy


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("token", "--tenant", "nobody"), "no such"),
        (("token", "--tenant", "x", "--scope", "root"), "no such scope"),
        (("statement", "--tenant", "demo", "--month", "november"), "2026-11"),
        (("price", "set", "-1"), ""),
        (("tenant", "create", "Not A Slug"), ""),
    ],
)
def test_mistakes_get_a_sentence(gateway: LocalGateway, data_dir: Path, arguments: tuple[str, ...], named: str) -> None:
    done = stenogate(data_dir, *arguments)
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(gateway: LocalGateway, tmp_path: Path) -> None:
    port = httpx.URL(gateway.client.url).port
    done = stenogate(tmp_path, "serve", "--port", str(port))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "port" in done.stderr
