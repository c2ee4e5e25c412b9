"""Settings changed from the command line, under a gateway that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.commands.local import LocalGateway, local_gateway

EVER_S = 30


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "data"


@pytest.fixture(scope="module")
def gateway(data_dir: Path) -> Iterator[LocalGateway]:
    with local_gateway(data_dir, model="micro") as running:
        yield running


def stenogate(data_dir: Path, *arguments: str) -> tuple[int, str]:
    """Exit status, and all that it says."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env={**os.environ, "STENOGATE_DATA_DIR": str(data_dir), "COLUMNS": "160"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_operator_changes_a_setting_and_takes_it_back(gateway: LocalGateway, data_dir: Path) -> None:
    status, token = stenogate(data_dir, "token", "--operator")
    assert status == 0, token
    admin = {"Authorization": f"Bearer {token.strip()}"}
    with httpx.Client(base_url=gateway.client.url, headers=admin, trust_env=False) as http:

        def follows(source: str, value: float) -> None:
            deadline = time.monotonic() + EVER_S
            while True:
                entries = {entry["name"]: entry for entry in http.get("/v1/admin/config").json()["data"]}
                if (entries["stream_idle_s"]["source"], entries["stream_idle_s"]["value"]) == (source, value):
                    return
                assert time.monotonic() < deadline
                time.sleep(0.1)

        assert stenogate(data_dir, "config", "set", "stream_idle_s=7.5", "STENOGATE_MAX_STREAMS=9")[0] == 0
        follows("override", 7.5)
        _, shown = stenogate(data_dir, "config", "show")
        assert [line.split()[1:-1:2] for line in shown.splitlines() if "stream_idle_s" in line] == [
            ["stream_idle_s", "7.5", "override", "new"]
        ]
        assert stenogate(data_dir, "config", "set", "stream_idle_s=")[0] == 0
        follows("default", 60.0)
    with httpx.Client(base_url=gateway.client.url, headers={"Authorization": f"Bearer {gateway.client.token}"}) as http:
        assert http.get("/v1/admin/config").status_code == 403  # the demo tenant's, with every scope


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("config", "set", "port=1"), "STENOGATE_PORT"),
        (("config", "set", "max_streams=5", "max_streams_per_address=0"), "max_streams_per_address"),
        (("config", "set", "max_streams"), "NAME=VALUE"),
        (("token", "--operator", "--tenant", "demo"), "--operator"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    gateway: LocalGateway, data_dir: Path, arguments: tuple[str, ...], said: str
) -> None:
    status, answer = stenogate(data_dir, *arguments)
    assert status == 1
    assert said in answer
    assert answer.startswith("stenogate: ")
    assert "Traceback" not in answer
