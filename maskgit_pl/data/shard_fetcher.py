"""Shards of a stream, fetched and checked one after the other.

Each shard is fetched whole into a temporary file while the one before is in use, and scanned there as ``maskgit data
index`` scans it: a cut-off, damaged or hostile tar, half samples and labels that are no class are found before a
sample of it is used. Used by ``stream``.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

from torch import Tensor

from maskgit_pl.data.config import StreamConfig
from maskgit_pl.files import open_regular
from maskgit_pl.shards.images import load_square
from maskgit_pl.shards.scan import BAD_IMAGE, Labels, ShardScan, scan_shard
from maskgit_pl.shards.tar import BLOCK
from maskgit_pl.text import printable

__all__ = ["FetchedShard", "ShardFetcher", "StreamError", "StreamSample"]

log = logging.getLogger(__name__)

_CHUNK = 2**20
_MAX_SHARD_BYTES = 64 * 2**30


class StreamError(ValueError):
    """A shard of a stream cannot be reached or is not what it must be; the text names it."""


class StreamSample(NamedTuple):
    """A sample of a fetched shard.

    Attributes:
        data: The image file.
        label: In [0, num_classes).
        url: Of its shard.
        name: Shard and member, for messages.
        epoch: How often the list of shards had been gone through when the shard was opened.
    """

    data: bytes
    label: int
    url: str
    name: str
    epoch: int

    def decode(self, image_size: int, channels: int, crop: tuple[float, float] | None) -> Tensor:
        """Decodes and crops the image, (channels, image_size, image_size) uint8."""
        return load_square(self.data, image_size=image_size, channels=channels, crop=crop, name=self.name)


class FetchedShard(NamedTuple):
    """A shard as an open file on this machine; its temporary file, if it has one, has no name any more."""

    url: str
    descriptor: int
    epoch: int
    scan: ShardScan

    def samples(self) -> Iterator[StreamSample]:
        """Yields the samples in their order, then closes the file."""
        try:
            for _, offset, size, label in self.scan.rows.tolist():
                data = os.pread(self.descriptor, size, offset)
                header = os.pread(self.descriptor, 100, offset - BLOCK)
                member = printable(header.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
                yield StreamSample(data, label, self.url, f"{self.url}:{member}", self.epoch)
        finally:
            os.close(self.descriptor)


class ShardFetcher:
    """Fetches shards, each while the one before is in use.

    1. Begin to fetch the first shard in a thread of its own.
    2. Wait until it is here, whole and checked; a shard that stalls, cannot be reached or is damaged ends the run.
    3. Begin to fetch the next one, then hand the shard out.

    Args:
        urls: In the order of use, each with its epoch.
        config: Number of attempts, and seconds until a shard counts as stalled.
        labels: Source of the labels.
    """

    def __init__(self, urls: Iterator[tuple[str, int]], config: StreamConfig, labels: Labels) -> None:
        self.urls = urls
        self.config = config
        self.labels = labels
        self._alive = time.monotonic()  # time of the last byte

    def __iter__(self) -> Iterator[FetchedShard]:
        following = self._begin()  # 1.
        while following is not None:
            url, epoch, future = following
            descriptor, scan = self._wait(url, future)  # 2.
            following = self._begin()  # 3.
            yield FetchedShard(url, descriptor, epoch, scan)

    def _begin(self) -> tuple[str, int, Future[tuple[int, ShardScan]]] | None:
        """Begins to fetch the next shard, in a thread that ends with the process whatever it waits for."""
        url, epoch = next(self.urls, (None, 0))
        if url is None:
            return None
        future: Future[tuple[int, ShardScan]] = Future()
        self._alive = time.monotonic()
        Thread(target=self._fetch, args=(url, future), daemon=True).start()
        return url, epoch, future

    def _wait(self, url: str, future: Future[tuple[int, ShardScan]]) -> tuple[int, ShardScan]:
        """Waits for a shard.

        Raises:
            StreamError: if nothing arrives for ``stall_seconds``, or what arrives is not a shard.
        """
        patience = self.config.stall_seconds
        while True:
            try:
                return future.result(timeout=max(0.01, self._alive + patience - time.monotonic()))
            except NotYetError:
                if time.monotonic() - self._alive >= patience:
                    raise StreamError(
                        f"stream {url}: nothing came for {patience:g} s (data.stream.stall_seconds)"
                    ) from None

    def _fetch(self, url: str, future: Future[tuple[int, ShardScan]]) -> None:
        try:
            future.set_result(self._shard(url))
        except Exception as error:
            future.set_exception(error)

    def _shard(self, url: str) -> tuple[int, ShardScan]:
        local = _local_path(url)
        if local is not None:
            try:
                descriptor = open_regular(local)
            except OSError as error:
                raise StreamError(f"stream {url}: cannot be read ({error.strerror})") from error
            return self._scan(url, descriptor)
        with tempfile.TemporaryFile(prefix="maskgit-stream-") as file:
            self._download_patiently(url, file)
            return self._scan(url, os.dup(file.fileno()))

    def _download_patiently(self, url: str, file: IO[bytes]) -> None:
        """Downloads a shard into a file.

        Raises:
            StreamError: if no attempt succeeds.
        """
        for attempt in range(1, self.config.attempts + 1):
            try:
                return self._download(url, file)
            except ImportError as error:
                raise StreamError(f"stream {url}: {error}; install with pip what it names") from error
            except StreamError:
                raise
            except Exception as error:  # every file system has errors of its own, and its own idea of "not found"
                cause = error if error.__cause__ is None else error.__cause__
                what = f"{type(cause).__name__}: {cause}"
                if attempt == self.config.attempts:
                    raise StreamError(f"stream {url}: not reached in {attempt} attempts ({what})") from error
                log.warning("stream %s: attempt %d of %d: %s", url, attempt, self.config.attempts, what)
                self._alive = time.monotonic()
                time.sleep(attempt)
        return None

    def _download(self, url: str, file: IO[bytes]) -> None:
        import fsspec  # type: ignore[import-untyped]  # has no types

        file.seek(0)
        file.truncate()
        size = 0
        with fsspec.open(url, "rb") as source:
            while block := source.read(_CHUNK):
                self._alive = time.monotonic()
                size += file.write(block)
                if size > _MAX_SHARD_BYTES:
                    raise StreamError(f"stream {url}: at most {_MAX_SHARD_BYTES} bytes a shard are read")
        file.flush()

    def _scan(self, url: str, descriptor: int) -> tuple[int, ShardScan]:
        """Returns the open file and its scan.

        Raises:
            StreamError: if it is not a whole tar, holds no sample, or has samples that are not whole.
        """
        path = Path(f"/dev/fd/{descriptor}")
        try:
            scan = scan_shard(path, self.labels)
            if scan.damage:
                raise StreamError(f"stream {url}: a whole, uncompressed tar is needed, got: {scan.damage}")
            wrong = [
                f"{fault.count} {text} (first {fault.first.removeprefix(f'{path.name}:')})"
                for text, fault in scan.faults.items()
                if text != BAD_IMAGE
            ]
            if wrong:
                raise StreamError(f"stream {url}: whole samples are needed, got {'; '.join(wrong)}")
            if not len(scan.rows):
                raise StreamError(f"stream {url}: a sample of an image and a label is needed, got none")
        except BaseException:
            os.close(descriptor)
            raise
        self._alive = time.monotonic()
        return descriptor, scan


def _local_path(url: str) -> Path | None:
    if re.match(r"[A-Za-z][\w+.-]*:", url) is None:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None
