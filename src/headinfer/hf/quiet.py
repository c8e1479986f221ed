# SPDX-License-Identifier: Apache-2.0
"""Keeps transformers' own notices and bars off the terminal while something else talks there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partialmethod


@contextlib.contextmanager
def quiet_transformers(*, keep_bars: bool = False) -> Iterator[None]:
    """Only errors are logged inside; bars are off too unless `keep_bars` (for downloads)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    try:
        if keep_bars:
            yield
        else:
            logging.disable_progress_bar()
            with _no_bars():
                yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Bars drawn without asking transformers' setting, as its GGUF reader does, start disabled."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
