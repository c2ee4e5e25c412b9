"""Which settings a running gateway changes, and that each may be changed safely."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from policy import overrides
from policy.errors import Invalid, SettingFixed
from runtime.settings import CHANGEABLE, Change, Settings, change_of

SCHEMA: dict[str, dict[str, Any]] = Settings.model_json_schema()["properties"]

CLASSES: dict[Change, set[str]] = {
    "live": {
        *("max_upload_bytes", "job_threshold_bytes", "job_threshold_ms", "upload_idle_s"),
        *("max_streams", "max_streams_per_address", "max_queue_wait_s", "stream_drain_s"),
        *("token_in_url", "origins", "log_level"),
    },
    "new_sessions": {"stream_frames_per_s", "stream_idle_s", "stream_resume_s"},
}


def test_each_setting_is_of_its_class_and_what_is_new_is_read_at_the_start() -> None:
    for change, names in CLASSES.items():
        assert {name for name in Settings.model_fields if change_of(name) == change} == names
    assert set(CHANGEABLE) == CLASSES["live"] | CLASSES["new_sessions"]
    assert change_of("database_url") == change_of("trusted_proxies") == "start"


@pytest.mark.parametrize("name", CHANGEABLE)
def test_what_can_be_changed_is_no_secret_and_has_bounds(name: str) -> None:
    assert "SecretStr" not in str(Settings.model_fields[name].annotation)
    assert SCHEMA[name]["description"]
    if SCHEMA[name].get("type") in ("integer", "number"):
        assert {"minimum", "exclusiveMinimum"} & set(SCHEMA[name])
        assert "maximum" in SCHEMA[name]


def test_a_change_touches_nothing_else() -> None:
    own = Settings(port=1, signing_key=SecretStr("k" * 32)).model_copy(update={"chunk_ms": 1})  # not what it checks
    changed = own.changed({"max_streams": "300"})
    assert changed.max_streams == 300
    assert changed == own.model_copy(update={"max_streams": 300})
    assert own.max_streams == 256
    with pytest.raises(ValidationError):
        own.changed({"max_streams": 0})


def test_text_means_what_it_means_in_the_environment() -> None:
    read = overrides.from_text
    assert read("max_streams", "60") == 60
    assert read("stream_resume_s", "60") == 60.0
    assert read("token_in_url", "true") is True
    assert read("origins", "https://B.example, https://a.example") == ["https://a.example", "https://b.example"]
    for name, text in (("max_streams", "x"), ("origins", "nowhere"), ("nothing", "1")):
        with pytest.raises(Invalid) as refusal:
            read(name, text)
        assert refusal.value.param == name
    with pytest.raises(SettingFixed, match="STENOGATE_REDIS_URL"):
        read("redis_url", "redis://x")


@pytest.mark.parametrize("name", CHANGEABLE)
def test_what_is_shown_can_be_sent_again(name: str) -> None:
    shown = overrides.as_json(getattr(Settings(), name))
    overrides.check({name: shown})


@pytest.mark.parametrize(
    ("text", "engines"),
    [
        ("", None),
        (" http://a:8090 , https://b ", ("http://a:8090", "https://b")),
        ("http://a:1,http://a:1", ("http://a:1",)),
        ("http://[::1]:8090", ("http://[::1]:8090",)),
    ],
)
def test_engines_are_listed(text: str, engines: tuple[str, ...] | None) -> None:
    assert Settings(engines=text).engines == engines  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["a:8090", "ftp://a", "http://", "http://a/v1", "http://a?x", "http://u:secret@a", "http://a:99999", "http://a:0"],
)
def test_what_is_no_engine(text: str) -> None:
    with pytest.raises(ValidationError, match="engine"):
        Settings(engines=text)  # type: ignore[arg-type]
