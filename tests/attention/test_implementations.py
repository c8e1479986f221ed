# SPDX-License-Identifier: Apache-2.0
"""Every attention implementation against float64 by the 2x rule, over odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.attention.api import IMPLEMENTATIONS, attend, choose
from headinfer.attention.types import AttentionSpec
from headinfer.errors import InputError, UnsupportedAttention
from headinfer.testing.numerics import check, eager, oracle

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(device, dtype, *, b=1, h=2, g=2, t=5, s=37, d=64, e=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e = e or d

    def normal(*shape):
        # As models hand them over: [b, t, h, d] in memory, seen as [b, h, t, d].
        return torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)

    return normal(b, t, h * g, d), normal(b, s, h, d), normal(b, s, h, e)


def supported(device, dtype, q, k, v, **how):
    spec = AttentionSpec(
        device, dtype, q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1], q.shape[2],
        bool(how.get("causal")), how.get("bias") is not None, how.get("softcap") is not None,
    )  # fmt: skip
    return [name for name, impl in IMPLEMENTATIONS.items() if not impl.unsupported(spec)]


def run_all(device, dtype, *inputs, **how):
    """The rule over one or more draws of q, k, v: few values alone may flatter eager attention."""
    draws = [inputs] if torch.is_tensor(inputs[0]) else inputs
    how.setdefault("scale", draws[0][0].shape[-1] ** -0.5)
    names = supported(device, dtype, *draws[0], **how)
    assert names, "no implementation runs this"
    exact = [oracle(*draw, **how) for draw in draws]
    same = [eager(*draw, **how) for draw in draws]
    for name in names:
        found = [attend(*draw, impl=name, **how) for draw in draws]
        assert all(part.lse.dtype == torch.float32 for part in found), name
        for what in ("out", "lse"):
            check(
                *(
                    torch.cat([getattr(part, what).flatten() for part in parts])
                    for parts in (found, same, exact)
                )
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_every_head_dim(device, dtype, dim):
    run_all(device, dtype, *make(device, dtype, d=dim))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_kv", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_queries_per_kv_head(device, dtype, per_kv):
    run_all(device, dtype, *make(device, dtype, g=per_kv, t=1))
    run_all(device, dtype, *make(device, dtype, g=per_kv, t=9))
    run_all(device, dtype, *make(device, dtype, g=per_kv, t=9, s=9), causal=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_key_and_value_dims_may_differ(device, dtype):
    run_all(device, dtype, *make(device, dtype, d=96, e=64))
    run_all(device, dtype, *make(device, dtype, d=64, e=128))
    run_all(device, dtype, *make(device, dtype, d=192, e=128, t=70, s=70), causal=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_hide_keys_and_rows_that_see_none_are_zero(device, dtype):
    q, k, v = make(device, dtype, b=2, t=6, s=41)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand((2, 1, 6, 41), generator=generator) < 0.5
    mask[1, :, 3] = False
    run_all(device, dtype, q, k, v, bias=mask.to(device))
    run_all(device, dtype, q, k, v, bias=mask[:, :, :1].to(device))
    additive = torch.randn((1, 4, 6, 41), generator=generator).to(device)
    run_all(device, dtype, q, k, v, bias=additive)
    additive[:, :, 2] = -torch.inf
    run_all(device, dtype, q, k, v, bias=additive)


@pytest.mark.parametrize("device", DEVICES)
def test_softcap_runs_and_is_not_dropped(device):
    q, k, v = make(device, torch.float32, t=70, s=70)
    run_all(device, torch.float32, q * 8, k, v, softcap=5.0, causal=True)
    capped = attend(q * 8, k, v, scale=0.125, softcap=5.0)
    plain = attend(q * 8, k, v, scale=0.125)
    assert (capped.out - plain.out).abs().max() > 1e-2


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 3),
    g=st.integers(1, 4),
    t=st.sampled_from([1, 2, 17, 63, 64, 65, 130]),
    s=st.sampled_from([1, 2, 31, 127, 128, 129, 1000]),
    d=st.sampled_from([8, 16, 40, 64, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(device, b, h, g, t, s, d, dtype):
    draws = [make(device, dtype, b=b, h=h, g=g, t=t, s=s, d=d, seed=seed) for seed in range(6)]
    run_all(device, dtype, *draws)


@pytest.mark.parametrize("device", DEVICES)
def test_no_keys_give_the_merge_identity(device):
    q, k, v = make(device, torch.float32)
    part = attend(q, k[:, :, :0], v[:, :, :0], scale=1.0)
    assert not part.out.any()
    assert bool((part.lse == -torch.inf).all())


def test_an_implementation_insisted_on_says_why_it_cannot():
    q, k, v = make("cpu", torch.float32)
    with pytest.raises(
        UnsupportedAttention, match=r"flash: tensors are on cpu; runs on cuda"
    ) as caught:
        attend(q, k, v, scale=1.0, impl="flash")
    assert any(reason.startswith("flash:") for reason in caught.value.reasons)
    with pytest.raises(InputError, match="known: native, cpu-flash"):
        attend(q, k, v, scale=1.0, impl="flush")


def test_the_choice_is_the_first_that_can():
    plain = AttentionSpec("cpu", torch.bfloat16, 128, 128, 4, 64, False, False, False)
    assert choose(plain).name == "cpu-flash"
    capped = AttentionSpec("cpu", torch.float64, 128, 128, 4, 64, False, False, True)
    assert choose(capped).name == "reference"
