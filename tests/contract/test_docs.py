"""The pages say what the code says: nothing is left out, nothing is made up, no link is dead."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase
from starlette.routing import Route, WebSocketRoute
from typer.main import get_command

from gateway.app import ROUTES
from gateway.cli import app
from gateway.errors import MEANINGS, every_error
from gateway.protocols.native_start import Start, Vad
from policy.policies import PolicyBody
from runtime import telemetry
from runtime.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HIDDEN_OR_BUILT = re.compile(r"(^|/)(\.[^/]+|node_modules|data)/")
PAGES = sorted(page for page in ROOT.rglob("*.md") if not HIDDEN_OR_BUILT.search(page.relative_to(ROOT).as_posix()))


def read(name: str) -> str:
    return (DOCS / name).read_text()


def shown(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- settings -----------------------------------------------------------------------------------------------------


def settings_table() -> str:
    spec = importlib.util.spec_from_file_location("settings_table", DOCS / "settings_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table: str = module.table()
    return table


def test_the_readme_lists_every_setting() -> None:
    found = re.search(r"<!-- settings -->(.*?)<!-- /settings -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None, "README.md has no <!-- settings --> … <!-- /settings -->"
    assert found[1].strip() == settings_table().strip(), "run: python docs/settings_table.py"


def test_every_setting_has_a_meaning() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"| `STENOGATE_{name.upper()}` |" in settings_table()


def of_the_command_line() -> Iterator[str]:
    for _, command in commands(get_command(app), ()):
        for parameter in command.params:
            if isinstance(parameter.envvar, str):
                yield parameter.envvar


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_no_page_names_a_variable_that_is_none(page: Path) -> None:
    known = {f"STENOGATE_{name.upper()}" for name in Settings.model_fields} | set(of_the_command_line())
    assert set(re.findall(r"STENOGATE_[A-Z_]*[A-Z]", page.read_text())) <= known


# --- metrics ------------------------------------------------------------------------------------------------------


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    page = read("metrics.md")
    metrics = [metric for metric in vars(telemetry).values() if isinstance(metric, MetricWrapperBase)]
    for metric in metrics:
        (family,) = metric.describe()
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        assert f"| `{family.name}` | {family.type} | {labels} |".replace("|  |", "| |") in page
    assert metrics


def test_metrics_are_documented_and_the_other_way_round() -> None:
    served = {family.name for family in telemetry.REGISTRY.collect()}
    documented = set(re.findall(r"`((?:stenogate|process)_\w+)`", read("metrics.md"))) - {"stenogate_build_info"}
    assert documented == served


# --- errors -------------------------------------------------------------------------------------------------------


def test_every_code_is_documented_with_its_status_and_close_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\d+) \| (\d+) \| \S.* \| \S.* \|$", read("errors.md"), re.MULTILINE)
    reserved = re.findall(r"`([A-Z_]+)`\s\((\d+),\s(\d+)\)", read("errors.md"))
    documented = {code: (int(status), int(close)) for code, status, close in rows + reserved}
    assert documented == {code: (meaning.status, meaning.close) for code, meaning in MEANINGS.items()}
    raised = {error.code for error in every_error()}
    assert {code for code, *_ in reserved} == set(MEANINGS) - raised


def test_the_live_page_gives_codes_the_close_they_have() -> None:
    rows = re.findall(r"^\| (\d{4}) \| ((?:`[A-Z_]+`(?:, )?)+) \|", read("stream.md"), re.MULTILINE)
    told = {code: int(close) for close, codes in rows for code in re.findall("[A-Z_]+", codes)}
    assert told == {code: MEANINGS[code].close for code in told}
    assert told


# --- policy, live fields ------------------------------------------------------------------------------------------


def test_every_policy_field_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| \S", read("policy.md"), re.MULTILINE)
    defaults = PolicyBody().model_dump(mode="json")
    assert {name: json.loads(default) for name, default in rows} == defaults


def test_every_field_of_start_is_documented() -> None:
    page = read("stream.md")
    fields = [name for name in Start.model_fields if name not in ("type", "vad")]
    for name in [*fields, *(f"vad.{name}" for name in Vad.model_fields)]:
        assert re.search(rf"^\| (`\w+`, )*`{re.escape(name)}`", page, re.MULTILINE), name


# --- commands and routes ------------------------------------------------------------------------------------------


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that is no group, by its words. (Typer brings a click of its own, whose types are not click's.)"""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
    else:
        for name, child in children.items():
            yield from commands(child, (*path, name))


def test_every_command_is_documented() -> None:
    page = read("operations/running.md")
    paths = [path for path, _ in commands(get_command(app), ())]
    for path in paths:
        assert f"`stenogate {' '.join(path)}`" in page
    assert ("serve",) in paths
    assert ("tenant", "create") in paths


def test_every_route_is_documented() -> None:
    page = read("api.md")
    for route in ROUTES:
        assert isinstance(route, Route | WebSocketRoute)
        methods = {"GET"} if isinstance(route, WebSocketRoute) else (route.methods or set()) - {"HEAD"}
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        for method in methods:
            assert f"`{method} {path}`" in page


# --- the pages as such --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_no_relative_link_is_dead(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if "decisions" not in page.parts], ids=shown)
def test_every_place_in_the_code_is_there(page: Path) -> None:
    """Decisions are of their day and may speak of what is gone."""
    rooms = "gateway|workers|dispatchers|policy|runtime|migrations|tests|docs"
    for place in re.findall(rf"`((?:{rooms})/[\w/.-]*)`", page.read_text()):
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_json_is_json(page: Path) -> None:
    for block in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        json.loads(block)


def test_the_index_leads_to_every_page() -> None:
    index = read("README.md")
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name == "README.md" or f"({name})" in index or name.startswith("decisions/"), name
