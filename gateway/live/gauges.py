"""How full this process is with live sessions, and how far they are behind: counted when the metrics are asked for."""

from __future__ import annotations

from collections.abc import Callable

from gateway.live.seats import SEATS
from gateway.state import Gateway
from runtime.telemetry import SEATS_FREE, STREAM_LAG_SECONDS

QUANTILES = (0.5, 0.95, 1.0)


def tell_metrics(gateway: Gateway) -> None:
    """From now on the metrics speak of this gateway."""
    SEATS_FREE.set_function(lambda: seats_free(gateway))
    for quantile in QUANTILES:
        STREAM_LAG_SECONDS.labels(f"{quantile:g}").set_function(_lag(gateway, quantile))


def seats_free(gateway: Gateway) -> int:
    """How many more live streams would be let in: none while it drains, or while the engine is too far behind."""
    settings = gateway.settings
    if gateway.roster.draining or gateway.queue_wait_s() > settings.max_queue_wait_s:
        return 0
    return max(0, settings.max_streams - SEATS.taken)


def _lag(gateway: Gateway, quantile: float) -> Callable[[], float]:
    def seconds() -> float:
        lags = sorted(sight.lag_ms for session in gateway.roster.sessions if (sight := session.seen()) is not None)
        return lags[int((len(lags) - 1) * quantile)] / 1000 if lags else 0.0

    return seconds
