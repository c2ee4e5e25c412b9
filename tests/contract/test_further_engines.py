"""An engine in one file: the page that shows it, and one that is installed and run."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from dispatchers.backends.local import LocalBackend
from dispatchers.engine import further
from dispatchers.engine.models import KNOWN, find, is_cached, known
from dispatchers.errors import BackendUnavailable
from dispatchers.interface import Options, Samples
from tests.contract.conftest import FURTHER, SAMPLES, installed
from tests.engines import TOKEN, engine_process

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding-an-engine.md").read_text()


def shown(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(block)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[ModuleType]:
    """The page's example, imported."""
    path = tmp_path / "stenogate_vosk.py"
    path.write_text(shown("python"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


def test_the_page_is_true_to_the_seam(tmp_path: Path) -> None:
    """By the type checker: the module is a `Recogniser`, and what it loads an `Engine`."""
    (tmp_path / "stenogate_vosk.py").write_text(shown("python"))
    (tmp_path / "check.py").write_text(
        "import stenogate_vosk\n"
        "from dispatchers.engine.further import Recogniser\n"
        "from dispatchers.engine.interface import Engine\n"
        "from dispatchers.engine.models import MICRO\n\n"
        "module: Recogniser = stenogate_vosk\n"
        "engine: Engine = stenogate_vosk.VoskEngine(MICRO, 1)\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n"
        "[mypy-vosk.*]\nignore_missing_imports = True\n"
        "[mypy-dispatchers.*]\nfollow_imports = silent\n"
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "check.py", "stenogate_vosk.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_pages_entry_point_is_the_one_that_is_looked_for(page: ModuleType) -> None:
    points = tomllib.loads(shown("toml"))["project"]["entry-points"][further.GROUP]
    assert points == {"vosk": page.__name__}
    assert {spec.engine for spec in page.MODELS} == set(points)


def test_the_page_without_its_package_names_the_remedy(page: ModuleType) -> None:
    spec = page.MODELS[0]
    assert not page.is_here(spec)
    with pytest.raises(BackendUnavailable, match="Install vosk"):
        page.load(spec, 1, "cpu")


# --- one that is installed ----------------------------------------------------------------------------------------


def test_an_installed_engine_brings_its_models() -> None:
    assert "loudness" not in known()
    with installed():
        assert find("loudness").engine == "loudness"
        assert is_cached(find("loudness"))
        assert set(KNOWN) < set(known())
    assert "loudness" not in known()


async def test_its_models_are_listed_and_named_in_results(speech: Samples) -> None:
    with installed():
        backend = LocalBackend(KNOWN["micro"], workers=1)
        await backend.warm()
        answer = await backend.transcribe(speech, Options(model="loudness"))
        assert answer.text.startswith("one two")
        assert (answer.origin.engine, answer.origin.model) == ("loudness", "loudness")
        cards = {card.name: (card.engine, card.status) for card in backend.catalogue()}
        assert cards["loudness"] == ("loudness", "ready")
        await backend.aclose()


def test_the_role_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FURTHER))
    with engine_process(model="loudness") as engine:
        answer = httpx.post(
            f"{engine.url}/v1/audio/transcriptions",
            headers={"authorization": f"Bearer {TOKEN}"},
            files={"file": ("a.wav", (SAMPLES / "clip02.wav").read_bytes())},
            timeout=30,
            trust_env=False,
        )
    assert answer.headers["x-stenogate-engine"] == "loudness"
    assert answer.json()["text"].startswith("one")


def test_a_broken_one_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "broken-0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (package / "entry_points.txt").write_text(f"[{further.GROUP}]\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.ERROR), installed():
        assert "loudness" in known()
        assert "broken" in caplog.text
