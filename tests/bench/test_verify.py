# SPDX-License-Identifier: Apache-2.0
"""The checks pass here, notice a fault of one percent, and then withhold what they guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headinfer.attention import api
from headinfer.attention.types import Partial
from headinfer.bench import baseline, verify
from headinfer.bench.must_hold import BOUNDS, UNKNOWN, judge
from headinfer.bench.results import Check, Results
from headinfer.bench.shapes import SHAPES


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape, a short text, one draw."""
    monkeypatch.setattr(verify, "PROMPT_TOKENS", 100)
    monkeypatch.setattr(verify, "NEW_TOKENS", 3)
    monkeypatch.setattr(verify, "DRAWS", 6)
    odd = SHAPES["tiny, odd"]
    monkeypatch.setattr(verify, "SHAPES", {"tiny": odd, "tiny, odd": odd})


class Faulty:
    """An implementation that is off by one percent where a call has many keys."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name = inner.name

    def unsupported(self, spec: Any) -> list[str]:
        return self._inner.unsupported(spec)

    def __call__(self, q: Any, k: Any, v: Any, **how: Any) -> Partial:
        out, lse = self._inner(q, k, v, **how)
        return Partial(out * 1.01 if k.shape[2] >= 16 else out, lse)


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def test_everything_is_exact_here_and_every_mode_is_tried(quick: None) -> None:
    said: list[str] = []
    checks = verify.verify(["cpu"], said.append)
    assert failed(checks) == []
    assert len(said) == len(checks)
    names = " ".join(check.name for check in checks)
    for mode in ("streaming only", "as planned", "all resident", "re-implemented"):
        assert f"{mode} against the resident cache" in names


def test_a_planted_error_is_caught_and_ratios_are_refused(
    quick: None, monkeypatch: pytest.MonkeyPatch, synthetic: Results
) -> None:
    name = "cpu-flash"
    monkeypatch.setitem(api.IMPLEMENTATIONS, name, Faulty(api.IMPLEMENTATIONS[name]))
    api.choose.cache_clear()
    try:
        checks = verify.verify(["cpu"])
    finally:
        api.choose.cache_clear()
    found = " ".join(failed(checks))
    assert "attention 'cpu-flash' against float64, float32" in found
    assert "streaming only against the resident cache" in found
    assert "attention 'reference'" not in found
    synthetic.checks = checks
    withheld = [bound for bound in BOUNDS if bound.is_ratio]
    verdicts = [verdict for verdict in judge(synthetic) if "withheld" in verdict.measured]
    assert len(verdicts) == len(withheld)
    assert {verdict.state for verdict in verdicts} == {UNKNOWN}


def test_a_baseline_that_is_wrong_is_caught_too(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = baseline.attend_one_head

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return (
            right(q, k[:, :, 1:], v[:, :, 1:], scale) if k.shape[2] > 90 else right(q, k, v, scale)
        )

    monkeypatch.setattr(baseline, "attend_one_head", wrong)
    checks = list(verify._model_checks("cpu"))
    assert all("schedule" in name for name in failed(checks))
    assert failed(checks)


def test_a_check_that_cannot_run_has_failed(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **how: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(verify, "enter", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        list(verify._model_checks("cpu"))  # without the resident answer there is nothing to compare
    monkeypatch.setattr(verify, "attend_one_head", broken)
    monkeypatch.setattr(verify, "IMPLEMENTATIONS", {})
    checks = list(verify._attention_checks("cpu"))
    assert [check.note for check in checks if not check.ok] == ["RuntimeError: no kernel image"] * 3
