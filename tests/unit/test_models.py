import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispatchers.engine.models import (
    KNOWN,
    MICRO,
    POCKETSPHINX,
    ModelSpec,
    fetch,
    find,
    is_cached,
    is_downloadable,
    resolve,
)
from dispatchers.errors import BackendUnavailable, UnknownModel, UnsupportedOption
from dispatchers.interface import Options


def out_of_reach(_: ModelSpec) -> bool:
    return False


def in_reach(_: ModelSpec) -> bool:
    return True


def put_in_cache(cache: Path, repository: str) -> None:
    """A download as the hub library leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for file in ("config.json", "model.bin"):
        (folder / "snapshots" / "abc" / file).write_bytes(b"{}")


def test_the_table_is_faster_whispers_own() -> None:
    from faster_whisper.utils import _MODELS

    ours = {name: spec.source for name, spec in KNOWN.items() if spec not in (MICRO, POCKETSPHINX)}
    assert ours == _MODELS


def test_micro_is_shipped(tmp_path: Path) -> None:
    assert is_cached(MICRO, tmp_path)
    assert resolve("micro", cache_dir=tmp_path, probe=out_of_reach).spec == MICRO
    assert fetch(MICRO, tmp_path) == Path(MICRO.source)


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.bin").write_bytes(b"x")
    spec = resolve(str(tmp_path / "mine"), probe=out_of_reach).spec
    assert (spec.name, spec.engine, spec.source) == ("mine", "faster-whisper", str((tmp_path / "mine").resolve()))


@pytest.mark.parametrize("name", ["", "smal", "/nowhere/model", "./nowhere", "a/b/c", "~/model"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(UnknownModel):
        find(name)


def test_auto_is_the_cached_model(tmp_path: Path) -> None:
    put_in_cache(tmp_path, "Systran/faster-whisper-base")
    resolved = resolve("auto", configured="base", cache_dir=tmp_path, probe=out_of_reach)
    assert (resolved.spec.name, resolved.downgraded, resolved.download) == ("base", False, False)
    assert fetch(resolved.spec, tmp_path).name == "abc"


def test_a_half_finished_download_is_not_cached(tmp_path: Path) -> None:
    put_in_cache(tmp_path, "Systran/faster-whisper-base")
    (tmp_path / "models--Systran--faster-whisper-base" / "snapshots" / "abc" / "model.bin").unlink()
    assert not is_cached(KNOWN["base"], tmp_path)


def test_auto_downloads_where_it_can(tmp_path: Path) -> None:
    resolved = resolve("auto", configured="base", cache_dir=tmp_path, probe=in_reach)
    assert (resolved.spec.name, resolved.downgraded, resolved.download) == ("base", False, True)


def test_auto_falls_back_loudly(tmp_path: Path) -> None:
    resolved = resolve("auto", cache_dir=tmp_path, probe=out_of_reach)
    assert resolved.spec == POCKETSPHINX
    assert resolved.downgraded
    assert "small" in resolved.reason
    assert "pocketsphinx" in resolved.reason


def test_a_named_model_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="hf download Systran/faster-whisper-small"):
        resolve("small", cache_dir=tmp_path, probe=out_of_reach)


@contextmanager
def hub(answer: threading.Event, status: int = 200) -> Iterator[str]:
    """A hub on loopback that answers every HEAD once `answer` is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answer.wait(20)
            self.send_response(status)
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", "abc")
            self.send_header("Content-Length", "2")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        answer.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_probe_asks_the_hub() -> None:
    ready = threading.Event()
    ready.set()
    with hub(ready) as endpoint:
        assert is_downloadable(KNOWN["tiny"], endpoint=endpoint, timeout_s=10)
    with hub(ready, status=404) as endpoint:
        assert not is_downloadable(KNOWN["tiny"], endpoint=endpoint, timeout_s=10)


def test_the_probe_does_not_wait_for_a_silent_hub() -> None:
    with hub(threading.Event()) as endpoint:
        assert not is_downloadable(KNOWN["tiny"], endpoint=endpoint, timeout_s=0.2)


def test_what_cannot_come_from_a_hub_is_not_asked_for() -> None:
    assert not is_downloadable(MICRO)
    assert not is_downloadable(POCKETSPHINX)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("pocketsphinx", Options(language="de")),
        ("pocketsphinx", Options(task="translate")),
        ("small.en", Options(language="fr")),
        ("turbo", Options(task="translate")),
    ],
)
def test_a_model_refuses_what_it_does_not_know(model: str, options: Options) -> None:
    with pytest.raises(UnsupportedOption):
        KNOWN[model].check(options)


def test_a_model_takes_what_it_knows() -> None:
    KNOWN["small"].check(Options(language="de", task="translate"))
    KNOWN["pocketsphinx"].check(Options(language="en"))
    KNOWN["small.en"].check(Options())


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, dispatchers.assembly, dispatchers.backends.local\n"
        "heavy = {'ctranslate2', 'faster_whisper', 'av', 'onnxruntime', 'pocketsphinx', 'huggingface_hub'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
