# SPDX-License-Identifier: Apache-2.0
"""Which tokens a cache holds: noted forward pass by forward pass, where the ids are seen.

A cache of transformers holds keys and values of tokens it cannot name. Saving a context needs the
names, so the hook of a session notes them; nothing is copied to the host before somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_PARTS = 512
"""Passes noted apart; more are joined."""


class TokenLog:
    """Token ids and padding of what a cache holds.

    Attributes:
        length: tokens noted.
        known: False once tokens came that nobody named (embeddings, another session's cache).
        passing: a forward pass has begun and not ended.
    """

    def __init__(self, ids: Tensor | None = None, mask: Tensor | None = None) -> None:
        self.known = True
        self.passing = False
        self.length = 0 if ids is None else ids.shape[1]
        self._parts: list[Tensor] = [] if ids is None else [ids]
        self._mask = mask

    @property
    def rows(self) -> int:
        """Sequences; 0 before the first pass."""
        return self._parts[0].shape[0] if self._parts else 0

    def note(self, past: int, ids: Tensor | None, mask: Tensor | None) -> None:
        """A forward pass adds `ids` [b, t] to a cache that holds `past` tokens."""
        self.passing = True
        if ids is None or past > self.length:
            self.known = False
        if not self.known or ids is None:
            return
        if past < self.length:  # the cache was cropped meanwhile
            self._parts = [self._whole()[:, :past]] if past else []
        # Cloned: a slice would keep the whole text so far in memory, once per token.
        self._parts.append(ids.detach().clone())
        self.length = past + ids.shape[1]
        if len(self._parts) > MOST_PARTS:
            self._parts = [self._whole()]
        if mask is not None and mask.ndim == 2:
            self._mask = mask

    def ids(self, length: int) -> Tensor | None:
        """The first `length` ids [b, t] on the host; None if they are not known."""
        if not self.known or self.length < length:
            return None
        if not self._parts:
            return torch.empty(0, 0, dtype=torch.long, device="cpu")
        return self._whole()[:, :length].cpu()

    def padding(self, length: int) -> Tensor | None:
        """uint8 [b, t], 0 for padding, on the host; None without padding."""
        mask = self._mask
        if mask is None:
            return None
        found = mask[:, :length].cpu().to(torch.uint8)
        if bool(found.all()):
            return None
        missing = length - found.shape[1]
        return torch.cat([found, found.new_ones(found.shape[0], max(missing, 0))], dim=1)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i is from now on what row `rows[i]` was."""
        if self._parts and self.known:
            whole = self._whole()
            self._parts = [whole[torch.tensor(list(rows), device=whole.device)]]
        if self._mask is not None and self._mask.shape[0] > max(rows, default=0):
            self._mask = self._mask[torch.tensor(list(rows), device=self._mask.device)]

    def clear(self) -> None:
        """The cache is empty again."""
        self.known, self.passing, self.length = True, False, 0
        self._parts, self._mask = [], None

    def _whole(self) -> Tensor:
        return torch.cat([part.to(self._parts[-1].device) for part in self._parts], dim=1)
