"""Envelopes: what opens them, and what does not."""

from __future__ import annotations

import stat
from base64 import b64encode
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from runtime.errors import Misconfigured, Unsealable
from runtime.sealing import LocalSealer, Sealed, rewrap, seal, sealer_of, unseal
from runtime.settings import Settings

OLD, NEW = b"o" * 32, b"n" * 32
SECRET = "sk-canary-0123456789"
HERE = b"relay deepgram, tenant acme"


@pytest.fixture
def sealer() -> LocalSealer:
    return LocalSealer({"old": OLD})


async def test_what_is_sealed_opens_where_it_belongs_and_nowhere_else(sealer: LocalSealer) -> None:
    sealed = await seal(sealer, SECRET, HERE)
    assert await unseal(sealer, sealed, HERE) == SECRET
    with pytest.raises(Unsealable):
        await unseal(sealer, sealed, b"relay deepgram, tenant other")
    assert SECRET.encode() not in sealed.ciphertext + sealed.sealed_key


async def test_the_same_secret_is_never_sealed_the_same_twice(sealer: LocalSealer) -> None:
    one, two = [await seal(sealer, SECRET, HERE) for _ in range(2)]
    assert one.ciphertext != two.ciphertext
    assert one.sealed_key != two.sealed_key
    with pytest.raises(Unsealable):
        await unseal(sealer, Sealed(one.ciphertext, two.sealed_key, "old"), HERE)


@pytest.mark.parametrize("part", ["ciphertext", "sealed_key"])
@pytest.mark.parametrize("change", [lambda it: it[:-1] + bytes([it[-1] ^ 1]), lambda it: it[:5], lambda it: b""])
async def test_what_was_touched_does_not_open(sealer: LocalSealer, part: str, change: object) -> None:
    sealed = await seal(sealer, SECRET, HERE)
    values = {"ciphertext": sealed.ciphertext, "sealed_key": sealed.sealed_key, "master_key": "old"}
    touched = Sealed(**{**values, part: change(values[part])})  # type: ignore[operator,arg-type]
    with pytest.raises(Unsealable) as refusal:
        await unseal(sealer, touched, HERE)
    assert SECRET not in refusal.value.message


async def test_a_new_master_key_takes_over_without_the_secret_being_opened(sealer: LocalSealer) -> None:
    sealed = await seal(sealer, SECRET, HERE)
    both = LocalSealer({"new": NEW, "old": OLD})
    assert await unseal(both, sealed, HERE) == SECRET
    wrapped = await rewrap(both, sealed)
    assert (wrapped.master_key, wrapped.ciphertext) == ("new", sealed.ciphertext)
    assert await unseal(LocalSealer({"new": NEW}), wrapped, HERE) == SECRET
    with pytest.raises(Unsealable, match="`old`"):
        await unseal(LocalSealer({"new": NEW}), sealed, HERE)


async def test_another_key_of_the_same_name_opens_nothing(sealer: LocalSealer) -> None:
    sealed = await seal(sealer, SECRET, HERE)
    with pytest.raises(Unsealable):
        await unseal(LocalSealer({"old": NEW}), sealed, HERE)


async def test_without_a_key_nothing_is_sealed_and_the_remedy_is_named() -> None:
    sealer = sealer_of(Settings(database_url=SecretStr("postgresql://db.example/x")))
    with pytest.raises(Misconfigured, match="STENOGATE_SEALING_KEYS"):
        await seal(sealer, SECRET, HERE)


async def test_beside_an_embedded_postgres_a_key_is_made_once(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    sealed = await seal(sealer_of(settings), SECRET, HERE)
    assert await unseal(sealer_of(settings), sealed, HERE) == SECRET
    (kept,) = (tmp_path / "data").iterdir()
    assert kept.name == "sealing.keys"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


async def test_the_first_of_the_settings_seals_and_all_open() -> None:
    written = [f"{name}:{b64encode(key).decode()}" for name, key in (("new", NEW), ("old", OLD))]
    sealer = sealer_of(Settings(sealing_keys=SecretStr(", ".join(written))))
    assert (await seal(sealer, SECRET, HERE)).master_key == "new"
    assert await unseal(sealer, await seal(LocalSealer({"old": OLD}), SECRET, HERE), HERE) == SECRET


@pytest.mark.parametrize(
    "written",
    [
        b64encode(OLD).decode(),  # no id
        f"k1:{b64encode(OLD[:16]).decode()}",
        "k1:correct-horse-battery-staple",
        f"k 1:{b64encode(OLD).decode()}",
        f"k1:{b64encode(OLD).decode()},k1:{b64encode(NEW).decode()}",
        "",
    ],
)
def test_keys_that_are_none_are_refused_and_not_quoted(written: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(sealing_keys=SecretStr(written))
    for said in (str(refusal.value), refusal.value.errors()[0]["msg"]):
        assert not written or written not in said
        assert "staple" not in said
