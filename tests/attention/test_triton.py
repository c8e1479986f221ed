# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: for real on a GPU, elsewhere through Triton's interpreter in a process of its
own, because the interpreter has to be asked for before triton is imported.

The rule is asked of every call by itself; only `test_any_shape` pools draws, of calls with fewer than
64 rows. bfloat16 is left to the GPU: the
interpreter multiplies its bit patterns as whole numbers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention import api
from headinfer.attention.reference import ReferenceAttention
from headinfer.attention.triton import TritonAttention, tiles_for
from headinfer.attention.types import AttentionSpec, Window
from headinfer.testing.interpreter import INTERPRETED, interpreter, run_interpreted
from headinfer.testing.numerics import check, eager, oracle

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
EXAMPLES = 15 if INTERPRETED else 150
HOPPER_SHARED_BYTES = 227 * 2**10
SPILLED = 0.01
"""Most instructions of a loop over keys, as a share, that may move registers to memory and back."""

triton_attention = TritonAttention()
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter's process compiles nothing")
gpu_only = pytest.mark.gpu if not INTERPRETED else pytest.mark.skip(reason="too large here")
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def runs(test):
    """On a GPU, or in the interpreter's process."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter():
    with interpreter() if INTERPRETED else nullcontext():
        yield


@needs_triton
@compiles
def test_the_kernels_obey_the_rule_in_the_interpreter():
    run_interpreted(__file__)


# Attention


def make(dtype, *, b=1, h=2, g=2, t=5, s=37, d=64, e=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2)

    return normal(b, t, h * g, d), normal(b, s, h, d), normal(b, s, h, e or d)


def compare(q, k, v, **how):
    """One call by the rule, out and log-sum-exp."""
    found, same, exact = three_ways(q, k, v, **how)
    check(found.out, same.out, exact.out)
    check(found.lse, same.lse, exact.lse)
    return found


def three_ways(q, k, v, *, window=None, **how):
    how.setdefault("scale", q.shape[-1] ** -0.5)
    found = triton_attention(q, k, v, window=window, **how)
    assert found.lse.dtype == torch.float32
    assert found.out.dtype == q.dtype
    if window is not None:
        how["bias"] = with_window(how.get("bias"), window, q.shape[2], k.shape[2])
    return found, eager(q, k, v, **how), oracle(q, k, v, **dict(how))


def with_window(bias, window, rows, keys):
    index = torch.arange(rows, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)
    seen = window.visible(*index)[None, None]
    if bias is None:
        return seen
    return bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)


@runs
@every_type
@pytest.mark.parametrize("dim", [8, 80, 96, 128, 192, 256])
def test_every_head_dim(dtype, dim):
    compare(*make(dtype, d=dim))
    compare(*make(dtype, d=dim, h=1, g=1, t=67, s=67), causal=True)


@runs
@every_type
def test_key_and_value_dims_may_differ(dtype):
    compare(*make(dtype, d=96, e=64))
    compare(*make(dtype, d=24, e=128, t=70, s=70), causal=True)
    compare(*make(dtype, d=192, e=128))


@runs
@every_type
@pytest.mark.parametrize("per_kv", [1, 3, 7, 8])
def test_every_number_of_queries_per_kv_head(dtype, per_kv):
    compare(*make(dtype, g=per_kv, t=1))
    compare(*make(dtype, g=per_kv, t=33, s=33, d=16), causal=True)


@runs
@every_type
def test_softcap_is_neither_dropped_nor_blunt(dtype):
    q, k, v = make(dtype, t=70, s=70)
    compare(q * 8, k, v, softcap=5.0, causal=True)
    compare(q, k, v, softcap=50.0)
    capped = triton_attention(q * 8, k, v, scale=0.125, softcap=5.0)
    plain = triton_attention(q * 8, k, v, scale=0.125)
    assert (capped.out - plain.out).abs().max() > 1e-2


@runs
@every_type
def test_masks_hide_keys_and_rows_that_see_none_are_zero(dtype):
    q, k, v = make(dtype, b=2, t=6, s=141)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand((2, 1, 6, 141), generator=generator) < 0.5
    mask[1, :, 3] = False
    mask[0, :, 2, :128] = False  # whole tiles hidden, then keys that are seen
    mask = mask.to(DEVICE)
    found = compare(q, k, v, bias=mask)
    assert not found.out[1, :, 3].any()
    assert bool((found.lse[1, :, 3] == -torch.inf).all())
    compare(q, k, v, bias=mask[:, :, :1])
    compare(q, k, v, bias=mask[:1, :, :1], softcap=9.0)
    compare(q, k, v, bias=mask.expand(2, 4, 6, 141))
    added = torch.randn((1, 4, 6, 141), generator=generator)
    added[:, :, 2] = -torch.inf
    compare(q, k, v, bias=added.to(DEVICE, dtype))
    compare(q, k, v, bias=added.to(DEVICE).transpose(2, 3).contiguous().transpose(2, 3))


@runs
@every_type
def test_the_lowest_number_hides_as_in_eager_attention(dtype):
    """transformers' additive masks: a row that sees nothing is the mean of all values."""
    q, k, v = make(dtype, t=6, s=41)
    lowest = torch.zeros(1, 1, 6, 41, device=DEVICE)
    lowest[..., 30:] = lowest[:, :, 2] = torch.finfo(torch.float32).min
    found = triton_attention(q, k, v, scale=0.125, bias=lowest)
    reference = ReferenceAttention()(q, k, v, scale=0.125, bias=lowest)
    torch.testing.assert_close(found.out.float(), reference.out, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.lse, reference.lse, rtol=2e-3, atol=2e-3)


