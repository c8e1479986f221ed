# SPDX-License-Identifier: Apache-2.0
"""GPUs one does not have, from their makers' public figures: for plans, never for claims.

Peak figures are turned into rates by shares that fused kernels reach in practice; everything made
from them is marked as an estimate. Measured rates of the machine at hand come from
`headinfer.hf.probe`.
"""

from __future__ import annotations

from dataclasses import dataclass

from headinfer.budget import GIB
from headinfer.errors import InputError
from headinfer.rates import Rates

USABLE = 0.94
"""Of a card's memory, what is left beside driver and context."""
ARITHMETIC = 0.65
"""Of the peak, what matrix products and fused attention reach."""
BANDWIDTH = 0.8
"""Of the peak, what memory and bus give."""
NEAR_BYTES_S = 40e9
"""A desktop processor with two memory channels."""
LAYER_S, TOKEN_S = 0.15e-3, 2e-3
CHUNK_LAYER_S, STREAMED_LAYER_S = 1.6e-3, 2.7e-3
"""What a layer of a token and of a prompt's chunk takes beside its arithmetic: as on an H200."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU as its maker describes it.

    Attributes:
        memory_gib: capacity.
        tflops: dense 16-bit tensor arithmetic with 32-bit sums, 10**12 FLOP/s.
        memory_gb_s: memory bandwidth, 10**9 bytes/s.
        bus_gb_s: one direction of its PCIe link, 10**9 bytes/s.
    """

    name: str
    memory_gib: int
    tflops: float
    memory_gb_s: float
    bus_gb_s: float

    @property
    def gpu_bytes(self) -> int:
        """What a run may use of it."""
        return int(self.memory_gib * GIB * USABLE)

    def rates(self) -> Rates:
        """Estimated, not measured."""
        flops = self.tflops * 1e12 * ARITHMETIC
        return Rates(
            machine=f"{self.name} (estimated from public figures)",
            dtype="bfloat16",
            block_flops=flops,
            attention_flops={64: 0.8 * flops, 128: flops},
            weight_bytes_s=self.memory_gb_s * 1e9 * BANDWIDTH,
            resident_bytes_s=self.memory_gb_s * 1e9 * BANDWIDTH,
            layer_s=LAYER_S,
            token_s=TOKEN_S,
            chunk_layer_s=CHUNK_LAYER_S,
            streamed_layer_s=STREAMED_LAYER_S,
            h2d_bytes_s=self.bus_gb_s * 1e9 * BANDWIDTH,
            d2h_bytes_s=self.bus_gb_s * 1e9 * BANDWIDTH,
            near_bytes_s=NEAR_BYTES_S,
        )


_GEN3, _GEN4_X8, _GEN4, _GEN5 = 15.8, 15.8, 31.5, 63.0

MACHINES = {
    machine.name.lower(): machine
    for machine in (
        Machine("T4", 16, 65, 320, _GEN3),
        Machine("RTX 3060", 12, 25.5, 360, _GEN4),
        Machine("RTX 3070", 8, 40.6, 448, _GEN4),
        Machine("RTX 3080", 10, 59.5, 760, _GEN4),
        Machine("RTX 3090", 24, 71, 936, _GEN4),
        Machine("RTX 4060 Ti", 16, 44, 288, _GEN4_X8),
        Machine("RTX 4070 Ti", 12, 80, 504, _GEN4),
        Machine("RTX 4080", 16, 97.5, 717, _GEN4),
        Machine("RTX 4090", 24, 165, 1008, _GEN4),
        Machine("RTX 5090", 32, 209.5, 1792, _GEN5),
        Machine("RTX A6000", 48, 155, 768, _GEN4),
        Machine("RTX 6000 Ada", 48, 364, 960, _GEN4),
        Machine("A10", 24, 125, 600, _GEN4),
        Machine("L4", 24, 121, 300, _GEN4),
        Machine("L40S", 48, 362, 864, _GEN4),
        Machine("A100 40GB", 40, 312, 1555, _GEN4),
        Machine("A100 80GB", 80, 312, 2039, _GEN4),
        Machine("H100 PCIe", 80, 756, 2000, _GEN5),
        Machine("H100 SXM", 80, 989, 3350, _GEN5),
        Machine("H200", 141, 989, 4800, _GEN5),
    )
}


def machine_named(name: str) -> Machine:
    """The GPU of that name, however it is capitalised; a leading maker's name is left out.

    Raises:
        InputError: not in the table; lists what is.
    """
    wanted = " ".join(name.lower().replace("-", " ").split())
    for maker in ("nvidia ", "geforce "):
        wanted = wanted.removeprefix(maker)
    found = MACHINES.get(wanted)
    if found is None:
        known = ", ".join(machine.name for machine in MACHINES.values())
        raise InputError(
            f"no figures of a GPU called {name!r} are at hand; known: {known}. For another one, "
            "leave --gpu out and give its memory with --gpu-memory: that plans memory, without times"
        )
    return found
