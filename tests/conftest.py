# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no model hub, and a skip with its reason where a GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports transformers: a test that forgets to be local fails instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests that start a fresh interpreter test this checkout, installed or not.
SOURCE = str(Path(__file__).resolve().parent.parent / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
