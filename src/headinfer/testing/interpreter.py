# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, which runs kernels on CPU tensors: for processes that ask for it.

`TRITON_INTERPRET=1` has to be in the environment before triton is imported, and changes every
kernel of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
