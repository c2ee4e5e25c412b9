"""A file through a running gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.terminal import err
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer()


@app.command()
def transcribe(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Any audio file.")],
    stream: Annotated[bool, typer.Option("--stream", help="Send it live, at the pace it was spoken.")] = False,
    model: Annotated[str | None, typer.Option(help="A model's name; default: the tenant's.")] = None,
    format: Annotated[str, typer.Option(help="text, json, verbose_json, srt or vtt.")] = "text",  # noqa: A002
    url: Annotated[
        str | None, typer.Option(envvar="STENOGATE_URL", help="The gateway; default: the local one.")
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="STENOGATE_TOKEN", help="Default: the demo tenant's.")] = None,
) -> None:
    """Transcribes a file through a running gateway; a long one shows its progress.

    Example: `stenogate transcribe meeting.mp3 --format srt > meeting.srt`
    """
    from gateway.commands.transcribe import live, whole

    client = chores.local_client(Settings(), url, token)
    asyncio.run(live(client, file, model, err) if stream else whole(client, file, model, format, err))
