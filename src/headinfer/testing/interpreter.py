# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, which runs kernels on CPU tensors: for processes that ask for it.

`TRITON_INTERPRET=1` has to be in the environment before triton is imported, and changes every
kernel of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is such a process."""


def run_interpreted(file: str, *, timeout_s: float = 550) -> None:
    """The tests of `file` once more, in such a process; fails as they do."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", file, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@contextmanager
def interpreter() -> Iterator[None]:
    """Inside, the interpreter runs loops whatever the version of numpy.

    triton 3.6 counts loops with int() of arrays [1], which numpy 2.4 and later refuse.
    """
    from triton.runtime import interpreter as module

    prepare = module._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        prepare(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    module._patch_lang_tensor = with_index
    try:
        yield
    finally:
        module._patch_lang_tensor = prepare
