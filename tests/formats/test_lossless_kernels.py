# SPDX-License-Identifier: Apache-2.0
"""The Triton encoder and decoder: for real on a GPU, elsewhere through Triton's interpreter in a
process of its own, because the interpreter has to be asked for before triton is imported."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.formats import lossless
from headinfer.formats.lossless import BlockLayout
from headinfer.formats.overflow import Overflow
from headinfer.testing.blocks import KINDS, bits_of
from headinfer.testing.interpreter import INTERPRETED, interpreter, run_interpreted

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
EXAMPLES = 25 if INTERPRETED else 200
DIMS = (16, 48, 64) if INTERPRETED else (16, 48, 64, 80, 128, 256, 512)


def runs(test):
    """On a GPU, or in the interpreter's process."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter():
    with interpreter() if INTERPRETED else nullcontext():
        yield


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_through_the_interpreter():
    """Everything below, on the CPU."""
    run_interpreted(__file__)


def overflow_of(dim, blocks):
    pin = DEVICE.type == "cuda"
    made = Overflow(
        dim,
        lambda nbytes: torch.full((nbytes,), 0xFF, dtype=torch.uint8, pin_memory=pin),
        DEVICE,
        wait=lambda ticket, block: True,
        chunk_bytes=2 * BlockLayout(dim).entry_bytes,
    )
    made.reserve(blocks)
    return made


def encoded(values, overflow):
    from headinfer.formats.lossless_kernels import encode_blocks

    layout = overflow.layout
    memory = torch.full(
        (values.shape[0] * layout.slot_bytes + 64,), 0xAB, dtype=torch.uint8, device=DEVICE
    )
    slots = memory[: -64 or None].view(-1, layout.slot_bytes)
    encode_blocks(values.view(1, 1, -1, layout.dim), slots, overflow)
    finish()
    assert bool((memory[-64:] == 0xAB).all())
    return slots


def decoded(slots, overflow):
    from headinfer.formats.lossless_kernels import decode_blocks

    dim, damaged = overflow.layout.dim, cell()
    out = torch.full((1, slots.shape[0], 128, dim), 7.0, dtype=torch.bfloat16, device=DEVICE)
    decode_blocks(slots, out, overflow, damaged, 5)
    finish()
    return out[0], damaged.tolist()


def cell():
    return torch.zeros(3, dtype=torch.int64, pin_memory=DEVICE.type == "cuda")


def finish():
    if DEVICE.type == "cuda":
        torch.cuda.current_stream().synchronize()


@needs_triton
@runs
@pytest.mark.parametrize(("runs_", "blocks", "room"), [(3, 2, 3), (2, 1, 4), (4, 1, 1)])
def test_runs_of_blocks_are_decoded_where_they_belong(runs_, blocks, room):
    """Heads of a tile lie as far apart as the buffer allows; between them nothing is written."""
    from headinfer.formats.lossless_kernels import decode_blocks

    dim, count = 48, runs_ * blocks
    values = torch.cat([bits_of(KINDS[i % len(KINDS)], 1, dim, i) for i in range(count)])
    overflow = overflow_of(dim, count)
    slots = encoded(values.to(DEVICE), overflow)
    memory = torch.full((runs_, room, 128, dim), 7.0, dtype=torch.bfloat16, device=DEVICE)
    decode_blocks(slots, memory[:, :blocks], overflow, cell(), 5)
    finish()
    found = memory[:, :blocks].reshape(count, 128, dim).view(torch.int16)
    assert torch.equal(found.cpu(), values.view(torch.int16))
    assert bool((memory[:, blocks:] == 7.0).all())


