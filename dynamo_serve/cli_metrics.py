"""What `serve` shows as metrics, by its settings."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_serve import __version__
from dynamo_serve.config import Config
from dynamo_serve.metrics import Metrics
from dynamo_serve.observer import Vitals


def metrics_of(config: Config, model: str, vitals: Callable[[], Vitals]) -> Metrics:
    triton, scraper = config.triton, None
    if triton.metrics_endpoints:
        from dynamo_serve.scrape import Scraper  # noqa: PLC0415 - and an HTTP client with it

        addresses = zip(triton.endpoints, triton.metrics_endpoints, strict=True)
        scraper = Scraper(dict(addresses), triton.metrics_timeout_s)
    return Metrics(
        model=model,
        version=__version__,
        vitals=vitals,
        endpoints=triton.endpoints,
        scraper=scraper,
    )
