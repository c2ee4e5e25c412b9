"""The whole life of relays' keys beside a running gateway, by command line and by API; and that none of it leaves a key
behind, wherever one looks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.commands.local import LocalGateway, local_gateway
from tests.providers.http import Answer, Fault
from tests.providers.openai import openai_server
from tests.server import post

CANARIES = {name: f"sk-{uuid.uuid4().hex}-{name}" for name in ("shared", "tenants", "next", "last", "refused")}
HERE = "/v1/admin/relays/openai"
EVER_S = 20


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relays") / "data"


@pytest.fixture(scope="module")
def gateway(data_dir: Path) -> Iterator[LocalGateway]:
    with local_gateway(data_dir, backend="scripted", log_level="debug", relay_refresh_s="0.2") as running:
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


async def test_a_keys_life_leaves_no_trace_of_it(gateway: LocalGateway, data_dir: Path) -> None:
    async with openai_server(key=CANARIES["next"]) as provider:

        async def run(*arguments: str, stdin: str | None = None) -> str:
            return await asyncio.to_thread(ok, data_dir, *arguments, stdin=stdin)

        await run("tenant", "create", "acme")
        await run("price", "set", "3.60", "--backend", "openai")
        assert "openai (openai) is active" in await run("relay", "add", "openai", "--url", provider.base_url)
        await run("policy", "set", "--tenant", "acme", "-", stdin='{"backends": ["openai"]}')
        said = await run("relay", "credential", "add", "openai", stdin=CANARIES["shared"] + "\n")
        assert CANARIES["shared"][:7] in said
        await run("relay", "credential", "add", "openai", "--tenant", "acme", stdin=CANARIES["tenants"])

        async with client(gateway, await run("token", "--tenant", "acme")) as acme:
            provider.http.fault = Fault(
                answer=Answer(json.dumps({"error": CANARIES}).encode(), 401, headers={"x-key": CANARIES["tenants"]})
            )
            refused = await until(acme, 502)
            assert refused.json()["code"] == "CREDENTIAL_REFUSED"
            assert CANARIES["tenants"][:7] in refused.json()["detail"]
            assert provider.http.requests[-1].headers["authorization"] == f"Bearer {CANARIES['tenants']}"

            provider.http.fault = None
            await run("relay", "credential", "add", "openai", "--tenant", "acme", stdin=CANARIES["next"])
            answered = await until(acme, 200)

        async with client(gateway, await run("token", "--operator")) as admin:
            answers = [refused, answered, *await what_the_api_says(admin)]
    assert [answer.status_code for answer in answers[2:]] == [*[200] * 5, 201, *[400] * 4, 404, *[400] * 2, 404]
    assert [found for answer in answers if (found := found_in(answer.content))] == []

    shown = await asyncio.to_thread(ok, data_dir, "relay", "credential", "list")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "sk-" in line]
    assert [(row[3], row[4]) for row in rows] == [
        ("shared", "active"),
        ("acme", "active"),
        ("acme", "retired"),
        ("shared", "retired"),
    ]
    assert rows[1][5], "its last use is told"
    assert stenogate(data_dir, "relay", "remove", "openai")[0] == 1  # it has credentials in use
    for row in rows[:2]:
        await asyncio.to_thread(ok, data_dir, "relay", "credential", "retire", row[0])
    await asyncio.to_thread(ok, data_dir, "relay", "remove", "openai")

    left = await asyncio.to_thread(files, data_dir)
    assert [path for path, content in left.items() if found_in(content)] == []
    assert b"relay_credential.retire" in b"".join(left.values())  # the database is among them
    assert b"CREDENTIAL_REFUSED" in left[data_dir / "serve.log"]
    assert data_dir / "sealing.keys" in left


def files(data_dir: Path) -> dict[Path, bytes]:
    """All that the installation keeps: database and its log, our log, blobs."""
    return {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}


async def what_the_api_says(admin: httpx.AsyncClient) -> list[httpx.Response]:
    """Of everything that has to do with keys, and of keys where they do not belong."""
    key = CANARIES["refused"]
    return [
        await admin.get("/metrics"),
        await admin.get("/metrics.json"),
        await admin.get("/v1/admin/config"),
        await admin.get("/v1/admin/relays"),
        await admin.get(f"{HERE}/credentials"),
        await admin.post(f"{HERE}/credentials", json={"key": CANARIES["last"]}),
        await admin.post(f"{HERE}/credentials", json={"key": f"{key} "}),
        await admin.post(f"{HERE}/credentials", json={key: "key"}),
        await admin.post(f"{HERE}/credentials", json={"key": key, "tenant": key.upper()}),
        await admin.post(f"{HERE}/credentials", content=b'{"key": "' + key.encode()),
        await admin.post(f"{HERE}/credentials", json={"key": key, "tenant": "nobody"}),
        await admin.put(HERE, json={"provider": key}),
        await admin.put(HERE, json={"provider": "openai", "base_url": f"https://{key}@api.example"}),
        await admin.delete(f"{HERE}/credentials/{key}"),
    ]


def client(gateway: LocalGateway, token: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token.strip()}"}
    return httpx.AsyncClient(base_url=gateway.client.url, headers=headers, trust_env=False, timeout=30)


async def until(http: httpx.AsyncClient, status: int) -> httpx.Response:
    """Transcribes until it is answered so: the gateway follows a change within a moment."""
    async with asyncio.timeout(EVER_S):
        while (answer := await post(http, model="whisper-1")).status_code != status:  # noqa: ASYNC110 — it polls
            await asyncio.sleep(0.1)
    return answer


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
