"""What `stenogate serve` prints when it is ready: where it is, and a line that works when pasted."""

from __future__ import annotations

import shlex

from rich.console import Console

from dispatchers.engine.models import MICRO_SAMPLES
from gateway.serve import Announcement


def welcome(console: Console, announcement: Announcement) -> None:
    """Prints to the console; a token only where the gateway is embedded."""

    def say(line: str = "") -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"Stenogate listens on {announcement.url}  (docs: {announcement.url}/docs)")
    say(f"model: {announcement.model}" + (f" — {announcement.model_note}" if announcement.model_note else ""))
    if announcement.token is None:
        return
    sample = shlex.quote(str(MICRO_SAMPLES / "clip01.wav"))
    say("\nA token for the tenant `demo`, good for a day:\n")
    say(f"export STENOGATE_TOKEN={announcement.token}")
    say("\nTry it:\n")
    say(
        f'curl -s {announcement.url}/v1/audio/transcriptions -H "Authorization: Bearer $STENOGATE_TOKEN" '
        f"-F model=micro -F file=@{sample}"
    )
    say()
