"""The whole life of relays' keys beside a running gateway, by command line and by API; and that none of it leaves a key
behind, wherever one looks."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.commands.local import LocalGateway, local_gateway

CANARIES = {name: f"sk-{uuid.uuid4().hex}-{name}" for name in ("shared", "next", "tenants", "refused")}
HERE = "/v1/admin/relays/deepgram"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relays") / "data"


@pytest.fixture(scope="module")
def gateway(data_dir: Path) -> Iterator[LocalGateway]:
    with local_gateway(data_dir, backend="scripted", log_level="debug") as running:
        yield running


def stenogate(data_dir: Path, *arguments: str, stdin: str | None = None, **environment: str) -> tuple[int, str]:
    """Exit status, and all that it says, which never is a key."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env={**os.environ, "STENOGATE_DATA_DIR": str(data_dir), "COLUMNS": "200", **environment},
        input=stdin,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = done.stdout + done.stderr
    assert not found_in(said.encode())
    assert "Traceback" not in said
    return done.returncode, said


def ok(data_dir: Path, *arguments: str, stdin: str | None = None, **environment: str) -> str:
    status, said = stenogate(data_dir, *arguments, stdin=stdin, **environment)
    assert status == 0, said
    return said


def found_in(content: bytes) -> list[str]:
    """The canaries of which more than the shown beginning stands there, plain or in hexadecimal."""
    return [
        name
        for name, key in CANARIES.items()
        if key[8:].encode() in content or key[8:].encode().hex().encode() in content.lower()
    ]


def test_a_keys_life_leaves_no_trace_of_it(gateway: LocalGateway, data_dir: Path) -> None:
    ok(data_dir, "tenant", "create", "acme")
    assert "deepgram (deepgram) is active" in ok(data_dir, "relay", "add", "deepgram", "--model", "nova-3")
    added = ok(data_dir, "relay", "credential", "add", "deepgram", stdin=CANARIES["shared"] + "\n")
    assert CANARIES["shared"][:7] in added
    ok(data_dir, "relay", "credential", "add", "deepgram", "--tenant", "acme", stdin=CANARIES["tenants"])

    token = ok(data_dir, "token", "--operator").strip()
    admin = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=gateway.client.url, headers=admin, trust_env=False) as http:
        answers = [
            http.get("/v1/admin/relays"),
            http.post(f"{HERE}/credentials", json={"key": CANARIES["next"]}),
            http.get(f"{HERE}/credentials"),
            http.post(f"{HERE}/credentials", json={"key": CANARIES["refused"] + " "}),
            http.post(f"{HERE}/credentials", json={CANARIES["refused"]: "key"}),
            http.post(f"{HERE}/credentials", json={"key": CANARIES["refused"], "tenant": "nobody"}),
            http.post(f"{HERE}/credentials", content=b'{"key": "' + CANARIES["refused"].encode()),
            http.put(HERE, json={"provider": CANARIES["refused"]}),
            http.put(HERE, json={"provider": "deepgram", "base_url": f"https://{CANARIES['refused']}@api.example"}),
            http.delete(f"{HERE}/credentials/{CANARIES['refused']}"),
            http.get("/metrics"),
            http.get("/metrics.json"),
            http.get("/v1/admin/config"),
        ]
    assert [answer.status_code for answer in answers] == [200, 201, 200, *[400] * 2, 404, *[400] * 3, 404, *[200] * 3]
    assert [found for answer in answers if (found := found_in(answer.content))] == []

    listed = [
        line.split("│")[1:-1] for line in ok(data_dir, "relay", "credential", "list").splitlines() if "sk-" in line
    ]
    states = [(whose.strip(), state.strip()) for _, whose, _, state, *_ in listed]
    assert states == [("shared", "active"), ("acme", "active"), ("shared", "retired")]
    assert "nova-3" in ok(data_dir, "relay", "list")
    refused, why = stenogate(data_dir, "relay", "remove", "deepgram")
    assert refused == 1
    assert "retire" in why
    for row in listed[:2]:  # those in use
        ok(data_dir, "relay", "credential", "retire", row[-1].strip())
    ok(data_dir, "relay", "remove", "deepgram")

    files = [path for path in data_dir.rglob("*") if path.is_file()]
    assert {"serve.log", "sealing.keys", "PG_VERSION"} <= {path.name for path in files}
    assert {path: found for path in files if (found := found_in(path.read_bytes()))} == {}
    assert b"relay_credential" in b"".join(path.read_bytes() for path in files)  # so it would have been found
    assert "v1/admin/relays" in (data_dir / "serve.log").read_text()


def test_the_master_key_is_replaced_while_the_gateway_runs(gateway: LocalGateway, data_dir: Path) -> None:
    ok(data_dir, "relay", "add", "groq")
    ok(data_dir, "relay", "credential", "add", "groq", stdin=CANARIES["shared"])
    former = (data_dir / "sealing.keys").read_text()
    fresh = f"k2:{'A' * 43}="
    said = ok(data_dir, "relay", "rewrap", STENOGATE_SEALING_KEYS=f"{fresh},{former}")
    assert said.startswith("1 put under the master key k2")
    assert " k2 " in ok(data_dir, "relay", "credential", "list", "groq")
    status, said = stenogate(data_dir, "relay", "rewrap", STENOGATE_SEALING_KEYS=f"k3:{'A' * 43}=")
    assert status == 1
    assert "`k2`" in said


@pytest.mark.parametrize(
    ("arguments", "given", "named"),
    [
        (("relay", "add", "Deepgram"), {}, "lower-case"),
        (("relay", "add", "mine"), {}, "assemblyai"),
        (("relay", "add", "vllm", "--provider", "openai-compatible"), {}, "base_url"),
        (("relay", "add", "d", "--provider", "deepgram", "--url", "http://10.0.0.7"), {}, "RELAY_ALLOW_HTTP"),
        (("relay", "remove", "nothing"), {}, "no such relay"),
        (("relay", "disable", "nothing"), {}, "no such relay"),
        (("relay", "credential", "add", "nothing"), {"stdin": CANARIES["refused"]}, "no such relay"),
        (("relay", "credential", "add", "openai"), {"stdin": ""}, "A key is"),
        (("relay", "credential", "retire", CANARIES["refused"]), {}, "relay credential list"),
        (("relay", "list"), {"STENOGATE_SEALING_KEYS": CANARIES["refused"]}, "STENOGATE_SEALING_KEYS: "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    gateway: LocalGateway, data_dir: Path, arguments: tuple[str, ...], given: dict[str, str], named: str
) -> None:
    status, said = stenogate(data_dir, *arguments, **given)
    assert status == 1
    assert named in said
    assert said.startswith("stenogate: ")
