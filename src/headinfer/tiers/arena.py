# SPDX-License-Identifier: Apache-2.0
"""Views of raw bytes as tensors: what every tier hands out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bytes_as(arena: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The bytes of a uint8 `arena` from `offset` on, as a contiguous tensor sharing its memory."""
    nbytes = math.prod(shape) * dtype.itemsize
    return arena[offset : offset + nbytes].view(dtype).view(shape)