@needs_triton
@runs
@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 3, 1), (4, 1, 3)], ids=str)
def test_keys_are_encoded_where_they_lie(shape):
    """As a model has them: [b, t, h, d] seen as [h, b, t, d], a part of longer ones, other heads between."""
    from headinfer.formats.lossless_kernels import encode_blocks

    dim, (heads, rows, blocks) = 48, shape
    count = heads * rows * blocks
    values = torch.cat([bits_of(KINDS[i % len(KINDS)], 1, dim, i) for i in range(count)])
    overflow, of_one_piece = overflow_of(dim, count), overflow_of(dim, count)
    expected = encoded(values.to(DEVICE), of_one_piece)
    dense = values.view(heads, rows, blocks * 128, dim).permute(1, 2, 0, 3)
    model = torch.full((rows, blocks * 128 + 256, heads + 1, dim), 7.0, dtype=torch.bfloat16)
    model[:, 128:-128, 1:] = dense
    seen = model.to(DEVICE)[:, 128:-128, 1:].permute(2, 0, 1, 3)
    slots = torch.empty((count, overflow.layout.slot_bytes), dtype=torch.uint8, device=DEVICE)
    encode_blocks(seen, slots, overflow)
    finish()
    found, damaged = decoded(slots, overflow)
    assert torch.equal(found.cpu().view(torch.int16), values.view(torch.int16))
    assert damaged[0] == 0
    raw = lossless.raw_indices(slots.cpu(), dim)
    assert sorted(raw.tolist()) == list(range(int(of_one_piece.counter)))
    if DEVICE.type == "cpu":  # one block after the other, so entries come in the same order
        assert torch.equal(slots, expected)


@needs_triton
@runs
@settings(max_examples=EXAMPLES)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 3),
    dim=st.sampled_from(DIMS),
    seed=st.integers(0, 2**31),
)
def test_the_kernels_write_and_read_the_bytes_of_the_reference(kind, count, dim, seed):
    values = bits_of(kind, count, dim, seed)
    overflow = overflow_of(dim, count)
    slots = encoded(values.to(DEVICE), overflow)
    made = lossless.encode(values)
    assert int(overflow.counter) == int(made.raw.sum())
    indices = lossless.raw_indices(slots.cpu(), dim)
    assert sorted(indices.tolist()) == list(range(len(indices)))
    lossless.point_to(made, indices)
    assert torch.equal(slots.cpu(), made.slots)
    assert torch.equal(overflow.fetch(indices), made.entries)
    found, damaged = decoded(slots, overflow)
    assert torch.equal(found.cpu().view(torch.int16), values.view(torch.int16))
    assert damaged[0] == 0


@needs_triton
@runs
@settings(max_examples=EXAMPLES)
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=20),
)
def test_damage_is_reported_or_gives_other_values(kind, flips):
    dim = 16
    at, overflow = BlockLayout(dim), overflow_of(dim, 2)
    slots = encoded(bits_of(kind, 2, dim, 1).to(DEVICE), overflow).cpu()
    for place, bit in flips:
        here = at.header + place % (at.slot_bytes - at.header)
        slots[place % 2, here] ^= 1 << bit
    try:
        expected = lossless.decode(slots, dim, overflow.fetch)
    except lossless.LosslessCorrupt:
        expected = None
    found, damaged = decoded(slots.to(DEVICE), overflow)
    if expected is None:
        assert damaged[:2] == [1, 5]
    else:
        assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16))
        assert damaged == [0, 0, 0]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's process compiles nothing")
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_the_kernels_compile(arch, dim, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headinfer.formats import lossless_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layout = BlockLayout(dim)
    half, step = kernels._tile(dim)
    common = {"DIM": dim, "HALF": half, "STEP": step, "MOST": layout.most_escapes}
    common |= {"SLOT": layout.slot_bytes}
    pointers = {"slots": "*u8", "out": "*i16", "values": "*i16", "table": "*i64", "ring": "*i32"}
    pointers |= {"counter": "*i64", "damaged": "*i64"}
    for kernel, more in (
        (kernels._decode, {"MOST_BLOCK": triton.next_power_of_2(layout.most_escapes)}),
        (kernels._encode, {"TRAILER": layout.slot_bytes - layout.header}),
    ):
        constants = {**common, **more}
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "i32")
            for name in kernel.arg_names
        }
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name in pointers
        }
        found = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": 4},
        )
        made = SimpleNamespace(**found.metadata._asdict())
        assert made.shared <= 48 * 2**10
