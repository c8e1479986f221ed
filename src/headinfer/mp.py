# SPDX-License-Identifier: Apache-2.0
"""The import path of the published HeadInfer code: `from headinfer.mp import mp_headinfer`."""

from __future__ import annotations

from headinfer.hf.published import mp_headinfer, mp_simulate_decode

__all__ = ["mp_headinfer", "mp_simulate_decode"]
