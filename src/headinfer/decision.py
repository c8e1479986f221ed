# SPDX-License-Identifier: Apache-2.0
"""The plan as a record: what was decided for a run, what it is predicted to take, and why.

Making one is the business of `headinfer.plan`; how long it takes, of `headinfer.cost`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headinfer.budget import MemoryBudget, format_bytes
from headinfer.geometry import LOSSLESS, Geometry
from headinfer.packing import ring_slot_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision, and what it is predicted to take.

    Attributes:
        geometry: the model's cache.
        device: "cuda" or "cpu", where the model computes.
        batch: sequences.
        expected_tokens: length planned for; None when it is not known.
        new_tokens: of these, those that are generated; None when that is not known.
        chunk_tokens: tokens prefilled per forward pass.
        slot_bytes: size of one staging slot; 0 when nothing is staged.
        num_slots: staging slots.
        write_bytes: size of each of two write-back buffers.
        resident_heads: per layer of the model, KV heads that stay on the GPU.
        resident_bytes: GPU memory they may take; beyond it layers are demoted to host memory. None
            for no limit.
        near_share: of the offloaded heads, the share the CPU attends in decode, at first.
        near_adapts: that share follows what the machine does.
        threads: of the native kernel, where fewer than all do as well; None for all.
        kv_format: name of the stored format.
        budget: what is allowed, resolved: None only where there is no limit.
        gpu_parts: predicted peak on the GPU, part by part, bytes.
        host_bytes: predicted keys and values in host memory, bytes; 0 if the length is unknown.
        reasons: one line per decision.
        disk: folder of the file that takes what host memory does not; None without one.
        disk_bytes: predicted keys and values there, bytes; 0 if the length is unknown.
        disk_buffer_bytes: host memory between disk and compute, part of the host budget.
        kept_bytes: of the host budget, kept for what packed blocks on disk have in host memory: raw
            ones their overflow, and every one its label. Part of `host_bytes`.
        host_computes: the CPU attends heads in host memory in place, and those on disk as they come.
    """

    geometry: Geometry
    device: str
    batch: int
    expected_tokens: int | None
    chunk_tokens: int
    slot_bytes: int
    num_slots: int
    write_bytes: int
    resident_heads: tuple[int, ...]
    resident_bytes: int | None
    near_share: float
    near_adapts: bool
    kv_format: str
    budget: MemoryBudget
    gpu_parts: dict[str, int]
    host_bytes: int
    reasons: tuple[str, ...] = ()
    disk: str | None = None
    disk_bytes: int = 0
    disk_buffer_bytes: int = 0
    kept_bytes: int = 0
    host_computes: bool = False
    threads: int | None = None
    new_tokens: int | None = None

    @property
    def host_room(self) -> int | None:
        """Host memory for keys and values: the budget less what a disk needs of it."""
        if self.budget.host_bytes is None:
            return None
        return max(self.budget.host_bytes - self.disk_buffer_bytes, 0)

    @property
    def staging(self) -> bool:
        """Tiles pass through the staging ring."""
        return self.slot_bytes > 0

    @property
    def gpu_bytes(self) -> int:
        """Predicted peak of GPU memory, weights included; 0 on a CPU."""
        return sum(self.gpu_parts.values())

    @property
    def staging_bytes(self) -> int:
        """GPU memory through which offloaded keys and values pass: independent of the context."""
        unpacked = self.slot_bytes if self.kv_format == LOSSLESS.name else 0
        return self.num_slots * self.ring_slot_bytes + 2 * self.write_bytes + unpacked

    @property
    def ring_slot_bytes(self) -> int:
        """What one staging slot takes: packed tiles are smaller than what they are unpacked to."""
        return ring_slot_bytes(self.geometry, self.slot_bytes, self.kv_format)

    @property
    def offloaded_heads(self) -> int:
        """KV heads, over all layers, whose keys and values are in host memory."""
        return sum(layer.num_kv_heads for layer in self.geometry.full_layers) - sum(
            self.resident_heads
        )

    def shorten_to(self, tokens: int) -> str:
        """The remedy of a context that is too long, where `tokens` fit, some of them generated."""
        new = self.new_tokens or 0
        beside = f", a prompt of {tokens - new:,} and {new:,} new ones" if 0 < new < tokens else ""
        return f"shorten the context to {tokens:,} tokens{beside}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.geometry.name,
            "device": self.device,
            "batch": self.batch,
            "expected_tokens": self.expected_tokens,
            "chunk_tokens": self.chunk_tokens,
            "head_wise_layers": len(self.geometry.full_layers),
            "layers": len(self.geometry.layers),
            "resident_heads": list(self.resident_heads),
            "resident_bytes": self.resident_bytes,
            "offloaded_heads": self.offloaded_heads,
            "near_share": self.near_share,
            "near_adapts": self.near_adapts,
            "threads": self.threads,
            "kv_format": self.kv_format,
            "slot_bytes": self.slot_bytes,
            "num_slots": self.num_slots,
            "write_bytes": self.write_bytes,
            "gpu_budget_bytes": self.budget.gpu_bytes,
            "host_budget_bytes": self.budget.host_bytes,
            "predicted_gpu_parts": dict(self.gpu_parts),
            "predicted_gpu_bytes": self.gpu_bytes,
            "predicted_host_bytes": self.host_bytes,
            "disk": self.disk,
            "disk_budget_bytes": self.budget.disk_bytes,
            "predicted_disk_bytes": self.disk_bytes,
            "disk_buffer_bytes": self.disk_buffer_bytes,
            "kept_bytes": self.kept_bytes,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        full, count = self.geometry.full_layers, len(self.geometry.layers)
        length = "unknown" if self.expected_tokens is None else f"{self.expected_tokens:,}"
        lines = [
            (
                f"{self.geometry.name} on {self.device}: {length} tokens, batch {self.batch}, "
                f"{len(full)} of {count} layers head by head"
            ),
            f"prefill in chunks of {self.chunk_tokens:,} tokens",
        ]
        if self.device == "cuda":
            parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.gpu_parts.items())
            lines.append(f"GPU peak, predicted: {format_bytes(self.gpu_bytes)} ({parts})")
        if self.expected_tokens is not None:
            lines.append(f"keys and values in host memory: {format_bytes(self.host_bytes)}")
            if self.disk_bytes:
                lines.append(f"keys and values on disk: {format_bytes(self.disk_bytes)}")
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])
