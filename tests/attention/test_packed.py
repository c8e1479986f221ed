# SPDX-License-Identifier: Apache-2.0
"""The native library over packed blocks: the bytes of the reference, the bits of plain attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention import native, packed
from headinfer.attention.packed import PackedRun
from headinfer.errors import InputError, LosslessCorrupt
from headinfer.formats import lossless
from headinfer.formats.lossless import BlockLayout
from headinfer.formats.overflow import Overflow
from headinfer.testing.blocks import KINDS, bits_of

ABSENT = native.why_absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
LEVELS = [] if ABSENT else [name for name, runs in native.levels().items() if runs]


def overflow_of(dim, blocks):
    made = Overflow(
        dim,
        lambda nbytes: torch.full((nbytes,), 0xFF, dtype=torch.uint8),
        torch.device("cpu"),
        wait=lambda ticket, block: True,
        chunk_bytes=3 * BlockLayout(dim).entry_bytes,
    )
    if blocks:
        made.reserve(blocks)
    return made


def many(kind, heads, rows, blocks, dim, seed):
    values = bits_of(kind, heads * rows * blocks, dim, seed)
    return values.view(heads, rows, blocks * 128, dim)


def packed_run(values, *, level=None, guard=64):
    """`values` [h, b, t, d] packed by the library, in slots that lie within other bytes."""
    heads, rows, tokens, dim = values.shape
    blocks, size = tokens // 128, BlockLayout(dim).slot_bytes
    memory = torch.full((heads, rows, blocks * size + guard), 0xAB, dtype=torch.uint8)
    slots = memory[..., : blocks * size].unflatten(2, (blocks, size))
    run = PackedRun(slots, overflow_of(dim, heads * rows * blocks))
    packed.encode(values, run, level=level)
    assert bool((memory[..., blocks * size :] == 0xAB).all())
    return run


def reference_slots(values, run):
    """What the reference writes, with the entry numbers that the library chose."""
    made = lossless.encode(values.reshape(-1, 128, values.shape[3]))
    slots = run.slots.reshape(-1, run.slots.shape[3])
    lossless.point_to(made, lossless.raw_indices(slots, run.dim))
    return made.slots.view_as(run.slots)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    heads=st.integers(1, 2),
    rows=st.integers(1, 2),
    blocks=st.integers(0, 3),
    dim=st.sampled_from([16, 32, 48, 64, 80, 96, 128, 192, 256, 272, 512]),
    seed=st.integers(0, 2**31),
)
def test_every_level_writes_and_reads_the_bytes_of_the_reference(
    kind, heads, rows, blocks, dim, seed
):
    values = many(kind, heads, rows, blocks, dim, seed)
    run = packed_run(values)
    assert torch.equal(run.slots, reference_slots(values, run))
    for level in LEVELS:
        out = torch.full_like(values, 7.0)
        packed.decode(run, out, verify=True, level=level)
        assert torch.equal(out.view(torch.int16), values.view(torch.int16))
    if blocks:
        same = lossless.decode(
            run.slots.reshape(-1, run.slots.shape[3]), dim, run.overflow.fetch, verify=True
        )
        assert torch.equal(same.view(torch.int16), values.reshape_as(same).view(torch.int16))


@settings(max_examples=60)
@given(
    kinds=st.tuples(st.sampled_from(("normal", "few far", "edge", "any bits")), st.booleans()),
    g=st.integers(1, 9),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 12),
    left_out=st.integers(0, 127),
    tail=st.integers(0, 127),
    dims=st.sampled_from([(64, 64), (128, 128), (80, 48), (16, 256), (192, 320), (96, 192)]),
    batch=st.integers(1, 2),
    how=st.sampled_from(["plain", "bool", "softcap"]),
    mapped=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_over_packed_keys_has_the_bits_of_plain_attention(
    kinds, g, rows, blocks, left_out, tail, dims, batch, how, mapped, seed
):
    random = torch.Generator().manual_seed(seed)
    heads, (dim, width) = 2, dims
    k = many(kinds[0], heads, batch, blocks, dim, seed)
    v = many("normal" if kinds[1] else kinds[0], heads, batch, blocks, width, seed + 1)
    row_map = tuple(reversed(range(batch))) if mapped else None
    runs = [packed_run(x)._replace(row_map=row_map) for x in (k, v)]
    q = torch.randn((batch, heads * g, rows, dim), generator=random).bfloat16()
    more_k = torch.randn((batch, heads, tail, dim), generator=random).bfloat16()
    more_v = torch.randn((batch, heads, tail, width), generator=random).bfloat16()
    order = list(range(batch)) if row_map is None else list(row_map)
    whole_k = torch.cat([k[:, order].transpose(0, 1), more_k], 2)
    whole_v = torch.cat([v[:, order].transpose(0, 1), more_v], 2)
    keys = whole_k.shape[2] - (0 if tail else left_out)
    options = {"scale": 0.3}
    if how == "bool":
        options["bias"] = torch.rand((batch, 1, rows, keys), generator=random) < 0.8
    if how == "softcap":
        options["softcap"] = 5.0
    tails = (more_k, more_v) if tail else (None, None)
    for level in LEVELS:
        plain = native.attend(q, whole_k[:, :, :keys], whole_v[:, :, :keys], level=level, **options)
        found = packed.attend(q, *runs, *tails, keys=keys, level=level, **options)
        assert torch.equal(found.out.view(torch.int32), plain.out.view(torch.int32))
        assert torch.equal(found.lse.view(torch.int32), plain.lse.view(torch.int32))


@settings(max_examples=40)
@given(
    dim=st.sampled_from([16, 64, 128, 192]),
    g=st.sampled_from([1, 3, 4, 8]),
    escapes=st.integers(0, 13),
    seed=st.integers(0, 2**31),
)
def test_any_bytes_are_attended_as_what_they_decode_to(dim, g, escapes, seed):
    """No encoder wrote them: nibbles above their base, escapes in any order and more than once."""
    random = torch.Generator().manual_seed(seed)
    at = BlockLayout(dim)
    sides = []
    for kind in ("normal", "edge"):
        run = packed_run(many(kind, 1, 1, 2, dim, seed))
        slots = run.slots
        slots[..., : at.bases].random_(generator=random)
        # Exponents that stay below one, or come out modulo 256; infinities and NaN among them.
        bases = torch.randint(*((0, 30) if kind == "edge" else (90, 127)), (dim,), generator=random)
        slots[..., at.bases : at.header] = bases.to(torch.uint8)
        head = slots[..., at.header :]
        head[..., 1] = 0
        head[..., 2], head[..., 3] = min(escapes, at.most_escapes), 0
        listed = slots[..., at.positions : at.exponents]
        listed.random_(generator=random)
        listed[..., 1::2] %= 128 * dim // 256
        slots[..., at.exponents :].random_(100, 127, generator=random)
        sides.append(run._replace(slots=slots))
    q = torch.randn((1, g, 1, dim), generator=random).bfloat16()
    for level in LEVELS:
        whole = torch.empty((2, 1, 1, 256, dim), dtype=torch.bfloat16)
        for run, out in zip(sides, whole, strict=True):
            packed.decode(run, out, level=level)
        for k, v in ((0, 1), (0, 0), (1, 0)):
            found = packed.attend(
                q, sides[k], sides[v], None, None, keys=250, scale=0.3, level=level
            )
            plain = native.attend(
                q, whole[k][:, :, :250], whole[v][:, :, :250], scale=0.3, level=level
            )
            for mine, theirs in zip(found, plain, strict=True):
                assert torch.equal(mine.isnan(), theirs.isnan())
                assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


@settings(max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=40),
    dim=st.sampled_from([16, 64, 128]),
)
def test_damage_is_an_error_or_other_values_but_never_a_crash(kind, flips, dim):
    values = many(kind, 1, 1, 3, dim, 3)
    run, other = packed_run(values), packed_run(many("normal", 1, 1, 3, dim, 4))
    flat = run.slots.reshape(-1)
    for place, bit in flips:  # half of them in the parts that say how to read the others
        here = place % flat.numel()
        if place % 2:
            at = BlockLayout(dim)
            here = place % 3 * at.slot_bytes + at.header + place // 7 % (at.slot_bytes - at.header)
        flat[here] ^= 1 << bit
    run = run._replace(slots=flat.view(run.slots.shape))
    q = torch.ones((1, 2, 1, dim), dtype=torch.bfloat16)
    for level in LEVELS:
        for k, v in ((run, other), (other, run)):
            try:
                found = packed.attend(q, k, v, None, None, keys=384, scale=0.1, level=level)
            except LosslessCorrupt as error:
                assert error.block in (0, 1, 2)  # noqa: PT017
            else:
                assert found.out.shape == (1, 2, 1, dim)
        out = torch.empty_like(values)
        changed = not torch.equal(
            flat.view_as(run.slots), reference_slots(values, packed_run(values))
        )
        try:
            packed.decode(run, out, verify=True, level=level)
        except LosslessCorrupt:
            assert changed
        else:
            assert torch.equal(out.view(torch.int16), values.view(torch.int16))


def test_a_damaged_block_is_named():
    k, v = (packed_run(many("normal", 3, 2, 4, 64, seed)) for seed in (1, 2))
    v.slots[2, 1, 3, BlockLayout(64).header] = 9
    q = torch.ones((2, 3, 1, 64), dtype=torch.bfloat16)
    with pytest.raises(
        LosslessCorrupt, match=r"packed values are damaged: row 1, head 2, block 3 .*384 to 511"
    ):
        packed.attend(q, k, v, None, None, keys=512, scale=0.1)
    assert packed.attend(q, k, v, None, None, keys=384, scale=0.1).out.isfinite().all()
    with pytest.raises(LosslessCorrupt, match="row 1, head 2, block 3"):
        packed.decode(v, torch.empty((3, 2, 512, 64), dtype=torch.bfloat16))


def test_wrong_use_is_refused():
    run = packed_run(many("normal", 1, 1, 2, 64, 0))
    q = torch.ones((1, 1, 1, 64), dtype=torch.bfloat16)
    for wrong in (q.float(), q[..., :32], q.expand(2, -1, -1, -1)):
        with pytest.raises(InputError, match="packed attention cannot take"):
            packed.attend(wrong, run, run, None, None, keys=256, scale=1.0)
    with pytest.raises(InputError, match="257 keys"):
        packed.attend(q, run, run, None, None, keys=257, scale=1.0)
    with pytest.raises(InputError, match="packed blocks"):
        packed.decode(run, torch.empty((1, 1, 128, 64), dtype=torch.bfloat16))
    bare = run._replace(overflow=overflow_of(64, 0))
    with pytest.raises(InputError, match="no overflow entries were reserved for 2"):
        packed.encode(many("any bits", 1, 1, 2, 64, 0), bare)
