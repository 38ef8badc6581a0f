"""Sends the whole test set to the digits app in four ways, and prints accuracy, throughput and batch sizes
of each: over HTTP, by `handle.map`, by `handle.remote` (whose ObjectRefs are awaited), 64 in flight each;
and by the blocking handle from 8 threads.

    python examples/digits/client.py                              # serves the app itself, on Ray
    python examples/digits/client.py --local                      # in this process: without `remote`
    python examples/digits/client.py --url http://127.0.0.1:8000  # asks one that runs: HTTP only

All of it shares this machine: the figures compare the ways, they are no benchmark of any.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec
from app import Image, Prediction, Scan, app, load_scans

import serveit

IN_FLIGHT = 64
NUM_THREADS = 8


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


async def by_call(client: serveit.Client, scans: list[Scan]) -> list[Prediction]:
    """Python objects in, Python objects out, in their order: straight to the replicas, the fast way."""
    handle = client.get_handle("Digits")
    images = (scan.image for scan in scans)
    return [prediction async for prediction in handle.map(images, max_in_flight=IN_FLIGHT)]


async def by_remote(client: serveit.Client, scans: list[Scan]) -> list[Prediction]:
    """By way of ObjectRefs, which could as well be given to other Ray tasks without fetching them."""
    handle = client.get_handle("Digits")
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(image: Image) -> Prediction:
        async with room:
            ref = await handle.remote(image)
            prediction: Prediction = await ref
            return prediction

    return await asyncio.gather(*(one(scan.image) for scan in scans))


async def by_threads(client: serveit.Client, scans: list[Scan]) -> list[Prediction]:
    """From code that blocks: each thread calls when it has an answer to its call before."""
    handle = client.get_handle("Digits", sync=True)

    def ask() -> list[Prediction]:
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            return list(threads.map(handle.call, (scan.image for scan in scans)))

    return await asyncio.to_thread(ask)


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


async def serve_and_ask(scans: list[Scan], *, local: bool) -> bool:
    """All ways, one after the other. Whether they agree."""
    async with serveit.serve(app, local=local, http={"port": 0}) as client:
        assert client.url is not None
        await by_call(client, scans[:IN_FLIGHT])  # the first few pay for what is loaded late
        await by_http(client.url, scans[:IN_FLIGHT])
        digits = [
            await report("HTTP", by_http(client.url, scans), scans),
            await report("call", by_call(client, scans), scans),
        ]
        if local:
            print("remote   left out: without Ray there are no ObjectRefs")
        else:
            digits.append(await report("remote", by_remote(client, scans), scans))
        digits.append(await report("threads", by_threads(client, scans), scans))
    return all(found == digits[0] for found in digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", help="a running server, http://host:port; without it one is started here")
    parser.add_argument("--local", action="store_true", help="start it in this process, without Ray")
    arguments = parser.parse_args()
    _, scans = load_scans()
    if arguments.url is not None:
        asyncio.run(ask_running(arguments.url, scans))
    elif not asyncio.run(serve_and_ask(scans, local=arguments.local)):
        sys.exit("the ways gave different predictions")


if __name__ == "__main__":
    main()
