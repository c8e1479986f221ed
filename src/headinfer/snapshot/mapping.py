# SPDX-License-Identifier: Apache-2.0
"""Runs of several files as one piece of memory, private to this process.

A reservation of anonymous memory has file pages mapped over parts of it. Reading brings pages in
from the files; writing makes a copy of the page first, so the files never change. Needs mmap with
fixed addresses, which Python's own module lacks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Piece(NamedTuple):
    """`nbytes` bytes at `file_offset` of `descriptor` appear at `offset` of the memory.

    Both offsets are multiples of a page. Of a last page that is partly beyond `nbytes`, the rest
    is what the file holds there.
    """

    offset: int
    descriptor: int
    file_offset: int
    nbytes: int


def mapped(nbytes: int, pieces: Sequence[Piece]) -> Tensor:
    """A uint8 tensor of `nbytes`, zero outside `pieces`; unmapped when its last view is gone.

    Raises:
        OSError: the system refused, for example because there are too many mappings.
    """
    size = -(-max(nbytes, 1) // PAGE) * PAGE
    address = _map(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    try:
        for piece in pieces:
            if piece.nbytes:
                flags = mmap.MAP_PRIVATE | _MAP_FIXED
                place = address + piece.offset
                _map(place, piece.nbytes, flags, piece.descriptor, piece.file_offset)
    except OSError:
        _libc.munmap(address, size)
        raise
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, size)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


def mappings_left() -> int:
    """How many more mappings the system allows this process, roughly."""
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            most = int(file.read())
        with open("/proc/self/maps", "rb") as file:
            return most - sum(1 for _ in file)
    except (OSError, ValueError):
        return 0


def _map(address: int | None, nbytes: int, flags: int, descriptor: int, offset: int) -> int:
    found = _libc.mmap(address, nbytes, _READ_WRITE, flags, descriptor, offset)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)
