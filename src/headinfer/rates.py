# SPDX-License-Identifier: Apache-2.0
"""What a machine was measured to do, as numbers the cost model divides by.

Rates are bytes/s and FLOP/s with GB = 10**9; times are seconds. Measuring them is the business
of `headinfer.hf.probe`; nothing here knows how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

VERSION = 4
BLOCK_ROWS = 2048
PAGEABLE_BYTES_S = 6e9
"""Host to device from memory that is not page-locked, where it was not measured: an H100 on PCIe 5
gave this."""

THREADS_SHARE = 0.97
"""Of the best rate, what is as good: fewer threads leave processors to others."""

HIGHER_IS_BETTER = (
    "block_flops",
    "weight_bytes_s",
    "resident_bytes_s",
    "h2d_bytes_s",
    "d2h_bytes_s",
    "near_bytes_s",
    "h2d_beside_bytes_s",
    "near_packed_bytes_s",
    "host_read_bytes_s",
    "pageable_bytes_s",
)
LOWER_IS_BETTER = (
    "layer_s",
    "token_s",
    "chunk_layer_s",
    "streamed_layer_s",
    "pin_s_per_gib",
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Measurements of one compute device and its host, in one element type.

    Attributes:
        machine: what was measured; other machines must not use it.
        dtype: element type of weights, keys and values.
        block_flops: FLOP/s of a decoder layer without its attention, long inputs.
        attention_flops: FLOP/s of attention of a chunk over many keys, by head dim.
        weight_bytes_s: bytes of weights read per second for a single token.
        resident_bytes_s: bytes of keys and values attended per second where the device reads them
            in place, for a single token.
        layer_s: seconds of a token's layer that has next to nothing to compute. On a GPU it is what
            comes on top of reading weights, in a recorded step, mostly the launches of small kernels.
        token_s: seconds of a generated token beside its layers: sampling, masks, Python.
        chunk_layer_s, streamed_layer_s: seconds of a layer of a prompt's chunk that has next to nothing to
            compute, its heads resident or streamed; None on a CPU. More than `layer_s`, as a chunk is
            enqueued by the model's own code, and steps of a decode are recorded.
        h2d_bytes_s: host to device from page-locked memory; None on a CPU.
        d2h_bytes_s: device to host; None on a CPU.
        near_bytes_s: keys and values attended per second by the CPU while copies run; None on a
            CPU, where that is `resident_bytes_s`.
        h2d_beside_bytes_s: host to device while the CPU attends at that rate; None if not measured.
        near_packed_bytes_s: bytes of packed keys and values attended per second by the CPU, like
            `near_bytes_s`; None where that was not measured, or the type does not pack.
        near_by_threads: keys and values that the native kernel attends per second while nothing else
            runs, by its threads; empty without the native library.
        host_read_bytes_s: host memory read by all threads.
        pin_s_per_gib: mapping, touching and page-locking memory; None on a CPU.
        pageable_bytes_s: host to device from memory that is not page-locked.
        block_rows: tokens at once that `block_flops` was measured with.
        disk_read_bytes_s, disk_write_bytes_s: of the folder a run is given; None without one.
        seconds: how long measuring took.
    """

    machine: str
    dtype: str
    block_flops: float
    attention_flops: Mapping[int, float]
    weight_bytes_s: float
    resident_bytes_s: float
    layer_s: float
    token_s: float
    chunk_layer_s: float | None = None
    streamed_layer_s: float | None = None
    h2d_bytes_s: float | None = None
    d2h_bytes_s: float | None = None
    near_bytes_s: float | None = None
    h2d_beside_bytes_s: float | None = None
    near_packed_bytes_s: float | None = None
    host_read_bytes_s: float | None = None
    pin_s_per_gib: float | None = None
    pageable_bytes_s: float = PAGEABLE_BYTES_S
    block_rows: int = BLOCK_ROWS
    disk_read_bytes_s: float | None = None
    disk_write_bytes_s: float | None = None
    near_by_threads: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    version: int = field(default=VERSION)

    def attention_flops_of(self, dim: int) -> float:
        """The rate at the nearest head dim measured."""
        return self.attention_flops[min(self.attention_flops, key=lambda known: abs(known - dim))]

    @property
    def shared_h2d_bytes_s(self) -> float | None:
        """Host to device while the CPU attends; as on its own where that was not measured."""
        if self.h2d_beside_bytes_s is None or self.h2d_bytes_s is None:
            return self.h2d_bytes_s
        return min(self.h2d_beside_bytes_s, self.h2d_bytes_s)

    @property
    def threads_enough(self) -> int | None:
        """The fewest threads that attend as fast as any number of them does, within `THREADS_SHARE`;
        None where that was not measured."""
        if not self.near_by_threads:
            return None
        best = max(self.near_by_threads.values())
        return min(n for n, rate in self.near_by_threads.items() if rate >= THREADS_SHARE * best)

    def best_of(self, other: Rates) -> Rates:
        """The higher of both rates and the shorter of both times, one by one: whatever else a
        machine does only ever makes it slower."""
        mine, theirs = asdict(self), asdict(other)
        found: dict[str, Any] = {"seconds": self.seconds + other.seconds}
        for name in HIGHER_IS_BETTER + LOWER_IS_BETTER:
            both = [value for value in (mine[name], theirs[name]) if value is not None]
            if both:
                found[name] = max(both) if name in HIGHER_IS_BETTER else min(both)
        dims = self.attention_flops.keys() & other.attention_flops.keys()
        found["attention_flops"] = {
            dim: max(self.attention_flops[dim], other.attention_flops[dim]) for dim in sorted(dims)
        }
        counts = self.near_by_threads.keys() & other.near_by_threads.keys()
        found["near_by_threads"] = {
            count: max(self.near_by_threads[count], other.near_by_threads[count])
            for count in sorted(counts)
        }
        return replace(self, **found)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Rates | None:
        """The record `as_dict` made; None if it is of another version or incomplete."""
        if found.get("version") != VERSION:
            return None
        try:
            numbered = {
                name: {int(number): float(rate) for number, rate in found.get(name, {}).items()}
                for name in ("attention_flops", "near_by_threads")
            }
            return cls(**{**found, **numbered})
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def __str__(self) -> str:
        def gb(rate: float | None) -> str:
            return "-" if rate is None else f"{rate / 1e9:,.1f} GB/s"

        dims = ", ".join(
            f"{rate / 1e12:,.2f} at {dim}" for dim, rate in self.attention_flops.items()
        )
        lines = [
            f"rates of {self.machine} in {self.dtype}, measured in {self.seconds:.1f} s:",
            f"  layers without attention: {self.block_flops / 1e12:,.2f} TFLOP/s",
            f"  attention of a prompt, by head dim: {dims} TFLOP/s",
            f"  one token reads weights at {gb(self.weight_bytes_s)}",
            f"  one token attends keys and values in place at {gb(self.resident_bytes_s)}",
            f"  host memory is read at {gb(self.host_read_bytes_s)}",
            (
                f"  a layer takes at least {self.layer_s * 1e3:.2f} ms, a token "
                f"{self.token_s * 1e3:.2f} ms more"
            ),
        ]
        if self.near_by_threads:
            counts = ", ".join(f"{gb(rate)} at {n}" for n, rate in self.near_by_threads.items())
            lines.append(f"  the native kernel attends, by threads: {counts}")
        if self.disk_read_bytes_s is not None:
            lines.append(
                f"  the disk is read at {gb(self.disk_read_bytes_s)}, written at "
                f"{gb(self.disk_write_bytes_s)}"
            )
        if self.chunk_layer_s is not None and self.streamed_layer_s is not None:
            lines.append(
                f"  of a prompt's chunk a resident layer takes at least {self.chunk_layer_s * 1e3:.2f} ms, a "
                f"streamed one {self.streamed_layer_s * 1e3:.2f} ms"
            )
        if self.h2d_bytes_s is not None:
            pin = "-" if self.pin_s_per_gib is None else f"{self.pin_s_per_gib:.2f} s per GiB"
            lines += [
                f"  host to device {gb(self.h2d_bytes_s)}, back {gb(self.d2h_bytes_s)}",
                (
                    f"  the CPU attends offloaded heads at {gb(self.near_bytes_s)} while "
                    f"{gb(self.shared_h2d_bytes_s)} go to the device; packed ones at "
                    f"{gb(self.near_packed_bytes_s)}"
                ),
                f"  page-locking {pin}",
            ]
        return "\n".join(lines)
