# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no model hub, and a skip with its reason where a GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# CI tries the same examples every time; everywhere else new ones are looked for. No deadlines:
# they would time the machine, not the code.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("anywhere", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "anywhere")

# Before anything imports transformers: a test that forgets to be local fails instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that test at the same time share the processors; two threads at least, or nothing that
# shares work between threads would be run. Those that wait leave the processor to others.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 2)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
