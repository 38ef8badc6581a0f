"""Reads /-/metrics as Prometheus does."""

from __future__ import annotations

from collections import Counter

import httpx2
from prometheus_client.parser import text_string_to_metric_families as parse

TIMEOUT_S = 20.0


class Scrape:
    """The samples of one app, or of none, at one moment."""

    def __init__(self, text: str, app: str) -> None:
        self._samples = [
            sample for family in parse(text) for sample in family.samples if sample.labels.get("app") == app
        ]

    def values(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The values of a series, by these labels; summed up over the others."""
        found: Counter[tuple[str, ...]] = Counter()
        for sample in self._samples:
            if sample.name == name:
                found[tuple(sample.labels[label] for label in labels)] += sample.value  # type: ignore[assignment]
        return dict(found)

    def since(self, before: Scrape, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """By how much they have grown, where they have."""
        then = before.values(name, *labels)
        grown = {key: now - then.get(key, 0) for key, now in self.values(name, *labels).items()}
        return {key: by for key, by in grown.items() if by}


async def scraped(url: str, app: str) -> Scrape:
    """What a server says of an app."""
    async with httpx2.AsyncClient(timeout=TIMEOUT_S) as http:
        reply = await http.get(f"{url}/-/metrics")
    assert reply.status_code == 200
    return Scrape(reply.text, app)