@runs
@every_type
@pytest.mark.parametrize("offset", [-40, -3, 5, 250, 330, 900])
def test_windows_at_every_place(dtype, offset):
    q, k, v = make(dtype, t=46, s=300, d=16, g=3, h=1)
    for size in (1, 31, 128, 2**31):
        compare(q, k, v, window=Window(offset, size))
    padding = torch.arange(300, device=DEVICE) > 70
    compare(q, k, v, window=Window(offset, 90), bias=padding[None, None, None])


@runs
@every_type
def test_few_rows_split_the_keys(dtype):
    compare(*make(dtype, t=1, s=1100, g=4, d=16))
    compare(*make(dtype, t=1, s=1047, h=1, g=7, d=80), softcap=20.0)
    compare(*make(dtype, t=2, s=900, h=1, g=1, d=32), window=Window(700, 600))
    q, k, v = make(dtype, t=1, s=800, h=1, d=16)
    bias = torch.arange(800, device=DEVICE)[None, None, None] >= 790  # most splits see nothing
    compare(q, k, v, bias=bias)
    hidden = triton_attention(q, k, v, scale=1.0, bias=torch.zeros_like(bias))
    assert not hidden.out.any()
    assert bool((hidden.lse == -torch.inf).all())


@runs
def test_large_scores_do_not_blur_the_merge_of_splits():
    """Scores that are exact and large: a rounded log-sum-exp of 135 is off by 4e-6 of a weight."""
    for seed in range(4):
        q, k, v = (x.round() for x in make(torch.float32, t=1, s=1100, g=4, d=16, seed=seed))
        q[..., 0], k[..., 0] = 8.0, 64.0
        compare(q, k, v, scale=0.25)


@runs
def test_any_strides():
    q, k, v = make(torch.float32, b=2, t=9, s=50, d=40)
    plain = triton_attention(q, k, v, scale=0.2)
    wide = torch.full((2, 2, 50, 83), torch.nan, device=DEVICE)
    wide[..., 3:43], turned = k, v.transpose(2, 3).contiguous().transpose(2, 3)
    for key, value in ((wide[..., 3:43], v), (k, turned), (k.contiguous(), v.flip(0).flip(0))):
        found = triton_attention(q.contiguous(), key, value, scale=0.2)
        torch.testing.assert_close(found.out, plain.out, rtol=1e-6, atol=1e-6)
    one = torch.full((1,), 2.0, device=DEVICE).expand(2, 2, 50, 40)
    torch.testing.assert_close(triton_attention(q, k, one, scale=0.2).out, one[..., :1, :].expand(2, 2, 9, 40).repeat(1, 2, 1, 1))  # fmt: skip


