# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a stretch of work: of the GPU as torch counts it, of the process as the OS does."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil
import torch

SAMPLE_S = 0.02


class PeakMemory:
    """A context manager; its numbers are final once it is left.

    Attributes:
        gpu_bytes: most bytes torch had allocated on `device`; None on a CPU.
        host_bytes: largest resident set of the process, sampled 50 times a second.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="headinfer-peak", daemon=True)
        self.gpu_bytes: int | None = None
        self.host_bytes = 0

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._cuda is not None:
            self.gpu_bytes = torch.cuda.max_memory_allocated(self._cuda)

    def as_dict(self) -> dict[str, int | None]:
        """Plain values, for JSON."""
        return {"gpu_bytes": self.gpu_bytes, "host_rss_bytes": self.host_bytes}

    def _sample(self) -> None:
        while True:
            self.host_bytes = max(self.host_bytes, self._process.memory_info().rss)
            if self._done.wait(SAMPLE_S):
                return
