# SPDX-License-Identifier: Apache-2.0
"""Settings as somebody would try them by hand: what the plan without arguments is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headinfer.errors import BudgetTooSmall


@dataclass(frozen=True, slots=True)
class Manual:
    """Settings given by hand.

    Attributes:
        chunk_tokens: tokens per forward pass.
        most_resident: as many heads on the GPU as fit beside that chunk, or none.
        near: share of the offloaded heads that the CPU attends in decode.
        device: where they mean something.
    """

    chunk_tokens: int
    most_resident: bool = False
    near: float | None = None
    device: str = "cuda"

    @property
    def name(self) -> str:
        if self.near is None:
            return f"grid-{self.chunk_tokens}"
        heads = "most" if self.most_resident else "none"
        return f"grid-{self.chunk_tokens}-{heads}-{self.near:.0%}".removesuffix("%")

    @property
    def label(self) -> str:
        text = f"by hand: chunks of {self.chunk_tokens:,}"
        if self.near is None:
            return text
        heads = "as many heads resident as fit" if self.most_resident else "none resident"
        return f"{text}, {heads}, {self.near:.0%} attended by the CPU"


ON_GPU = tuple(
    Manual(chunk, most, near)
    for chunk in (2048, 8192, 16384)
    for most in (False, True)
    for near in (0.0, 0.5)
)
ON_CPU = tuple(Manual(chunk, device="cpu") for chunk in (128, 256, 512, 1024, 2048, 4096))
GRID: dict[str, Manual] = {manual.name: manual for manual in (*ON_GPU, *ON_CPU)}


def options_of(manual: Manual, model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What `headinfer.attach` is given, on top of `given` (length and memory)."""
    options = {**given, "chunk_tokens": manual.chunk_tokens}
    if model.device.type == "cpu":
        return options
    options["near_data"] = manual.near
    options["resident_heads"] = _most(model, options) if manual.most_resident else 0
    return options


def _most(model: Any, options: dict[str, Any]) -> int:
    """Heads per layer, equally many in each, that fit."""
    from headinfer.hf.ahead import plan_for
    from headinfer.hf.geometry import geometry_of, weight_bytes_of

    weights = weight_bytes_of(model, model.device)
    rest = {name: value for name, value in options.items() if name != "expected_tokens"}
    most = max((layer.num_kv_heads for layer in geometry_of(model.config).full_layers), default=0)
    for heads in range(most, 0, -1):
        try:
            plan_for(
                model.config,
                prompt_tokens=options["expected_tokens"],
                device=model.device.type,
                weight_bytes=weights,
                **{**rest, "resident_heads": heads},
            )
        except BudgetTooSmall:
            continue
        return heads
    return 0
