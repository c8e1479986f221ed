# SPDX-License-Identifier: Apache-2.0
"""The longest context that fits: what a plan is asked for when it is not told how much to read."""

from __future__ import annotations

from dataclasses import replace

from headinfer.errors import BudgetTooSmall
from headinfer.geometry import Geometry
from headinfer.layout import BLOCK_TOKENS
from headinfer.options import Options
from headinfer.plan import make_plan

MOST_TOKENS = 2**27
"""Nobody has read that many; a budget that allows them is no limit."""


def longest_context(
    geometry: Geometry, options: Options, *, device: str, batch: int = 1
) -> int | None:
    """Prompt and answer together that still fit, in whole blocks of tokens; None for no limit, 0 if
    not even one block does.

    What fits, fits when it is shorter, so halving finds the border.
    """

    def fits(tokens: int) -> bool:
        try:
            make_plan(
                geometry,
                # What part of it is generated weighs times, and is more than all of a short one.
                replace(options, expected_tokens=tokens, new_tokens=None),
                device=device,
                batch=batch,
            )
        except BudgetTooSmall:
            return False
        return True

    if not geometry.full_layers or fits(MOST_TOKENS):
        return None
    fitting, beyond = 0, MOST_TOKENS // BLOCK_TOKENS
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        if fits(middle * BLOCK_TOKENS):
            fitting = middle
        else:
            beyond = middle
    return fitting * BLOCK_TOKENS
