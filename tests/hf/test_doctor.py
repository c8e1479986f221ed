# SPDX-License-Identifier: Apache-2.0
"""The doctor passes what is equal and finds what is not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headinfer
from headinfer.attention import native
from headinfer.errors import UnsupportedAttention
from headinfer.hf import attention, doctor
from headinfer.runner import Runner
from headinfer.testing.zoo import REFUSED, ZOO, ModelAbsent


def test_without_a_model_it_describes_the_machine() -> None:
    report = headinfer.doctor()
    assert report.ok
    assert report.model is None
    assert not report.checks
    assert report.versions["torch"] == torch.__version__
    assert report.versions["transformers"]
    text = str(report)
    assert "CPU:" in text
    assert "GPU" in text
    for name in ("prefill", "decode", "masked", "softcap"):
        assert any(name in call for call in report.attention)
    assert set(report.why_not) == set(report.attention)
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def test_the_reasons_why_an_implementation_cannot_run_are_given() -> None:
    report = headinfer.doctor()
    call = next(name for name in report.why_not if "softcap" in name and "cpu" in name)
    assert "softcap" in report.why_not[call]["cpu-flash"]
    assert report.why_not[call]["reference"] == []
    assert report.attention[call] == ("reference" if native.why_absent() else "native")


def test_the_native_kernel_is_named_or_its_absence_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = str(headinfer.doctor())
    if native.why_absent() is None:
        assert f"native CPU attention: {native.level()} with {native.threads()} threads" in text
        monkeypatch.setenv(native.LEVEL_VARIABLE, "abacus")
        assert "refused: HEADINFER_NATIVE_LEVEL='abacus'" in str(headinfer.doctor())
    monkeypatch.setattr(native, "_load", lambda: "the native library was not built: a test")
    assert "native CPU attention: none: the native library was not built" in str(headinfer.doctor())


def built(family: str) -> Any:
    try:
        return ZOO[family].build()
    except ModelAbsent as absent:
        pytest.skip(str(absent))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "falcon_h1", "t5"])
def test_a_model_that_streams_exactly_is_ok(family: str) -> None:
    model = built(family)
    report = headinfer.doctor(model)
    assert report.ok, str(report)
    assert report.model == type(model).__name__
    assert len(report.checks) == 3
    assert all(check.error <= check.bound for check in report.checks)
    assert all(check.error < float("inf") for check in report.checks)
    assert json.loads(json.dumps(report.as_dict()))["checks"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_held_to_its_own_rounding(dtype: torch.dtype, build: Any) -> None:
    report = headinfer.doctor(build("llama").to(dtype))
    assert report.ok, str(report)


def test_the_model_is_left_as_it_was(build: Any) -> None:
    model = build("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    headinfer.doctor(model)
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert not model._forward_pre_hooks
    assert model.generation_config.prefill_chunk_size is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def one_tile_off(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Values of one staged tile are scaled while attention reads them."""
    from headinfer.heads import OffloadedHeads

    unpack = OffloadedHeads.unpack

    def wrong(self: Any, tile: Any, slot: Tensor, *more: Any) -> Any:
        piece = unpack(self, tile, slot, *more)
        if tile.layer == 0 and tile.span.start == 0 and tile.group.start == 0:
            piece = piece._replace(v=piece.v * factor)
        return piece

    monkeypatch.setattr(OffloadedHeads, "unpack", wrong)


def one_append_off(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Values of some tokens of one head are scaled when they are stored."""
    append = Runner.append

    def wrong(self: Any, index: int, k: Tensor, v: Tensor) -> int:
        if index == 0:
            v = v.clone()
            v[:, 0, :16] *= factor
        return append(self, index, k, v)

    monkeypatch.setattr(Runner, "append", wrong)


@pytest.mark.parametrize("plant", [one_tile_off, one_append_off])
def test_one_percent_in_one_tile_is_found(plant: Any, build: Any, monkeypatch: Any) -> None:
    model = build("llama")
    plant(monkeypatch, 1.0)
    assert headinfer.doctor(model).ok
    plant(monkeypatch, 1.01)
    report = headinfer.doctor(model)
    assert not report.ok
    assert "FAILED" in str(report)
    assert max(check.error / check.bound for check in report.checks) > 10


@pytest.mark.parametrize(("family", "argument"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_a_dropped_argument_is_found(family: str, argument: str, monkeypatch: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = ZOO[family].build()
    attention.register()
    attend = ALL_ATTENTION_FUNCTIONS["headinfer"]

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(argument, None)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "headinfer_attention", forgetful)
    try:
        assert not headinfer.doctor(model).ok
    finally:
        monkeypatch.undo()
        attention.register()
    assert headinfer.doctor(model).ok


@pytest.mark.parametrize("family", ["bloom", "doge"])
def test_a_refused_model_is_not_ok_and_says_why(family: str) -> None:
    report = headinfer.doctor(REFUSED[family].build())
    assert not report.ok
    assert "materialize" in str(report) or "eager" in str(report)


def test_an_argument_upstream_adds_is_found(build: Any, monkeypatch: Any) -> None:
    model = build("llama")
    forward = type(model.model.layers[0].self_attn).forward

    def with_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "new_in_this_version": 2})

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", with_more)
    report = headinfer.doctor(model)
    assert not report.ok
    assert "new_in_this_version" in str(report)


def test_chunks_that_differ_upstream_are_a_note_not_a_failure() -> None:
    report = headinfer.doctor(ZOO["jamba"].build())
    assert report.ok, str(report)
    assert any("chunked prefill differs" in check.note for check in report.checks)
    assert any("scan" in warning for warning in report.warnings)


def test_a_machine_without_an_implementation_is_described(monkeypatch: Any) -> None:
    def refuse(spec: Any) -> Any:
        raise UnsupportedAttention("none can", reasons=["none"])

    monkeypatch.setattr(doctor, "choose", refuse)
    assert set(headinfer.doctor().attention.values()) == {"none can"}


def test_it_logs_nothing_above_info_for_a_sound_model(build: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "headinfer"):
        headinfer.doctor(build("llama"))
    assert not [record for record in caplog.records if record.name.startswith("headinfer")]


def test_the_report_names_the_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from headinfer.hf import geometry
    from headinfer.surroundings import HostMemory

    found = HostMemory(8 * 2**30, 3 * 2**30, container=True)
    monkeypatch.setattr(geometry, "host_memory", lambda: found)
    assert "host memory 8.00 GiB, 3.00 GiB available (a container's limit)" in str(
        headinfer.doctor()
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("always [madvise] never\n", "huge pages: madvise"),
        ("always madvise [never]\n", "huge pages: never; page-locking memory takes several times"),
    ],
)
def test_huge_pages_are_named(tmp_path: Path, setting: str, said: str) -> None:
    (tmp_path / "enabled").write_text(setting)
    assert doctor._huge_pages(tmp_path / "enabled").startswith(said)
    assert (
        doctor._huge_pages(tmp_path / "missing")
        == "huge pages: unknown (No such file or directory)"
    )
