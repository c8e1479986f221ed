# SPDX-License-Identifier: Apache-2.0
"""The import path of the published HeadInfer code: `from headinfer.cache import OffloadedCache`.

A thin shell over `headinfer.hf.cache.HeadCache`, on current transformers and for every model.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from headinfer.hf.cache import CacheOptions, HeadCache


class OffloadedCache(HeadCache):
    """A `HeadCache` that may be made before the model is known.

    `OffloadedCache()` learns the model's layers at its first forward pass through a model patched
    by `headinfer.mp.mp_headinfer`; attributes the published examples set on it are ignored.
    """

    def __init__(self, config: PreTrainedConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._options: CacheOptions = options  # type: ignore[assignment]
        self.learned = config is not None

    def learn(self, config: PreTrainedConfig, *, weight_bytes: int = 0) -> None:
        """Take the layers of `config`; only while empty."""
        if not self.learned and not self.get_seq_length():
            HeadCache.__init__(self, config, weight_bytes=weight_bytes, **self._options)
            self.learned = True


__all__ = ["OffloadedCache"]
