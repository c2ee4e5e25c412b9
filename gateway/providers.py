"""The managed providers whose wire this release speaks."""

from __future__ import annotations

from policy.relays import Providers

PROVIDERS: Providers = {
    "assemblyai": "https://api.assemblyai.com",
    "deepgram": "https://api.deepgram.com",
    "groq": "https://api.groq.com/openai/v1",
    "openai": "https://api.openai.com/v1",
    "openai-compatible": None,
}
