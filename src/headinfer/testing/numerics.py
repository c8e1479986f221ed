# SPDX-License-Identifier: Apache-2.0
"""The 2x rule of `headinfer.attention.rule`, as tests say it."""

from __future__ import annotations

from torch import Tensor

from headinfer.attention.rule import eager, oracle, within_rule

__all__ = ["check", "eager", "oracle", "within_rule"]


def check(found: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    holds, error, bound = within_rule(found, same_dtype, exact)
    assert holds, f"error {error:.3e} exceeds twice the eager error plus rounding, {bound:.3e}"
