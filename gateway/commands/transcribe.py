"""`stenogate transcribe`: one file through a running gateway, shown as it goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gateway.commands.client import Client, ClientError

DEFAULT_MODEL = "whisper-1"  # the API's alias of the tenant's default


async def whole(client: Client, path: Path, model: str | None, response_format: str, console: Console) -> None:
    """Prints the transcript to stdout; a job's progress to the console."""
    response = await client.transcribe(path, model=model or DEFAULT_MODEL, response_format=response_format)
    body = response.text
    if response.status_code == 202:
        job = response.json()
        await follow(client, job["links"], console)
        body = (await client.get(f"{job['links']['self']}/transcript", format=response_format)).text
    sys.stdout.write(body if body.endswith("\n") else body + "\n")


async def follow(client: Client, links: dict[str, str], console: Console) -> dict[str, Any]:
    """Shows a job's progress until it ends; returns it. Raises `ClientError` when it failed."""
    job: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("queued", total=1.0)
        async for job in client.job_events(links["events"]):
            progress.update(bar, completed=job["progress"], description=job["status"])
    if job.get("status") != "completed":
        error = job.get("error") or {}
        raise ClientError(f"the job {job.get('status', 'is lost')}: {error.get('message', 'no reason was given')}")
    return job


async def live(client: Client, path: Path, model: str | None, console: Console) -> list[str]:
    """Streams the file as it was spoken: firm text plain, the rest dim; finals go to stdout."""
    shown = Text()
    with Live(shown, console=console, auto_refresh=False, transient=True) as screen:

        def on_event(event: dict[str, Any]) -> None:
            match event["type"]:
                case "partial":
                    text, stable = event["text"], event["stable"]
                    screen.update(Text.assemble("… ", text[:stable], (text[stable:], "dim")), refresh=True)
                case "final" if event["text"]:
                    screen.update(Text(), refresh=True)
                    sys.stdout.write(event["text"] + "\n")
                    sys.stdout.flush()
                case _:
                    pass

        return await client.stream(path, on_event, model=model or DEFAULT_MODEL)
