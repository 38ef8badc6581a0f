"""Sends the whole test set to the digits app, by `handle.map` and over HTTP, 64 in flight each way, and
prints accuracy, throughput and batch sizes of both.

    python examples/digits/client.py                              # serves the app itself, in this process
    python examples/digits/client.py --url http://127.0.0.1:8000  # asks one that runs: HTTP only

Without `--url` the app and the two callers share one process: the figures compare the two ways on this
machine, they are no benchmark of either.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable
from urllib.parse import urlsplit

import msgspec
from app import Image, Prediction, Scan, app, load_scans

import serveit

IN_FLIGHT = 64


class Connection:
    """A keep-alive HTTP connection that asks one thing at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._head = f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"

    async def predict(self, image: Image) -> Prediction:
        body = msgspec.json.encode(image)
        self._writer.write(f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status, *fields = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields if field)
        answer = await self._reader.readexactly(int(headers["content-length"]))
        if status.split()[1] != "200":
            raise RuntimeError(f"{status}: {answer.decode()}")
        return msgspec.json.decode(answer, type=Prediction)

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def by_handle(client: serveit.Client, scans: list[Scan]) -> list[Prediction]:
    """Through a native handle: Python objects in, Python objects out, in their order."""
    handle = client.get_handle("Digits")
    images = (scan.image for scan in scans)
    return [prediction async for prediction in handle.map(images, max_in_flight=IN_FLIGHT)]


async def by_http(url: str, scans: list[Scan]) -> list[Prediction]:
    """Over HTTP: each connection sends its next image when it has an answer to the one before."""
    address = urlsplit(url)
    predictions: dict[int, Prediction] = {}
    left = iter(enumerate(scans))

    async def one_connection() -> None:
        streams = await asyncio.open_connection(address.hostname, address.port or 80)
        connection = Connection(*streams, address.netloc)
        try:
            for index, scan in left:
                predictions[index] = await connection.predict(scan.image)
        finally:
            await connection.aclose()

    await asyncio.gather(*(one_connection() for _ in range(IN_FLIGHT)))
    return [predictions[index] for index in range(len(scans))]


async def report(way: str, asking: Awaitable[list[Prediction]], scans: list[Scan]) -> list[int]:
    """Wait for the predictions, print what they came to, and return the digits."""
    begun = time.perf_counter()
    predictions = await asking
    took_s = time.perf_counter() - begun
    pairs = zip(predictions, scans, strict=True)
    accuracy = sum(prediction.digit == scan.digit for prediction, scan in pairs) / len(scans)
    # A batch of n is told of n times, so each tells of 1/n of a batch.
    num_batches = sum(1 / prediction.batch_size for prediction in predictions)
    print(
        f"{way:<8} accuracy {accuracy:.4f}   {len(scans) / took_s:7,.0f}/s   "
        f"mean batch {len(scans) / num_batches:4.1f}   ({len(scans)} scans in {took_s:.2f} s)"
    )
    return [prediction.digit for prediction in predictions]


async def ask_running(url: str, scans: list[Scan]) -> None:
    await by_http(url, scans[:IN_FLIGHT])
    await report("HTTP", by_http(url, scans), scans)


async def serve_and_ask(scans: list[Scan]) -> bool:
    """Both ways, one after the other. Whether they agree."""
    async with serveit.serve(app, local=True, http={"port": 0}) as client:
        assert client.url is not None
        await by_handle(client, scans[:IN_FLIGHT])  # the first few pay for what is loaded late
        await by_http(client.url, scans[:IN_FLIGHT])
        native = await report("handle", by_handle(client, scans), scans)
        over_http = await report("HTTP", by_http(client.url, scans), scans)
    return native == over_http


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", help="a running server, http://host:port; without it one is started here")
    url = parser.parse_args().url
    _, scans = load_scans()
    if url is not None:
        asyncio.run(ask_running(url, scans))
    elif not asyncio.run(serve_and_ask(scans)):
        sys.exit("the two ways gave different predictions")


if __name__ == "__main__":
    main()
