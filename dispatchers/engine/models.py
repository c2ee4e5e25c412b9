"""The models an engine knows by name, and which of them is used.

Nothing here loads a model. What touches disk or network blocks and belongs in a thread.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dispatchers.engine.download import download
from dispatchers.engine.further import further_models, recognisers
from dispatchers.errors import BackendUnavailable, UnknownModel, UnsupportedOption
from dispatchers.interface import Options

STOCK_WINDOW = 3000
ENGLISH = frozenset({"en"})
PROBE_S = 3.0
_FILES = ("config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*")

Probe = Callable[["ModelSpec"], bool]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model, not loaded. `engine` is faster-whisper, pocketsphinx, or a further one (`dispatchers.engine.further`).

    `source` is a folder, or a repository of the Hugging Face hub; pocketsphinx brings its own. `shortest_window` is the
    shortest encoder input, in frames of 10 ms, that the model was shown to be good for: Whisper's training knows 3000
    only. `condition_on_previous_text` feeds each window the text of the one before. `languages` None means any.
    """

    name: str
    engine: str
    source: str = ""
    shortest_window: int = STOCK_WINDOW
    condition_on_previous_text: bool = True
    translate: bool = True
    languages: frozenset[str] | None = None

    def check(self, options: Options) -> None:
        """Raises `UnsupportedOption` for a task or language that the model does not know."""
        if options.task == "translate" and not self.translate:
            raise UnsupportedOption(f"The model {self.name} cannot translate.", param="task")
        if self.languages is not None and options.language is not None and options.language not in self.languages:
            known = ", ".join(sorted(self.languages))
            raise UnsupportedOption(f"The model {self.name} knows no language but: {known}.", param="language")


MICRO = ModelSpec(
    name="micro",
    engine="faster-whisper",
    source=str(Path(__file__).parent / "micro" / "model"),
    shortest_window=1000,
    condition_on_previous_text=False,
)
"""The shipped test model: 260 English words, synthetic voices. Whatever language and task it is given, it answers in
English."""

MICRO_SAMPLES = Path(__file__).parent / "micro" / "samples"
"""Recordings the test model was made for, with their texts."""

POCKETSPHINX = ModelSpec(name="pocketsphinx", engine="pocketsphinx", translate=False, languages=ENGLISH)


def _hub(name: str, repository: str) -> ModelSpec:
    """A model of the hub. English-only, distilled and turbo models were not trained to translate, and distilled ones
    not on previous text (their model cards)."""
    english = name.endswith(".en") or name.startswith("distil-")
    return ModelSpec(
        name=name,
        engine="faster-whisper",
        source=repository,
        condition_on_previous_text=not name.startswith("distil-"),
        translate=not english and not name.endswith("turbo"),
        languages=ENGLISH if english else None,
    )


_HUB = {
    **{
        size: f"Systran/faster-whisper-{size}"
        for size in (
            *("tiny.en", "tiny", "base.en", "base", "small.en", "small", "medium.en", "medium"),
            *("large-v1", "large-v2", "large-v3"),
        )
    },
    "large": "Systran/faster-whisper-large-v3",
    **{
        f"distil-{size}": f"Systran/faster-distil-whisper-{size}"
        for size in ("large-v2", "medium.en", "small.en", "large-v3")
    },
    "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
}

KNOWN: dict[str, ModelSpec] = {
    spec.name: spec for spec in (MICRO, POCKETSPHINX, *(_hub(name, repository) for name, repository in _HUB.items()))
}
"""Every model of the engines that ship, by its own name."""


def known() -> dict[str, ModelSpec]:
    """Every model with a name of its own: what a request may ask for, where it is available."""
    return further_models() | KNOWN


