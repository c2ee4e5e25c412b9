"""The README's examples, taken from it and run as they stand against a gateway."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.commands.local import LocalGateway, local_gateway

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SAID = "we need to cancel the address before friday"
LONG_BEGINS = "where is the hospital"

STREAM_DRIVER = """
import {{ readFileSync }} from "node:fs";
const wav = readFileSync("dispatchers/engine/micro/samples/clip02.wav");
const samples = new Int16Array(wav.buffer.slice(wav.byteOffset + 44, wav.byteOffset + wav.length - wav.length % 2));
{example}
transcribe(process.env.STENOGATE_TOKEN, samples, console.log);
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGateway]:
    with local_gateway(tmp_path_factory.mktemp("readme"), model="micro") as running:
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def example(language: str, head: str) -> str:
    """The block of that language whose first line begins so."""
    (found,) = (block for block in blocks(language) if block.startswith(head))
    return found


def run(gateway: LocalGateway, command: list[str], text: str) -> str:
    text = text.replace("127.0.0.1:8080", gateway.client.url.removeprefix("http://"))
    done = subprocess.run(
        command,
        input=text,
        cwd=ROOT,
        env={
            **os.environ,
            "STENOGATE_TOKEN": gateway.client.token,
            "STENOGATE_URL": gateway.client.url,
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("what", "expected"), [("clip02.wav\n", SAID), ("async=true", '"status":"queued"')])
def test_curl(gateway: LocalGateway, what: str, expected: str) -> None:
    (text,) = (block for block in blocks("sh") if block.startswith("curl") and what in block)
    assert expected in run(gateway, ["bash"], text)


def test_the_bill(gateway: LocalGateway) -> None:
    (text,) = (block for block in blocks("sh") if "/v1/usage" in block)
    assert '"object":"usage"' in run(gateway, ["bash"], text.partition("\n")[0])


@pytest.mark.parametrize(("what", "expected"), [("file", SAID), ("stream", f"final {SAID}"), ("job", LONG_BEGINS)])
def test_python(gateway: LocalGateway, what: str, expected: str) -> None:
    assert expected in run(gateway, [sys.executable, "-"], example("python", f"# {what}:"))


@pytest.mark.skipif(shutil.which("node") is None, reason="these examples are JavaScript, and node is not installed")
@pytest.mark.parametrize(("what", "expected"), [("file", SAID), ("stream", SAID), ("job", LONG_BEGINS)])
def test_javascript(gateway: LocalGateway, what: str, expected: str) -> None:
    text = example("javascript", f"// {what}:")
    if what == "stream":
        text = STREAM_DRIVER.format(example=text)
    flags = ["--experimental-websocket", "--input-type=module", "-"]
    assert expected in run(gateway, ["node", *flags], text)
