"""The managed providers that are spoken to, as data: where they are, what they have, how they differ.

A relay is an account with one of them; `docs/relays.md` tells people the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dispatchers.backends.openai import MIB, Model, OpenAIRelay, Quirks
from dispatchers.backends.relay import Account
from dispatchers.interface import Dispatcher
from dispatchers.languages import NAMES

_WHISPER = frozenset(code for code in NAMES if len(code) == 2)
"""ISO 639-1 alone, as these providers want it."""
_GPT = Model(times=False, words=False, events=True, longest_ms=1_400_000)


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider, or a kind of server that anybody may run: then without an address and models of its own.

    `models`: those offered where the relay names none, the default first. `regions`: other addresses, whose audio stays
    in the region. `quirks`: of those who speak OpenAI's API.
    """

    name: str
    title: str
    base_url: str | None = None
    models: tuple[str, ...] = ()
    regions: Mapping[str, str] = field(default_factory=dict)
    quirks: Quirks | None = None

    def account(
        self,
        *,
        backend: str,
        key: str,
        shown: str,
        base_url: str | None = None,
        region: str | None = None,
        models: Sequence[str] | None = None,
    ) -> Account:
        """Access by this key; what is not given is the provider's own. Raises `ValueError` where it has none."""
        address = base_url or self.regions.get(region or "") or self.base_url
        offered = tuple(models or self.models)
        if address is None:
            raise ValueError(f"{self.title} has no address of its own. Give the relay `{backend}` a base_url.")
        if not offered:
            raise ValueError(f"{self.title} has no models of its own. Give the relay `{backend}` the models to offer.")
        return Account(backend, address, key, shown, offered)


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "openai",
            "OpenAI",
            "https://api.openai.com/v1",
            ("whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe"),
            {"eu": "https://eu.api.openai.com/v1", "us": "https://us.api.openai.com/v1"},
            Quirks(
                "openai",
                {
                    "whisper-1": Model(translate=True),
                    "gpt-transcribe": Model(times=False, words=False, events=True, keywords=True, longest_ms=1_400_000),
                    "gpt-4o-transcribe": _GPT,
                    "gpt-4o-mini-transcribe": _GPT,
                },
                other=_GPT,
                languages=_WHISPER,
            ),
        ),
        Provider(
            "groq",
            "Groq",
            "https://api.groq.com/openai/v1",
            ("whisper-large-v3-turbo", "whisper-large-v3"),
            quirks=Quirks(
                "groq",
                {"whisper-large-v3": Model(translate=True)},
                prompt_chars=896,
                least_billed_ms=10_000,
                languages=_WHISPER,
            ),
        ),
        Provider(
            "vllm",
            "vLLM",
            quirks=Quirks("vllm", other=Model(words=False, translate=True)),
        ),
        Provider(
            "openai-compatible",
            "An OpenAI-compatible server",
            quirks=Quirks("openai-compatible", other=Model(translate=True), most_bytes=100 * MIB),
        ),
        Provider(
            "deepgram",
            "Deepgram",
            "https://api.deepgram.com",
            ("nova-3", "nova-2"),
            {"eu": "https://api.eu.deepgram.com"},
        ),
        Provider(
            "assemblyai",
            "AssemblyAI",
            "https://api.assemblyai.com",
            ("universal-3-pro", "universal-2"),
            {"eu": "https://api.eu.assemblyai.com"},
        ),
    )
}


def open_relay(provider: str, account: Account) -> Dispatcher:
    """The dispatcher that speaks to this account. Raises `ValueError` for a provider that there is not."""
    if provider == "deepgram":
        from dispatchers.backends.deepgram import DeepgramRelay

        return DeepgramRelay(account)
    if provider == "assemblyai":
        from dispatchers.backends.assemblyai import AssemblyAIRelay

        return AssemblyAIRelay(account)
    known = PROVIDERS.get(provider)
    if known is None or known.quirks is None:
        raise ValueError(f"There is no provider `{provider}`. There are: {', '.join(PROVIDERS)}.")
    return OpenAIRelay(account, known.quirks)
