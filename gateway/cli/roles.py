"""What a process can be."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gateway.cli.terminal import out
from runtime.settings import Settings

app = typer.Typer()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
) -> None:
    """The gateway. With no settings it is everything at once: embedded Postgres, workers, a tenant to try it with.

    Example: `STENOGATE_MODEL=micro stenogate serve --port 9000`
    """
    from gateway.serve import serve as run

    given = {"host": host, "port": port}
    run(Settings().model_copy(update={key: value for key, value in given.items() if value is not None}), _announce)


def _announce(announcement: object) -> None:
    from gateway.commands.welcome import welcome
    from gateway.serve import Announcement

    if isinstance(announcement, Announcement):
        welcome(out, announcement)


@app.command()
def work() -> None:
    """A worker: takes queued jobs. Needs STENOGATE_DATABASE_URL, STENOGATE_SYSTEM_DATABASE_URL, STENOGATE_REDIS_URL."""
    from workers.main import run

    run(Settings())


@app.command()
def engine(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8090,
) -> None:
    """The recogniser alone, over HTTP in OpenAI's shape, for callers who hold STENOGATE_ENGINE_TOKEN."""
    from dispatchers.engine.serve import run
    from dispatchers.local import choose_model, local_backend
    from runtime.telemetry import configure_logging

    settings = Settings()
    configure_logging(settings.log_level, settings.log_format)
    run(
        lambda: local_backend(settings, choose_model(settings)),
        host=host,
        port=port,
        token=settings.engine_token.get_secret_value() if settings.engine_token else None,
        max_upload_bytes=settings.max_upload_bytes,
    )


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="`micro` (offline), or any Whisper model's name, such as `small`.")
    ] = "micro",
) -> None:
    """Speech becomes text through the real gateway, by file, by live stream and by job; then the bill for it."""
    from gateway.commands.demo import run

    sys.exit(run(model, out))
