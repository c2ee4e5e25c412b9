"""Rules of the house that import-linter cannot see, read off the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "workers", "dispatchers", "policy", "runtime")
SOURCES = [
    path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if "training" not in path.parts
]

# rule: (names that only these files may mention)
ONLY_HERE = {
    # the child process that inherits our environment but for our settings, and a word to numpy before it is loaded
    ("os.environ", "os.getenv"): {"runtime/settings.py", "gateway/commands/local.py", "dispatchers/__init__.py"},
    ("create_async_engine",): {"runtime/database.py"},
    ("self._admission.admit",): {"dispatchers/dispatch.py"},
    ("enqueue_job",): {"workers/queue.py"},
}

HEAVY = {"ctranslate2", "faster_whisper", "onnxruntime", "pocketsphinx", "av", "alembic", "aiortc", "mcp"}


def spelled(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def mentions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        yield spelled(node)
        if isinstance(node, ast.Attribute):
            yield node.attr
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("names", ONLY_HERE, ids=lambda names: names[0])
def test_what_only_one_place_may_do(names: tuple[str, ...]) -> None:
    found = {str(path.relative_to(ROOT)) for path in SOURCES if set(names) & set(mentions(path))}
    assert found <= ONLY_HERE[names]
    assert found, "the rule names something that no longer exists"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_imports_come_late(path: Path) -> None:
    """A relay-only pod never loads a model runtime, so nothing heavy is imported at a module's top."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.partition(".")[0]
        for node in top
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not names & HEAVY


def test_no_float_touches_money() -> None:
    money = [path for path in SOURCES if path.parts[-2] == "policy"]
    for path in money:
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Name) and node.id == "float"
            if named and path.name in (
                "pricing.py",
                "reckoning.py",
                "metering.py",
                "budget.py",
                "statements.py",
                "lease.py",
            ):
                raise AssertionError(f"{path.name}:{node.lineno} speaks of float")


@pytest.mark.parametrize(
    "entry", ["gateway.serve", "gateway.commands.demo", "workers.main", "dispatchers.engine.serve"]
)
def test_numpy_is_not_loaded_before_it_is_told_its_threads(entry: str) -> None:
    watched = f"""
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            assert "dispatchers" in sys.modules
sys.meta_path.insert(0, Watch())
import {entry}
assert "numpy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", watched], check=True, cwd=ROOT, timeout=60)
