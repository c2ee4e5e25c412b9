"""The engine as the child of a gateway: on a Unix socket in its parent's folder, for as long as the parent lives.

Its stdin is a pipe that the parent holds open, and whose end is the only thing that ends it: a parent that is gone,
killed outright or done, leaves nobody behind. Signals meant for the parent, from a terminal or a service manager that
signals the whole group, must not take the models away from streams that are still being answered.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
import uvloop

from dispatchers.backends.local import LocalBackend
from dispatchers.engine.serve import serve, uvicorn_config
from dispatchers.engine.server import EngineServer
from dispatchers.engine.wire import END_S, Failure, Greeting, dump_greeting
from runtime.errors import StenogateError


def run(build: Callable[[], tuple[LocalBackend, str]], path: Path, *, max_upload_bytes: int) -> int:
    """Serves on `path` until stdin ends; the exit status. Blocking; for the main thread of a process of its own.

    Says one `Greeting` on stdout. `build` makes the backend, and a note on its default model."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its parent has told that it starts and ends
    greet = _greeter()
    note = ""

    def built() -> LocalBackend:
        nonlocal note
        backend, note = build()
        return backend

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1024)
        server = EngineServer(built, token=None, max_upload_bytes=max_upload_bytes)
        try:
            uvloop.run(_serve(server, listener, path, lambda: greet(Greeting(note))))
        except StenogateError as error:
            greet(Greeting(failure=Failure.of(error)))
            return 1
        finally:
            path.unlink(missing_ok=True)
    _tidy(path)
    return 0


async def _serve(server: EngineServer, listener: socket.socket, path: Path, ready: Callable[[], None]) -> None:
    http = _Server(uvicorn_config(server))

    def end() -> None:
        http.should_exit = True

    threading.Thread(target=_outlive, args=(asyncio.get_running_loop(), end, path), daemon=True).start()
    await serve(server, listener, http, ready)


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _outlive(loop: asyncio.AbstractEventLoop, end: Callable[[], None], path: Path) -> None:
    """Waits for the parent's end, and does not outlive it by more than `END_S`, whatever the models are at."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    loop.call_soon_threadsafe(end)
    time.sleep(END_S)
    _tidy(path)
    os._exit(1)


def _tidy(path: Path) -> None:
    """Removes the socket, and its folder in the place of a parent that is gone; one that is there may have done so."""
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def _greeter() -> Callable[[Greeting], None]:
    """Keeps stdout for the parent: what libraries print goes to stderr, and no process of ours inherits it."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lambda greeting: _write(channel, dump_greeting(greeting))


def _write(channel: int, data: bytes) -> None:
    try:
        os.write(channel, data)  # of one line, which a pipe takes whole
    except BrokenPipeError:
        return  # the parent is gone, and so are we in a moment
