"""FFCV behind `EpochLoader`: its files, memory managers and compiled pipelines, with our own thread around them.

FFCV's `EpochIterator` is replaced because an exception in its thread hangs the consumer forever, an abandoned one leaks
its thread and buffers, and the tensors it yields are views into a ring that is overwritten five batches later.
Import this module lazily: it loads ffcv (seconds).
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch
from ffcv.fields.decoders import IntDecoder
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import select_buffer
from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
from ffcv.transforms import ToTensor, ToTorchImage

from .batches import BatchPlan
from .ffcv_decoder import CropDecoder, require_thread_safe_numba, usable_threads
from .loader import Batch, ImageLoader
from .shortened import CutShort, Watched, speak_before_sigbus

_POLL_SECONDS = 0.2
_CHUNK = 4  # images a thread takes at a time: halves of a batch are never equally long


class FFCVLoader(ImageLoader):
    """Batches of one beton.

    Args:
        path: The beton.
        plan: Which images make which batch.
        num_workers: Threads decoding one batch; more than numba was started with means that many.
        os_cache: Map the file and leave caching to the operating system; False reads it into this process's memory.
        batches_ahead: Decoded batches that may wait.
        size: Side of the images of an epoch, px.
        crop: `scale`, `ratio`, `flip` and `eval_ratio` of `CropDecoder`.

    Raises:
        ValueError: numba has no thread-safe threading layer.
    """

    plan: BatchPlan

    def __init__(
        self,
        path: Path,
        plan: BatchPlan,
        *,
        num_workers: int,
        os_cache: bool,
        batches_ahead: int,
        size: Callable[[int], int],
        **crop: Any,
    ) -> None:
        super().__init__(plan)
        require_thread_safe_numba()
        self.file = Watched(path)
        if os_cache:
            speak_before_sigbus(path.parent)
        threads = usable_threads(num_workers)
        self.batches_ahead, self.size = batches_ahead, size
        self.decoder = CropDecoder(size(0), training=plan.training, os_cache=os_cache, threads=threads, **crop)
        manager = OSCacheManager if os_cache else ProcessCacheManager
        try:
            # Its reader, half a second to compile, is for FFCV's own image decoders.
            with patch.object(manager, "compile_reader", lambda _: None):
                self.ffcv = Loader(
                    str(path),
                    batch_size=plan.batch_size,
                    num_workers=threads,
                    os_cache=os_cache,
                    seed=plan.seed,
                    pipelines={
                        "image": [self.decoder, ToTensor(), ToTorchImage()],
                        "label": [IntDecoder(), ToTensor()],
                    },
                )
        except (IndexError, ValueError) as error:  # numpy's, of a header or a table that is not all there
            raise CutShort(
                f"{path}: not a sound beton any more: {path.stat().st_size} bytes ({error}); it was cut short after it "
                "was checked: bring it back or prepare it again"
            ) from error

    def open(self, batches: list[np.ndarray], epoch: int) -> Generator[Batch, None, None]:
        self.decoder.size = self.size(epoch)
        keys = np.array([_key(self.plan.seed, epoch, repeat) for repeat in range(self.plan.repeats)])
        work = [(self.plan.images_of(draws), keys[draws // self.plan.count]) for draws in batches]
        thread = _DecodeThread(self.ffcv, self.decoder, work, self.batches_ahead, self.file)
        try:
            yield from thread.results()
        finally:
            thread.close()


class _DecodeThread(Thread):
    """Decodes batches, each the images' indices and keys, into a queue; what it raises comes out at the consumer."""

    def __init__(
        self,
        ffcv: Loader,
        decoder: CropDecoder,
        work: list[tuple[np.ndarray, np.ndarray]],
        batches_ahead: int,
        file: Watched,
    ) -> None:
        super().__init__(name="ffcv-decode", daemon=True)
        self.ffcv, self.work, self.file = ffcv, work, file
        self.stop = Event()
        self.queue: Queue[Batch | BaseException | None] = Queue(batches_ahead)
        # One slot, not FFCV's batches_ahead + 2: a batch is copied out before the next is decoded.
        batches = [indices for indices, _ in work]
        self.memory = ffcv.graph.allocate_memory(max(map(len, batches), default=0), 1)
        node = next(node for node in ffcv.graph.nodes if getattr(node, "decoder", None) is decoder)
        self.control = self.memory["operation"][node.id][2][0]  # int64 [B, 2]: key in, JPEG status out
        self.context = ffcv.memory_manager.schedule_epoch(batches)
        self.context.__enter__()
        # An iterator still open when the interpreter exits would have its thread killed in native code: an abort.
        atexit.register(self.close)
        self.start()

    def run(self) -> None:
        try:
            # numba's count only: FFCV's setter would also change torch's, for the whole process.
            numba.set_num_threads(self.ffcv.num_workers)
            numba.set_parallel_chunksize(_CHUNK)  # of this thread's
            for number, (indices, keys) in enumerate(self.work):
                if not self._offer(self._decode(number, indices, keys)):
                    return
            self._offer(None)
        except BaseException as error:  # the consumer raises it; here it would only end a thread silently
            self._offer(error)

    def results(self) -> Iterator[Batch]:
        """Batches in order. Raises RuntimeError, from the original exception, when decoding fails, and ValueError: the
        file was cut short."""
        while True:
            try:
                result = self.queue.get(timeout=_POLL_SECONDS)
            except Empty:
                if self.is_alive() or not self.queue.empty():
                    continue
                raise RuntimeError(f"{self.ffcv.fname}: the decoding thread died without an exception") from None
            if result is None:
                return
            if isinstance(result, CutShort):
                raise result
            if isinstance(result, BaseException):
                raise RuntimeError(f"{self.ffcv.fname}: decoding failed: {result!r}") from result
            yield result

    def close(self) -> None:
        """Stops and joins the thread, and FFCV's page readers where it has some."""
        self.stop.set()
        self.join()
        atexit.unregister(self.close)
        self.context.__exit__(None, None, None)
        for reader in getattr(getattr(self.context, "executor", None), "threads", ()):
            reader.join()

    def _offer(self, result: Batch | BaseException | None) -> bool:
        while not self.stop.is_set():
            try:
                self.queue.put(result, timeout=_POLL_SECONDS)
                return True
            except Full:
                continue
        return False

    def _decode(self, number: int, indices: np.ndarray, keys: np.ndarray) -> Batch:
        self.file.check()
        self.control[: len(indices)] = np.stack([keys, np.zeros_like(keys)], axis=1)
        self.context.start_batch(number)
        values = {
            "batch_indices": indices,
            "storage_state": self.context.state,
            "metadata": self.ffcv.reader.metadata,
        }
        for prefix, kind in (("memory", "operation"), ("shared_memory", "shared")):
            buffers = self.memory[kind].items()
            values |= {f"{prefix}_{node}": select_buffer(buffer, 0, len(indices)) for node, buffer in buffers}
        stages, outputs = self.ffcv.code
        for stage, nodes in stages:
            values |= {f"result_{node}": result for node, result in zip(nodes, stage(**values), strict=True)}
        damaged = indices[self.control[: len(indices), 1] != 0]
        if len(damaged):
            raise ValueError(
                f"images {damaged[:5].tolist()} do not decode; run `vmoe-momentum data verify` on the dataset's folder"
                " and prepare it again"
            )
        images, labels = (values[f"result_{node}"] for node in outputs)
        return _own(images), _own(labels.reshape(-1))


def _key(*seeds: int) -> int:
    """63 bits of a seed sequence, so that they fit FFCV's signed buffers."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, pinned where there is a GPU: safe to keep and to transfer asynchronously."""
    return torch.empty_like(tensor, pin_memory=torch.cuda.is_available()).copy_(tensor)