def find(name: str) -> ModelSpec:
    """The model an operator means: a known name, a folder with a CTranslate2 Whisper model, or a hub repository.

    Raises `UnknownModel`. Never for names from a request, which must not reach the file system."""
    if name in known():
        return known()[name]
    if (Path(name) / "model.bin").is_file():
        return ModelSpec(name=Path(name).resolve().name, engine="faster-whisper", source=str(Path(name).resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return ModelSpec(name=name, engine="faster-whisper", source=name)
    raise UnknownModel(
        f"There is no model {name!r}: neither one of {', '.join(known())}, nor a folder with a CTranslate2 Whisper"
        " model, nor owner/name on the Hugging Face hub."
    )


def folder(spec: ModelSpec, cache_dir: Path | None) -> Path | None:
    """Where the model's files lie on this machine, or None. `cache_dir` None is the hub library's own cache."""
    if (Path(spec.source) / "model.bin").is_file():
        return Path(spec.source)
    if Path(spec.source).is_absolute():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(spec.source, file, cache_dir=cache_dir) for file in ("config.json", "model.bin")]
    return Path(str(found[1])).parent if all(isinstance(file, str) for file in found) else None


def is_cached(spec: ModelSpec, cache_dir: Path | None = None) -> bool:
    """Whether the model can be loaded without the network."""
    if spec.engine == "pocketsphinx":
        return importlib.util.find_spec("pocketsphinx") is not None
    if spec.engine in recognisers():
        return recognisers()[spec.engine].is_here(spec)
    return folder(spec, cache_dir) is not None


def is_downloadable(spec: ModelSpec, *, timeout_s: float = PROBE_S, endpoint: str | None = None) -> bool:
    """Whether the hub has the model and answers within `timeout_s`, name resolution included."""
    if spec.engine != "faster-whisper" or Path(spec.source).is_absolute():
        return False
    answered: list[bool] = []

    def ask() -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            get_hf_file_metadata(hf_hub_url(spec.source, "config.json", endpoint=endpoint), timeout=timeout_s)
        except Exception:  # noqa: BLE001 - whatever is wrong there, the model cannot be had
            return
        answered.append(True)

    # A thread left behind, because no timeout of a client covers a resolver that does not answer.
    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answered)


def fetch(
    spec: ModelSpec,
    cache_dir: Path | None = None,
    told: Callable[[int], None] = lambda _: None,
    *,
    endpoint: str | None = None,
) -> Path:
    """The model's folder; downloaded if it is not cached (`dispatchers.engine.download`). `told` gets how far that is,
    in per cent, in any thread.

    Raises `BackendUnavailable`."""
    cached = folder(spec, cache_dir)
    if cached is not None:
        return cached
    if Path(spec.source).is_absolute():
        raise BackendUnavailable(f"The folder of the model {spec.name} is gone.")
    try:
        return download(spec.source, _FILES, cache_dir, told, endpoint)
    except Exception as error:
        raise BackendUnavailable(_remedy(spec)) from error


@dataclass(frozen=True, slots=True)
class Resolved:
    """The model to use, and in a sentence why. `downgraded`: it is not the configured one, and that is to be said
    loudly and recorded. `download`: its files must come from the hub first."""

    spec: ModelSpec
    reason: str
    downgraded: bool = False
    download: bool = False


def resolve(
    setting: str, *, configured: str = "small", cache_dir: Path | None = None, probe: Probe = is_downloadable
) -> Resolved:
    """Which model the setting means. `auto` is the configured Whisper model where it can be had, else pocketsphinx; any
    other name is that model or an error.

    Raises `UnknownModel`; `BackendUnavailable` with the remedy."""
    spec = find(configured if setting == "auto" else setting)
    if is_cached(spec, cache_dir):
        return Resolved(spec, f"The model {spec.name} is on this machine.")
    if probe(spec):
        return Resolved(spec, f"The model {spec.name} is not on this machine yet; it is downloaded.", download=True)
    if setting != "auto" or not is_cached(POCKETSPHINX):
        raise BackendUnavailable(_remedy(spec))
    reason = (
        f"The model {spec.name} is not on this machine and the Hugging Face hub cannot be reached, so the small offline"
        " recogniser pocketsphinx is used: English only, and far less exact."
    )
    return Resolved(POCKETSPHINX, reason, downgraded=True)


def _remedy(spec: ModelSpec) -> str:
    if spec.engine == "pocketsphinx":
        return "pocketsphinx is not installed. Install the engine-cpu extra."
    return (
        f"The model {spec.name} is not on this machine and cannot be downloaded from the Hugging Face hub. Run"
        f" `hf download {spec.source}` where there is a network and copy the cache, set STENOGATE_MODEL to a folder"
        " with a CTranslate2 Whisper model, or to auto, pocketsphinx or micro."
    )
