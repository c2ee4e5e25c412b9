"""The managed providers whose wire this release speaks, as the policy package needs to know them."""

from __future__ import annotations

from dispatchers.providers import PROVIDERS as SPOKEN
from policy.relays import Providers

PROVIDERS: Providers = {provider.name: provider.base_url for provider in SPOKEN.values()}