@runs
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    g=st.integers(1, 5),
    t=st.sampled_from([1, 2, 17, 33, 65]),
    s=st.sampled_from([1, 2, 31, 65, 128, 300]),
    d=st.sampled_from([8, 16, 40, 64]),
    e=st.sampled_from([8, 24, 64]),
    softcap=st.sampled_from([None, 3.0]),
    feature=st.sampled_from(["plain", "causal", "window", "bool", "added"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(b, h, g, t, s, d, e, softcap, feature, dtype, seed):
    how = {"softcap": softcap}
    if feature == "causal":
        how["causal"], s = True, t
    if feature == "window":
        how["window"] = Window(s - t, 1 + seed)
    generator = torch.Generator().manual_seed(seed)
    if feature == "bool":
        how["bias"] = (torch.rand((b, 1, t, s), generator=generator) < 0.5).to(DEVICE)
    if feature == "added":
        how["bias"] = torch.randn((1, h * g, 1, s), generator=generator).to(DEVICE)
    # A single row may meet an eager result that is right by luck: few rows are drawn more often.
    draws = [
        three_ways(*make(dtype, b=b, h=h, g=g, t=t, s=s, d=d, e=e, seed=seed + 100 * more), **how)
        for more in range(max(1, min(8, 64 // (b * h * g * t))))
    ]
    for what in ("out", "lse"):
        columns = zip(*draws, strict=True)
        check(*(torch.cat([getattr(x, what).flatten() for x in column]) for column in columns))


@runs
def test_the_comparison_notices_one_percent_in_one_tile():
    q, k, v = make(torch.float32, s=300)
    wrong = v.clone()
    wrong[:, :, 128:192] *= 1.01
    how = {"scale": 0.125}
    found = triton_attention(q, k, wrong, **how)
    with pytest.raises(AssertionError):
        check(found.out, eager(q, k, v, **how).out, oracle(q, k, v, **how).out)


# Choice


def cuda_spec(dtype=torch.bfloat16, d=128, e=128, tokens=64, **features):
    features = {"causal": False, "biased": False, "softcap": False, **features}
    return AttentionSpec("cuda", dtype, d, e, 4, tokens, **features)


@needs_triton
def test_what_torch_does_not_take_goes_to_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    choose = api.choose.__wrapped__  # what was monkeypatched must not be remembered
    assert choose(cuda_spec(causal=True)).name == "cudnn"
    assert choose(cuda_spec(tokens=1)).name == "flash"
    assert choose(cuda_spec(biased=True)).name == "mem-efficient"
    for spec in (
        cuda_spec(softcap=True, causal=True),
        cuda_spec(softcap=True, biased=True),
        cuda_spec(torch.float32),
        cuda_spec(torch.float32, biased=True),
        cuda_spec(d=192),
        cuda_spec(windowed=True),
        cuda_spec(windowed=True, biased=True),
    ):
        assert choose(spec).name == "triton", spec
    assert choose(cuda_spec(d=512, e=512)).name == "mem-efficient"
    assert choose(cuda_spec(d=512, e=512, softcap=True)).name == "reference"
    assert choose(cuda_spec(torch.float64)).name == "reference"
    assert choose(cuda_spec(softcap=True, gradient=True)).name == "reference"
    assert api.grows_with_keys(
        AttentionSpec("cpu", torch.float64, 64, 64, 1, 1, False, False, True)
    )


def test_it_says_why_it_cannot(monkeypatch):
    reasons = triton_attention.unsupported(
        AttentionSpec("cpu", torch.float64, 300, 64, 1, 1, False, False, False, gradient=True)
    )
    assert reasons == [
        "tensors are on cpu; runs on cuda",
        "type torch.float64; runs float32, float16, bfloat16",
        "head dim 300; runs up to 256",
        "a gradient is asked for",
    ]
    monkeypatch.setattr("headinfer.attention.triton.available", lambda: False)
    assert triton_attention.unsupported(cuda_spec()) == ["triton is not installed"]


@compiles
def test_attention_on_a_cpu_neither_imports_nor_needs_triton():
    code = (
        "import sys{block}; import torch; from headinfer.attention.api import attend\n"
        "x = torch.randn(1, 2, 3, 8)\n"
        "attend(x, x, x, scale=1.0, softcap=2.0); attend(x, x, x, scale=1.0)\n"
        "print(sys.modules.get('triton'), 'headinfer.attention.triton_kernels' in sys.modules)"
    )
    for block in ("", "; sys.modules['triton'] = None"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(block=block)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["None", "False"]


# Compilation for a GPU that need not be there


POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compiled(kernel, pointers, constants, tiles, tmp_path, arch=90):
    """Bytes of shared memory of a kernel, and what share of a loop's instructions moves spilled
    registers: of the worst loop, or of the whole if there is none."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = parameter.annotation_type or "i32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        found = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        )
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = shipped if shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump to read the machine code with")
    done = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, timeout=60)
    (tmp_path / "kernel.sass").write_text(done.stdout)
    return found.metadata.shared, spilled(done.stdout)


def spilled(listing):
    code = [
        (int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    ]
    jumps = [(at, re.search(r"\bBRA .*?0x([0-9a-f]+)", what)) for at, what in code]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    shares = []
    for first, last in loops or [(0, code[-1][0])]:
        body = [what for at, what in code if first <= at <= last]
        shares.append(sum(bool(re.search(r"\b(LDL|STL)\b", what)) for what in body) / len(body))
    return max(shares)


def attend_compiled(
    tmp_path, dtype, dims, packed, *, windowed=False, softcap=False, bias=0, arch=90,
    shared_bytes=HOPPER_SHARED_BYTES,
):  # fmt: skip
    from headinfer.attention.triton_kernels import attend_kernel

    (d, e), size = dims, 4 if dtype == torch.float32 else 2
    bias_bytes = (0, 1, 4)[bias]
    tiles = tiles_for(dtype, max(dims), packed, shared_bytes, bias_bytes=bias_bytes)
    pointers = dict.fromkeys(("q", "k", "v", "out"), POINTERS[dtype])
    pointers |= {"lse": "*fp32", "bias": "*u8" if bias == 1 else "*fp32"}
    constants = {
        "D": d, "E": e, "BLOCK_D": max(16, 1 << (d - 1).bit_length()),
        "BLOCK_E": max(16, 1 << (e - 1).bit_length()), "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys, "WINDOWED": windowed, "SOFTCAP": softcap, "BIAS": bias,
        "PRECISE": size == 4, "SPLIT": packed <= 32, "ALIGN": 16 // size, "q_d": 1, "k_d": 1, "v_d": 1, "bias_s": 1,
    }  # fmt: skip
    if not bias:
        constants["bias"] = None
    shared, moved = compiled(attend_kernel, pointers, constants, tiles, tmp_path, arch)
    assert shared <= shared_bytes
    return moved


@needs_triton
@compiles
@pytest.mark.parametrize(
    ("dtype", "dims", "packed", "features"),
    [
        (torch.bfloat16, (64, 64), 8192, {"windowed": True}),
        (torch.bfloat16, (128, 128), 8192, {"windowed": True, "softcap": True}),
        (torch.bfloat16, (128, 128), 8192, {"bias": 1, "windowed": True}),
        (torch.bfloat16, (192, 128), 8192, {"windowed": True}),
        (torch.bfloat16, (256, 256), 8192, {"windowed": True, "softcap": True}),
        (torch.bfloat16, (128, 128), 4, {"softcap": True}),
        (torch.bfloat16, (256, 256), 4, {"softcap": True}),
        (torch.float32, (128, 128), 8192, {"windowed": True}),
        (torch.float32, (64, 64), 4, {"bias": 2}),
    ],
    ids=str,
)
def test_tiles_fit_the_registers_and_shared_memory_of_hopper(
    tmp_path, dtype, dims, packed, features
):
    assert attend_compiled(tmp_path, dtype, dims, packed, **features) <= SPILLED


@pytest.mark.slow
@needs_triton
@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_tile_of_the_table_fits_hopper(tmp_path, dtype, dim):
    for packed in (32, 64, 8192) if dtype == torch.bfloat16 else (32, 64):
        for features in ({"windowed": True, "softcap": True}, {"bias": 2, "windowed": True}):
            assert attend_compiled(tmp_path, dtype, (dim, dim), packed, **features) <= SPILLED


@pytest.mark.slow
@needs_triton
@compiles
@pytest.mark.parametrize(("arch", "shared_kib"), [(80, 163), (86, 99), (89, 99)])
def test_tiles_fit_the_shared_memory_of_older_gpus(tmp_path, arch, shared_kib):
    for dim in (128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            attend_compiled(
                tmp_path, dtype, (dim, dim), 8192, windowed=True, softcap=True,
                arch=arch, shared_bytes=shared_kib * 2**10,
            )  # fmt: skip


@needs_triton
@compiles
def test_merge_kernels_compile_for_hopper(tmp_path):
    from headinfer.attention import merge_kernels
    from headinfer.attention.triton import Tiles

    four = Tiles(0, 0, 4, 1)
    pointers = {"a": "*fp32", "c": "*bf16", "out": "*bf16", "x": "*fp32", "sink": "*bf16"}
    pointers |= dict.fromkeys(("a_lse", "c_lse", "lse", "x_lse", "x_total"), "*fp32")
    constants = {"WIDTH": 128, "BLOCK": 128, "WRITE_LSE": True, "SINK": True, "ALIGN": 8}
    two = constants | {"STEP": 32, "TWO": True}
    assert compiled(merge_kernels._merge_two, pointers, two, four, tmp_path)[1] == 0
    few = constants | {"STEP": 16, "FOUR": True}
    pointers |= {"e": "*bf16", "f": "*bf16", "e_lse": "*fp32", "f_lse": "*fp32"}
    assert compiled(merge_kernels._merge_few, pointers, few, four, tmp_path)[1] == 0
    stacked = constants | {"PARTS": merge_kernels.STACKED, "DIVIDED": False}
    assert compiled(merge_kernels._merge_stacked, pointers, stacked, four, tmp_path)[1] == 0


@needs_triton
@compiles
def test_lengths_are_no_part_of_what_is_compiled_for():
    """What triton keys its compiled kernels by, asked without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    from headinfer.attention.triton_kernels import attend_kernel

    bind = create_function_from_signature(
        attend_kernel.signature, attend_kernel.params, CUDABackend(GPUTarget("cuda", 90, 32))
    )
    pointer = torch.zeros(64, dtype=torch.bfloat16)
    fixed = {"q": pointer, "k": pointer, "v": pointer, "out": pointer, "lse": pointer}
    fixed |= {"bias": None, "scale": 0.1, "softcap": 0.0, "q_d": 1, "k_d": 1, "v_d": 1, "bias_s": 0}
    keys = set()
    for value in (0, 1, 7, 16, 4096, 2**31 - 1):
        arguments = {
            parameter.name: fixed.get(parameter.name, 64 if parameter.is_constexpr else value)
            for parameter in attend_kernel.params
        }
        keys.add(str(bind(**arguments)[1]))
    assert len(keys) == 1
    for name in ("q_b", "k_h", "k_s", "v_s", "bias_t"):
        keys.add(str(bind(**(arguments | {name: 2**40}))[1]))
    assert len(keys) == 1
    keys.add(str(bind(**(arguments | {"k_d": 2}))[1]))
    assert len(keys) == 2  # the last axis is part of it: dense or not


# What only a GPU can show


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_prefill_with_softcap(dtype):
    compare(*make(dtype, h=1, g=4, t=4096, s=4096, d=128), causal=True, softcap=30.0)
    compare(*make(dtype, h=1, g=2, t=1000, s=5000, d=256), softcap=50.0)


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_windows_equal_the_reference(dtype):
    q, k, v = make(dtype, h=2, g=2, t=4096, s=6000, d=128)
    window = Window(6000 - 4096, 1024)
    found = compare(q, k, v, window=window)
    sliced = ReferenceAttention()(
        q.double(), k.double(), v.double(), scale=128**-0.5, window=window
    )
    bias = with_window(None, window, 4096, 6000)
    check(found.out, eager(q, k, v, scale=128**-0.5, bias=bias).out, sliced.out)


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decode_over_many_splits(dtype):
    compare(*make(dtype, h=2, g=4, t=1, s=131_073, d=128), softcap=30.0)
    compare(*make(dtype, b=3, h=2, g=4, t=3, s=20_000, d=80))


@gpu_only
def test_a_repeated_call_gives_equal_bits():
    draw = make(torch.bfloat16, h=2, g=4, t=1, s=50_000, d=128)
    first, second = (triton_attention(*draw, scale=0.1) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)


@gpu_only
def test_offsets_beyond_32_bits():
    dim, keys = 128, 2**24 + 5
    size = 2 * keys * dim * 2
    if torch.cuda.mem_get_info()[0] < size + 2**31:
        pytest.skip(f"needs {size + 2**31:,} bytes of GPU memory")
    k = torch.zeros(1, 1, keys, dim, dtype=torch.bfloat16, device=DEVICE)
    v = torch.zeros(1, 1, keys, dim, dtype=torch.bfloat16, device=DEVICE)
    k[:, :, -3:], v[:, :, -3:] = 4.0, 1.0
    q = torch.ones(1, 2, 1, dim, dtype=torch.bfloat16, device=DEVICE)
    found = triton_attention(q, k, v, scale=0.25)  # 128: nothing but the last three counts
    assert bool((found.out == 1).all())
    rows = q.expand(1, 2, 130, dim)
    windowed = triton_attention(rows, k, v, scale=0.25, window=Window(keys - 130, 64))
    assert bool((windowed.out[:, :, -1] == 1).all())
    assert not windowed.out[:, :, 0].any()


@gpu_only
def test_lengths_do_not_compile_anew():
    from headinfer.attention.triton_kernels import attend_kernel

    def count():
        return sum(len(caches[0]) for caches in attend_kernel.device_caches.values())

    for lengths in ([1] * 5, [300] * 5):
        q, k, v = make(torch.bfloat16, t=lengths[0], s=70_000, d=64)
        for warm in (100, 999, 70_000):  # whole, and split into float32 partials
            triton_attention(q, k[:, :, :warm], v[:, :, :warm], scale=0.1, softcap=7.0)
        before = count()
        for keys in (1, 2, 16, 17, 512, 1000, 4096, 65_536, 69_999):
            part = k[:, :, keys // 2 : keys], v[:, :, keys // 2 : keys]
            triton_attention(q, *part, scale=0.1 / keys, softcap=1.0 + keys)
        if lengths[0] > 1:
            for rows in (129, 200, 257):
                triton_attention(q[:, :, :rows], k, v, scale=0.1, softcap=7.0)
        assert count() == before


@needs_triton
@compiles
@pytest.mark.parametrize("rows", [1, 5])
def test_keys_found_by_a_table_are_read_as_widely_and_without_spilling(tmp_path, rows):
    """The compiler knows an argument to be aligned, and has to be told of a number from memory."""
    from headinfer.attention.triton_kernels import attend_placed_kernel

    tiles = tiles_for(torch.bfloat16, 128, 4 * rows, HOPPER_SHARED_BYTES)
    pointers = {"q": "*bf16", "place": "*i64", "length": "*i64"}
    pointers |= dict.fromkeys(("out", "lse"), "*fp32")
    constants = {
        "D": 128, "E": 128, "BLOCK_D": 128, "BLOCK_E": 128, "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys, "SEVERAL": rows > 1, "SOFTCAP": False, "ALIGN": 8, "LEAST": 256,
        "q_d": 1,
    }  # fmt: skip
    shared, moved = compiled(attend_placed_kernel, pointers, constants, tiles, tmp_path)
    assert shared <= HOPPER_SHARED_BYTES
    assert moved <= SPILLED
    loads = re.findall(r"(LDGSTS|LDG)\.E\S*", (tmp_path / "kernel.sass").read_text())
    wide = re.findall(r"LDGSTS\.E\S*\.128", (tmp_path / "kernel.sass").read_text())
    assert len(wide) >= len([one for one in loads if one == "LDGSTS"]) > 0
