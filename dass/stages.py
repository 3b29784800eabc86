"""Seconds and peak memory of the stages of a run."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

SAMPLING_SECONDS = 0.02
STATM = Path("/proc/self/statm")


class Stages:
    """The stages of one run by name: seconds and peak memory in GB (10^9 bytes), resident and on the GPU."""

    def __init__(self, device: torch.device) -> None:
        """`device`: its memory is measured too if it is a GPU."""
        self.device = device
        self._measured: dict[str, dict[str, float | None]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure a stage from entry to exit."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        with peak_resident_memory() as peak:
            yield
            if on_gpu:
                torch.cuda.synchronize(self.device)
        self._measured[name] = {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_gb": peak[0] / 1e9,
            "peak_gpu_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else None,
        }

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that an earlier process spent on a stage."""
        self._measured[name]["seconds"] = round((self._measured[name]["seconds"] or 0.0) + seconds, 3)

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return dict(self._measured)


@contextmanager
def peak_resident_memory() -> Iterator[list[int]]:
    """The largest resident memory of this process in bytes, in the one element of the list once the block ends.

    Sampled by a thread, since the kernel's own high-water mark is that of the whole life of the process.
    """
    peak = [resident_memory()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], resident_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], resident_memory())


def resident_memory() -> int:
    """Resident memory of this process now, bytes; 0 where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def release_freed_memory() -> None:
    """Give freed memory back to the system; the allocator keeps it otherwise, beside what comes next.

    A tokenizer leaves half a kilobyte per token of a long text behind, a reader of data sets its buffers, the walk all
    its activations.
    """
    if (arrow := sys.modules.get("pyarrow")) is not None:  # it has an allocator of its own
        arrow.default_memory_pool().release_unused()
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
