"""JSON bodies as forms: typed, and nothing in them that is not asked for."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from policy.errors import Invalid


class Form(BaseModel):
    """A JSON object of known fields, each of its own JSON type."""

    model_config = ConfigDict(extra="forbid", strict=True)


FormType = TypeVar("FormType", bound=Form)


def filled(form: type[FormType], body: dict[str, Any]) -> FormType:
    """The form. Raises `Invalid`, which names the first field that is wrong."""
    try:
        return form.model_validate(body)
    except ValidationError as wrong:
        first = wrong.errors(include_input=False, include_url=False)[0]
        raise Invalid(f"{first['msg']}.", param=".".join(str(part) for part in first["loc"])[:200]) from None
