# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernel on every instruction level of this machine: right, and right about limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention import native
from headinfer.attention.api import attend, choose, why_not
from headinfer.attention.reference import ReferenceAttention
from headinfer.attention.types import AttentionSpec, Partial
from headinfer.errors import InputError, UnsupportedAttention
from headinfer.testing.numerics import check, eager, oracle, within_rule

ABSENT = native.why_absent()
needs_library = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
LEVELS = [] if ABSENT else [name for name, runs in native.levels().items() if runs]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DECODE = AttentionSpec("cpu", torch.bfloat16, 128, 128, 4, 1, False, False, False)


def make(dtype, *, b=1, h=2, g=2, t=3, s=131, d=64, e=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return normal(b, t, h * g, d).transpose(1, 2), normal(b, h, s, d), normal(b, h, s, e or d)


def follows_rule(q, k, v, **how):
    """The 2x rule for every level, each call by itself."""
    how.setdefault("scale", q.shape[-1] ** -0.5)
    exact, same = oracle(q, k, v, **how), eager(q, k, v, **how)
    for level in LEVELS:
        found = native.attend(q, k, v, level=level, **how)
        assert found.out.dtype == found.lse.dtype == torch.float32
        # In the type of the inputs, one rounding: where eager attention happened to hit the exact
        # value, a sum in another order may still be one float32 rounding of the scores away.
        check(found.out, same.out, exact.out)
        slack = torch.finfo(torch.float32).eps * score_size(q, k, how["scale"])
        error = (found.lse.double() - exact.lse).nan_to_num().abs().max()
        holds, _, bound = within_rule(found.lse, same.lse, exact.lse)
        assert holds or error <= bound + slack, (level, error, bound, slack)


def score_size(q, k, scale):
    """The largest sum of absolute products: what one rounding of a score is relative to."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return float((q.double().abs() @ k.double().abs().transpose(-1, -2)).max() * abs(scale))


def same_bits(a: Partial, b: Partial) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@needs_library
@settings(max_examples=120)
@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    g=st.integers(1, 16),
    t=st.integers(1, 9),
    s=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1000, 1999]),
    d=st.integers(1, 272),
    e=st.sampled_from([1, 8, 33, 64, 80, 96, 128, 192, 256]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["plain", "bool", "float", "softcap", "everything"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_follows_the_rule_on_every_level(b, h, g, t, s, d, e, dtype, kind, seed):
    q, k, v = make(dtype, b=b, h=h, g=g, t=t, s=s, d=d, e=e, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    how = {}
    if kind in ("bool", "everything"):
        how["bias"] = torch.rand((b, 1, t, s), generator=generator) < 0.7
    if kind == "float":
        how["bias"] = torch.randn((1, h * g, 1, s), generator=generator)
    if kind in ("softcap", "everything"):
        how["softcap"] = 2.5
    follows_rule(q, k, v, **how)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 65, 200])
def test_causal_rows_see_no_later_key(dtype, tokens):
    follows_rule(*make(dtype, t=tokens, s=tokens, g=3), causal=True)
    follows_rule(*make(dtype, t=tokens, s=tokens, g=1, h=1, d=40, e=24), causal=True, softcap=3.0)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_rows_are_zero_and_hidden_keys_do_not_count(dtype):
    q, k, v = make(dtype, b=2, g=4, s=700)
    mask = torch.ones((2, 1, 3, 700), dtype=torch.bool)
    mask[1, :, 1] = False
    mask[0, :, :, :600] = False
    follows_rule(q, k, v, bias=mask)
    follows_rule(q, k, v, bias=torch.where(mask, 0.25, -torch.inf))
    for level in LEVELS:
        found = native.attend(q, k, v, scale=0.1, bias=mask, level=level)
        assert not found.out[1, :, 1].any()
        assert bool((found.lse[1, :, 1] == -torch.inf).all())
        part = native.attend(q[:1], k[:1, :, 600:], v[:1, :, 600:], scale=0.1, level=level)
        torch.testing.assert_close(found.out[:1], part.out)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_keys(level, dtype):
    q, k, v = make(dtype, h=1, g=2, t=1, s=2**20 + 7, d=8)
    exact = oracle(q, k, v, scale=0.5)
    found = native.attend(q, k, v, scale=0.5, level=level)
    # Eager attention rounds weights of a millionth, so the bound is a rounding of the result.
    assert (found.out - exact.out).abs().max() < 4e-7
    assert (found.lse - exact.lse).abs().max() < 4e-6


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_no_keys_no_rows_no_batch(level):
    q, k, v = make(torch.float32, t=2, s=0, e=16)
    found = native.attend(q, k, v, scale=1.0, level=level)
    assert found.out.shape == (1, 4, 2, 16)
    assert not found.out.any()
    assert bool((found.lse == -torch.inf).all())
    assert native.attend(*make(torch.float32, t=0), scale=1.0).out.shape == (1, 4, 0, 64)
    assert native.attend(*make(torch.float32, b=0), scale=1.0).out.shape == (0, 4, 3, 64)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_and_between_the_runs_is_not_touched(level, dtype):
    """Each run lies one element off any alignment, in a sea of NaN."""
    q, k, v = make(dtype, b=2, h=3, s=77, d=72, e=40)

    def at_sea(x):
        b, h, s, d = x.shape
        sea = torch.full((1 + b * h * (s + 3) * (d + 5) + 9,), torch.nan, dtype=dtype)
        view = sea[1:].as_strided(
            (b, h, s, d), ((s + 3) * (d + 5) * h, (s + 3) * (d + 5), d + 5, 1), 1
        )
        return view.copy_(x)

    there = native.attend(at_sea(q), at_sea(k), at_sea(v), scale=0.1, level=level)
    assert same_bits(there, native.attend(q, k, v, scale=0.1, level=level))
    backwards = torch.stack([q, q], dim=-1)[..., 0]
    assert same_bits(there, native.attend(backwards, k, v, scale=0.1, level=level))
    spread = torch.stack([k, k], dim=-1)[..., 0]
    assert same_bits(there, native.attend(q, spread, v, scale=0.1, level=level))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_not_finite_shows_where_it_shows_in_the_reference(
    level, dtype, where, what, masked
):
    q, k, v = make(dtype, s=1100, e=48)
    tensors = {"q": q, "k": k, "v": v}
    tensors[where][0, 1, 2, 5] = what
    how = {"scale": 0.1}
    if masked:
        how["bias"] = torch.rand((1, 1, 3, 1100), generator=torch.Generator().manual_seed(1)) < 0.5
    found = native.attend(q, k, v, level=level, **how)
    wanted = ReferenceAttention()(q, k, v, **how)
    for mine, its in zip(found, wanted, strict=True):
        assert torch.equal(mine.isfinite(), its.isfinite())
        assert torch.equal(mine.isnan(), its.isnan())
        both = its.isfinite()
        torch.testing.assert_close(mine[both], its[both], rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_the_number_of_threads_does_not_show_in_a_single_bit(level):
    for dtype in DTYPES:
        q, k, v = make(dtype, b=2, g=7, t=2, s=5003)
        one = native.attend(q, k, v, scale=0.1, level=level, num_threads=1)
        for count in (2, 3, 5, 16):
            again = native.attend(q, k, v, scale=0.1, level=level, num_threads=count)
            assert same_bits(one, again), count


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_a_row_does_not_depend_on_the_rows_beside_it(level):
    for dtype in DTYPES:
        q, k, v = make(dtype, b=2, h=2, g=7, t=10, s=900)
        whole = native.attend(q, k, v, scale=0.1, level=level)
        for t in (0, 9):
            alone = native.attend(q[1:, :, t : t + 1], k[1:], v[1:], scale=0.1, level=level)
            assert torch.equal(whole.out[1:, :, t : t + 1], alone.out)
        one = native.attend(q[:, 7:8], k[:, 1:], v[:, 1:], scale=0.1, level=level)
        assert torch.equal(whole.out[:, 7:8], one.out)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_of_one_percent_in_one_span_is_found(dtype):
    """Of eight thousand keys, the values of one span of one head."""
    q, k, v = make(dtype, g=4, t=1, s=8192)
    q = q * 4  # a few keys have to count, or rounding in the type itself is larger than the fault
    how = {"scale": 0.125}
    exact, same = oracle(q, k, v, **how), eager(q, k, v, **how)
    found = native.attend(q, k, v, **how)
    check(found.out, same.out, exact.out)
    first = native.attend(q, k[:, :, :512], v[:, :, :512], **how)
    share = torch.exp(first.lse - found.lse)[..., None]
    wrong = found.out.clone()
    wrong[:, :4] += 0.01 * (share * first.out)[:, :4]
    holds = within_rule(wrong, same.out, exact.out)[0]
    # 1 % of a sixteenth is less than a rounding of bfloat16: there only a closer look finds it.
    finest = (wrong.double() - exact.out).abs().max() > 20 * (found.out - exact.out).abs().max()
    assert finest
    assert not holds or dtype != torch.float32


@needs_library
def test_callers_in_several_threads_get_their_own_answers():
    draws = [make(torch.bfloat16, s=3000, seed=seed) for seed in range(6)]
    wanted = [native.attend(*draw, scale=0.1) for draw in draws]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(10):
            found = list(callers.map(lambda draw: native.attend(*draw, scale=0.1), draws))
            assert all(map(same_bits, wanted, found))


def fresh(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_library
def test_a_forked_child_computes_and_both_end() -> None:
    code = """
import os, warnings
import torch
from headinfer.attention import native
torch.manual_seed(0)
q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 4000, 64), torch.randn(1, 2, 4000, 64)
run = lambda: native.attend(q, k, v, scale=0.1, num_threads=3)
wanted = run().out
warnings.simplefilter("ignore")  # that a process with threads forks is what is tried here
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run().out, wanted) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(run().out, wanted))
"""
    assert fresh(code) == "0 True"


def test_importing_loads_no_library() -> None:
    code = (
        "import headinfer.attention.api; "
        "print('headinfer_native' in open('/proc/self/maps').read())"
        if os.path.exists("/proc/self/maps")
        else "print(False)"
    )
    assert fresh(code) == "False"


@pytest.fixture
def as_before() -> Iterator[None]:
    choose.cache_clear()
    native.suggest_threads(None)
    yield
    choose.cache_clear()
    native.set_threads(None)
    native.suggest_threads(None)


@pytest.mark.usefixtures("as_before")
def test_without_the_library_the_choice_is_another_and_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_places", lambda: [tmp_path / "absent.so"])
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    assert choose(DECODE).name == "cpu-flash"
    (reason,) = why_not(DECODE)["native"]
    assert reason.startswith("the native library was not built: it is not in ")
    assert str(tmp_path) in reason
    q, k, v = make(torch.bfloat16, t=1)
    assert attend(q, k, v, scale=0.1).out.dtype == torch.bfloat16
    with pytest.raises(UnsupportedAttention, match="native: the native library was not built"):
        attend(q, k, v, scale=0.1, impl="native")
    with pytest.raises(InputError, match="scripts/build_native"):
        native.attend(q, k, v, scale=0.1)


def test_a_library_that_does_not_load_is_a_reason(monkeypatch, tmp_path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_places", lambda: [broken])
    assert "cannot be loaded" in str(native._load.__wrapped__())


@needs_library
def test_a_library_of_another_version_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert "build it again" in str(native._load.__wrapped__())


@needs_library
@pytest.mark.usefixtures("as_before")
def test_decode_is_native_and_prefill_is_not():
    assert choose(DECODE).name == "native"
    for changed, part in {
        ("cuda", torch.bfloat16, 128, 128, 4, 1): "tensors are on cuda",
        ("cpu", torch.float64, 128, 128, 4, 1): "type torch.float64",
        ("cpu", torch.bfloat16, 2048, 128, 4, 1): "head dims 2048 and 128",
        ("cpu", torch.bfloat16, 128, 128, 17, 1): "17 query heads per KV head",
        ("cpu", torch.bfloat16, 128, 128, 4, 64): "64 or more query tokens",
    }.items():
        spec = AttentionSpec(*changed, False, False, False)
        (reason,) = why_not(spec)["native"]
        assert part in reason
        if spec.device == "cpu":
            assert choose(spec).name != "native"
    capped = AttentionSpec("cpu", torch.bfloat16, 128, 128, 4, 64, True, False, True)
    assert choose(capped).name == "native"


@needs_library
@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("count", [0, -1, 1025, 2.0, True, "2"])
def test_a_thread_count_that_cannot_be_is_refused_with_the_numbers(count):
    for refused in (
        lambda: native.set_threads(count),
        lambda: native.attend(*make(torch.float32), scale=1.0, num_threads=count),
        lambda: native.touch(0, 0, num_threads=count),
    ):
        with pytest.raises(InputError, match=f"{count!r} threads: it takes 1 to 1024"):
            refused()


@needs_library
@pytest.mark.usefixtures("as_before")
def test_the_thread_count_follows_torch_until_it_is_set():
    assert native.threads() == torch.get_num_threads()
    native.set_threads(5)
    assert native.threads() == 5
    assert "with 5 threads" in native.described()
    native.set_threads(None)
    assert native.threads() == torch.get_num_threads()


@needs_library
@pytest.mark.usefixtures("as_before")
def test_a_suggestion_holds_until_a_count_is_set_and_never_adds_threads():
    native.suggest_threads(1)
    assert native.threads() == 1
    native.set_threads(3)
    assert native.threads() == 3
    native.set_threads(None)
    native.suggest_threads(torch.get_num_threads() + 7)
    assert native.threads() == torch.get_num_threads()


@needs_library
def test_a_level_this_cpu_does_not_run_is_refused_and_the_others_are_named(monkeypatch):
    q, k, v = make(torch.float32)
    with pytest.raises(InputError, match=r"level='abacus' cannot be used: it is not built"):
        native.attend(q, k, v, scale=1.0, level="abacus")
    real = native.levels()
    monkeypatch.setattr(native, "levels", lambda: {"slide-rule": False, **real})
    with pytest.raises(InputError, match=r"does not have its instructions.*portable"):
        native.attend(q, k, v, scale=1.0, level="slide-rule")
    monkeypatch.setenv(native.LEVEL_VARIABLE, "slide-rule")
    with pytest.raises(InputError, match="HEADINFER_NATIVE_LEVEL='slide-rule' cannot be used"):
        native.attend(q, k, v, scale=1.0)
    assert native.described().startswith("refused: HEADINFER_NATIVE_LEVEL")


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_the_environment_chooses_the_level(monkeypatch, level):
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    assert native.level() == level
    draw = make(torch.bfloat16)
    wanted = native.attend(*draw, scale=0.1, level=level)
    assert same_bits(native.attend(*draw, scale=0.1), wanted)


@needs_library
def test_the_library_itself_refuses_what_python_would_not_send():
    library = native._load()
    empty = native.CALL.pack(*[0] * 34)
    assert library.headinfer_attend(None) == 1
    assert library.headinfer_attend(empty) == 3
    fields = [0] * 34
    fields[6:13] = [1, 1, 1, 1, 4, 64, 64]
    fields[-2:] = [1, -1]
    assert library.headinfer_attend(native.CALL.pack(*fields)) == 1
    fields[11] = 0
    assert library.headinfer_attend(native.CALL.pack(*fields)) == 2
    fields[11], fields[-1] = 64, 99
    assert library.headinfer_attend(native.CALL.pack(*fields)) == 4
    fields[-1], fields[-5] = -1, 7
    assert library.headinfer_attend(native.CALL.pack(*fields)) == 5


@needs_library
def test_tensors_that_do_not_belong_together_are_refused():
    q, k, v = make(torch.float32, h=2, g=2)
    with pytest.raises(InputError, match="they disagree"):
        native.attend(q[:, :3], k, v, scale=1.0)
    with pytest.raises(InputError, match="they disagree"):
        native.attend(q, k, v[:, :, 1:], scale=1.0)
    with pytest.raises(InputError, match="causal=True: they disagree"):
        native.attend(q, k, v, scale=1.0, causal=True)
    with pytest.raises(InputError, match="of one type"):
        native.attend(q, k.half(), v, scale=1.0)
    with pytest.raises(InputError, match="float64"):
        native.attend(q.double(), k.double(), v.double(), scale=1.0)


@needs_library
@pytest.mark.parametrize("count", [1, 3])
def test_touching_keeps_contents_and_reading_takes_time(count):
    memory = torch.arange(3 * 2**20 + 11, dtype=torch.uint8)
    before = memory.clone()
    native.touch(memory.data_ptr() + 1, memory.nbytes - 1, num_threads=count)
    assert torch.equal(memory, before)
    assert native.read_seconds(memory.data_ptr(), memory.nbytes, num_threads=count) > 0
    native.touch(memory.data_ptr(), 0)
    with pytest.raises(InputError, match="a pointer is null"):
        native.touch(0, 4096)
    with pytest.raises(InputError, match="a pointer is null"):
        native.read_seconds(0, 4096)
