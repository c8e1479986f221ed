# SPDX-License-Identifier: Apache-2.0
"""Keeps transformers' own notices and bars off the terminal while something else talks there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers(*, keep_bars: bool = False) -> Iterator[None]:
    """Only errors are logged inside; bars are off too unless `keep_bars` (for downloads)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not keep_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
