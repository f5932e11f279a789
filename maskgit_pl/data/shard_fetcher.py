"""Downloads and checks the shards of a stream, one after the other.

Each shard is downloaded completely into a temporary file while the previous one is in use. It is scanned there in the
same way as by ``maskgit data index``, so that a truncated, damaged or hostile tar, incomplete samples and invalid
labels are found before any of its samples is used. Used by ``stream``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
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
from maskgit_pl.image_format import ImageSize
from maskgit_pl.shards.crops import Place
from maskgit_pl.shards.images import load_image
from maskgit_pl.shards.labels import Labels
from maskgit_pl.shards.scan import BAD_IMAGE, ShardScan, scan_shard
from maskgit_pl.shards.tar import BLOCK
from maskgit_pl.text import printable

__all__ = ["FetchedShard", "ShardFetcher", "StreamError", "StreamSample"]

log = logging.getLogger(__name__)

_CHUNK = 2**20  # bytes of one read
_MAX_SHARD_BYTES = 64 * 2**30


def _reset_fsspec() -> None:
    """Lets fsspec start a new thread in a forked worker, which has only a dead copy of its parent's.

    Newer versions of fsspec do it themselves; with 2025.3.0, of datasets 4.0, the worker would wait forever.
    """
    if "fsspec.asyn" in sys.modules:
        getattr(sys.modules["fsspec.asyn"], "reset_lock", lambda: None)()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_reset_fsspec)


class StreamError(ValueError):
    """A shard of a stream cannot be downloaded or is invalid. The message names it."""


class StreamSample(NamedTuple):
    """A sample of a fetched shard.

    Attributes:
        data: Bytes of the image file.
        label: Class in [0, num_classes).
        url: URL of its shard.
        name: Shard and member, for messages.
        epoch: Number of complete passes through the list of shards before the shard was opened.
    """

    data: bytes
    label: int
    url: str
    name: str
    epoch: int

    def decode(self, image_size: ImageSize, channels: int, crop: Place) -> Tensor:
        """Decodes and crops the image.

        Args:
            image_size: Size of the result: H = W, or (H, W).
            channels: Channels of the result, 1 or 3.
            crop: Place of the crop; see ``load_image_into``.

        Returns:
            (channels, H, W) uint8.
        """
        return load_image(self.data, image_size=image_size, channels=channels, crop=crop, name=self.name)


class FetchedShard(NamedTuple):
    """A shard as an open local file. A temporary file has no name, so it vanishes with its descriptor."""

    url: str
    descriptor: int
    epoch: int
    scan: ShardScan

    def samples(self) -> Iterator[StreamSample]:
        """Yields the samples in their order, then closes the file."""
        try:
            for _, offset, size, label in self.scan.rows.tolist():
                data = os.pread(self.descriptor, size, offset)
                header = os.pread(self.descriptor, 100, offset - BLOCK)  # the member's name
                member = printable(header.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
                yield StreamSample(data, label, self.url, f"{self.url}:{member}", self.epoch)
        finally:
            os.close(self.descriptor)


class ShardFetcher:
    """An iterator of shards, which downloads each shard while the previous one is in use.

    1. Start to download the first shard in a thread of its own.
    2. Wait until it is complete and checked. A shard that stalls, cannot be downloaded or is damaged ends the run.
    3. Start to download the next shard, then yield this one.

    Args:
        urls: URLs in the order of use, each with its epoch.
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
        try:
            while following is not None:
                url, epoch, future = following
                descriptor, scan = self._wait(url, future)  # 2.
                following = self._begin()  # 3.
                yield FetchedShard(url, descriptor, epoch, scan)
        finally:
            # A validation may end before the last shard: nobody closes the file of the shard after it.
            if following is not None:
                following[2].add_done_callback(_close_unused)

    def _begin(self) -> tuple[str, int, Future[tuple[int, ShardScan]]] | None:
        """Starts to download the next shard; returns its URL, its epoch and its future, or None after the last one."""
        url, epoch = next(self.urls, (None, 0))
        if url is None:
            return None
        future: Future[tuple[int, ShardScan]] = Future()
        self._note_progress()
        # A daemon: a thread that waits for the network does not keep the process alive.
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
                if future.done():  # in this moment, or with a TimeoutError of the file system
                    return future.result()
                # The deadline moves with every block that arrives, and every member that is checked.
                if time.monotonic() - self._alive >= patience:
                    raise StreamError(f"stream {url}: no data for {patience:g} s (data.stream.stall_seconds)") from None

    def _fetch(self, url: str, future: Future[tuple[int, ShardScan]]) -> None:
        try:
            future.set_result(self._shard(url))
        except Exception as error:
            future.set_exception(error)

    def _shard(self, url: str) -> tuple[int, ShardScan]:
        # Local shards are read in place.
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
        """Downloads a shard into a file, in several attempts with growing pauses.

        Raises:
            StreamError: if all attempts fail.
        """
        for attempt in range(1, self.config.attempts + 1):
            try:
                return self._download(url, file)
            except ImportError as error:
                raise StreamError(f"stream {url}: {error}; install this package with pip") from error
            except StreamError:
                raise
            except Exception as error:  # each file system raises its own errors
                cause = error if error.__cause__ is None else error.__cause__
                what = f"{type(cause).__name__}: {cause}"
                if attempt == self.config.attempts:
                    raise StreamError(f"stream {url}: download failed in {attempt} attempts ({what})") from error
                log.warning("stream %s: attempt %d of %d failed: %s", url, attempt, self.config.attempts, what)
                self._note_progress()
                time.sleep(attempt)
        return None

    def _download(self, url: str, file: IO[bytes]) -> None:
        import fsspec  # type: ignore[import-untyped]  # has no types

        # An earlier attempt may have left a part.
        file.seek(0)
        file.truncate()
        size = 0
        with fsspec.open(url, "rb") as source:
            while block := source.read(_CHUNK):
                self._note_progress()
                size += file.write(block)
                if size > _MAX_SHARD_BYTES:
                    raise StreamError(f"stream {url}: a shard must have at most {_MAX_SHARD_BYTES} bytes, got more")
        file.flush()

    def _scan(self, url: str, descriptor: int) -> tuple[int, ShardScan]:
        """Scans an open shard.

        Images that cannot be read are allowed here; ``UnreadableImages`` counts them.

        Returns:
            The descriptor and the scan.

        Raises:
            StreamError: if it is not a complete tar, has no samples, or has incomplete samples.
        """
        path = Path(f"/dev/fd/{descriptor}")  # the file has no other name
        try:
            scan = scan_shard(path, self.labels, vectors=False, hashed=False, on_member=self._note_progress)
            if scan.damage:
                raise StreamError(f"stream {url}: a shard must be a complete, uncompressed tar, got: {scan.damage}")
            wrong = [
                f"{fault.count} {text} (first {fault.first.removeprefix(f'{path.name}:')})"
                for text, fault in scan.faults.items()
                if text != BAD_IMAGE
            ]
            if wrong:
                raise StreamError(f"stream {url}: all samples must be complete, got {'; '.join(wrong)}")
            if not len(scan.rows):
                raise StreamError(f"stream {url}: a shard must have at least 1 sample of an image and a label, got 0")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, scan

    def _note_progress(self) -> None:
        self._alive = time.monotonic()


def _close_unused(future: Future[tuple[int, ShardScan]]) -> None:
    """Closes the file of a shard that nobody reads."""
    if future.exception() is None:
        os.close(future.result()[0])


def _local_path(url: str) -> Path | None:
    if re.match(r"[A-Za-z][\w+.-]*:", url) is None:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None
