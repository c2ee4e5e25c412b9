"""What providers say, whoever says it: the forms it is checked by, and how it is put in our words."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from dispatchers.backends.relay import Account, plain
from dispatchers.errors import BadAnswer, UnknownModel
from dispatchers.languages import NAMES

UNKNOWN_LANGUAGE = "und"
"""ISO 639-2: nobody said."""

SIGNS_AT_ONCE, MS_A_SIGN = 1000, 5
_OTHER_TAGS = {"zh-hk": "yue"}


class Answered(BaseModel):
    """Members that are not known are left out."""

    model_config = ConfigDict(frozen=True)


Share: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Text: TypeAlias = Annotated[str, Field(max_length=1_000_000)]
Code: TypeAlias = Annotated[str, Field(max_length=35)]


def model_of(account: Account, name: str) -> str:
    """The model asked for, or the default. Raises `UnknownModel`."""
    if name and name not in account.models:
        raise UnknownModel(param="model")
    return name or account.models[0]


def clean(text: str) -> str:
    """Single spaces between words and none around them."""
    return " ".join(plain(text).split())


def sayable(signs: int, within_ms: int) -> None:
    """Raises `BadAnswer` for more code points than anybody says in that time, however fast."""
    if signs > SIGNS_AT_ONCE + within_ms // MS_A_SIGN:
        raise BadAnswer("The recogniser says more than can have been said. Try again.")


def share(said: float) -> float:
    """0 to 1."""
    return min(max(said, 0.0), 1.0)


def known(tag: str) -> str | None:
    """The code of a BCP 47 tag (also with `_`), if that is a language we know."""
    code = _OTHER_TAGS.get(tag.lower()) or re.split("[-_]", tag.lower())[0]
    return code if code in NAMES else None


def language_of(tag: str | None, asked: str | None) -> str:
    """The code of the language that was said, or else asked for, if either was."""
    return known(tag or "") or asked or UNKNOWN_LANGUAGE
