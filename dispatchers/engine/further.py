"""Recognisers beside those that ship: each is a module, named by an entry point of the group `stenogate.engines`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from dispatchers.engine.interface import Engine
    from dispatchers.engine.models import ModelSpec

GROUP = "stenogate.engines"

_log = logging.getLogger(__name__)


class Recogniser(Protocol):
    """What such a module has. Its heavy imports are late: it is imported wherever models are only listed, too."""

    @property
    def MODELS(self) -> Sequence[ModelSpec]:  # noqa: N802 — a module's constant
        """The models it has. The `engine` of each is the entry point's name."""
        ...

    def is_here(self, spec: ModelSpec) -> bool:
        """Whether the model can be loaded without the network. It may touch the disk."""
        ...

    def load(self, spec: ModelSpec, workers: int, device: str) -> Engine:
        """The model in memory, with so many cores to use, on the device `auto`, `cpu` or `cuda`. Blocks. Raises
        `BackendUnavailable` with the remedy."""
        ...


@functools.cache
def recognisers() -> Mapping[str, Recogniser]:
    """The installed ones, by the name of their engine. One that cannot be imported is left out, and that is logged."""
    found: dict[str, Recogniser] = {}
    for point in entry_points(group=GROUP):
        try:
            found[point.name] = cast("Recogniser", point.load())
        except Exception as error:  # noqa: BLE001 — whatever it is, the others must go on
            _log.error("the engine %s cannot be imported: %s", point.name, error)
    return found


def further_models() -> dict[str, ModelSpec]:
    """Their models, by name."""
    return {spec.name: spec for module in recognisers().values() for spec in module.MODELS}
