"""A WebSocket to a provider: to nobody else, bounded in what it holds, and what goes wrong with it in our words."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from dispatchers.backends.relay import Account, refusal
from dispatchers.backends.transport import tls
from dispatchers.errors import BackendError, BackendFailed, BackendTimeout, BackendUnavailable, BadAnswer

CLOSE_S = 1.0
PING_S, PONG_S = 10.0, 20.0
MESSAGE_BYTES = 256 * 1024
_FRAMES_WAITING = 16

_UNREADABLE = {1002, 1003, 1007, 1009}  # what we say when we close: RFC 6455, section 7.4.1
_AWAY = {1001, 1012, 1013}

_quiet = logging.getLogger(__name__)
_quiet.setLevel(logging.WARNING)  # below that, websockets logs headers and frames

Meaning: TypeAlias = Callable[[int], BackendError | None]
"""What a close code of the provider's own means; None: nothing particular."""


def _nothing(_: int) -> None:
    return None


class RelaySocket:
    """An open one. The reason a provider gives for closing may repeat anything, so it is not looked at."""

    def __init__(self, account: Account, socket: ClientConnection, meaning: Meaning):
        self._account = account
        self._socket = socket
        self._meaning = meaning

    async def send(self, frame: str | bytes, within_s: float) -> None:
        """Raises a `BackendError`: `BackendTimeout` where nothing is taken for so long."""
        with self._unbroken():
            try:
                async with asyncio.timeout(within_s):
                    await self._socket.send(frame)
            except TimeoutError:
                raise late(self._account) from None

    async def recv(self) -> str | bytes:
        """The next message. Raises a `BackendError` when there will be none."""
        with self._unbroken():
            return await self._socket.recv()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except ConnectionClosed as closed:
            raise _broken(self._account, closed, self._meaning) from None


@asynccontextmanager
async def connected(
    account: Account, address: str, headers: Mapping[str, str], *, connect_s: float, meaning: Meaning = _nothing
) -> AsyncIterator[RelaySocket]:
    """Left early, it is closed at once, whether or not the provider listens. Raises a `BackendError`."""
    try:
        socket = await _connect(address, headers, connect_s)
    except InvalidStatus as refused:
        raise refusal(account, refused.response.status_code, refused.response.headers) from None
    except WebSocketException:
        raise BadAnswer(f"{account.backend} does not speak as expected.") from None
    except TimeoutError:
        raise late(account) from None
    except OSError as error:
        raise BackendUnavailable(f"{account.backend} cannot be reached.") from error
    try:
        yield RelaySocket(account, socket, meaning)
    finally:
        await _close(socket)


def late(account: Account) -> BackendTimeout:
    """It took too long."""
    return BackendTimeout(f"{account.backend} did not answer in time.")


async def _connect(address: str, headers: Mapping[str, str], connect_s: float) -> ClientConnection:
    return await _Connect(
        address,
        additional_headers=headers,
        ssl=tls() if address.startswith("wss:") else None,
        proxy=None,
        logger=_quiet,
        compression=None,  # noise to a compressor
        open_timeout=connect_s,
        close_timeout=CLOSE_S,
        ping_interval=PING_S,
        ping_timeout=PONG_S,
        max_size=MESSAGE_BYTES,
        max_queue=_FRAMES_WAITING,
    )


class _Connect(connect):
    """To the account's provider and to nobody else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def _broken(account: Account, closed: ConnectionClosed, meaning: Meaning) -> BackendError:
    ours = closed.sent if closed.sent is not None and not closed.rcvd_then_sent else None
    if ours is not None and ours.code in _UNREADABLE:
        return BadAnswer(f"The answer of {account.backend} cannot be read.")
    if closed.rcvd is None:
        return BackendFailed(f"The connection to {account.backend} broke.")
    if (meant := meaning(closed.rcvd.code)) is not None:
        return meant
    if closed.rcvd.code in _AWAY:
        return BackendUnavailable(f"{account.backend} is not available (close {closed.rcvd.code}).")
    return BackendFailed(f"{account.backend} ended the stream (close {closed.rcvd.code}).")


async def _close(socket: ClientConnection) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):  # its own does not cover a peer that does not read
            await socket.close()
    except TimeoutError:
        pass
    finally:
        socket.transport.abort()
        await socket.wait_closed()
