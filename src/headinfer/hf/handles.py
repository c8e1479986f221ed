# SPDX-License-Identifier: Apache-2.0
"""Zero-storage tensors that travel through model code in the place of keys, values and masks.

`KVHandle` has the true shape and says which layer and how many tokens it stands for; the attention
function streams them. Any other operation on it is an error that names the operation, or, when
asked for, copies the layer to the device first. Latent handles (MLA) instead carry the operation
out on meta tensors: the model's expansion of the whole context then costs nothing, and the
attention function repeats it tile by tile. `LazyMask` is a mask by recipe: it is never
materialised implicitly, because code that edits masks means eager's additive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from headinfer.attention.masks import MaskRecipe, Rows
from headinfer.errors import HandleError
from headinfer.totals import Query

_aten = torch.ops.aten
_ALIASES = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.clone.default,
    _aten.lift_fresh.default,
}


class KVSource(Protocol):
    """The layer a handle stands for."""

    index: int
    on_unsupported: str

    def gather(self, length: int, *, values: bool) -> Tensor:
        """The keys or values themselves, on the compute device."""
        ...

    def attend(self, length: int, query: Query) -> Tensor:
        """Attention over the first `length` tokens, [b, t, h, d]."""
        ...


@dataclass(frozen=True, slots=True)
class Origin:
    """What a handle stands for: the first `length` tokens of a layer.

    Attributes:
        source: the layer.
        length: tokens, fixed when the handle is made.
        values: values rather than keys (of a latent layer: the rotary part).
        latent: what is stored is a latent that the model expands.
        derived: the handle is what the model made of latents.
    """

    source: KVSource
    length: int
    values: bool
    latent: bool = False
    derived: bool = False


class KVHandle(torch.Tensor):
    """Keys or values held elsewhere; see the module."""

    origin: Origin
    _real: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, origin: Origin
    ) -> KVHandle:
        handle: KVHandle = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device
        )
        handle.origin = origin
        handle._real = None
        return handle

    # Shape and type reads stay in C++; everything else reaches __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        what = "values" if self.origin.values else "keys"
        return f"KVHandle({what} of layer {self.origin.source.index}, shape={tuple(self.shape)})"

    def materialized(self) -> Tensor:
        """The tensor itself, copied to the device once per handle."""
        if self._real is None:
            origin = self.origin
            self._real = origin.source.gather(origin.length, values=origin.values)
        return self._real

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _keeps_handle(func, args, kwargs):
            device = kwargs.get("device") or args[0].device
            return KVHandle(args[0].shape, args[0].dtype, torch.device(device), args[0].origin)
        handles = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, KVHandle)]
        if any(handle.origin.source.on_unsupported == "materialize" for handle in handles):
            return func(
                *_map_handles(KVHandle.materialized, args),
                **_map_handles(KVHandle.materialized, kwargs),
            )
        if all(handle.origin.latent for handle in handles):
            return _on_meta(func, args, kwargs, handles)
        raise HandleError(_kv_message(func, handles[0]))


class LazyMask(torch.Tensor):
    """A boolean mask [b, 1, t, s] by recipe; see the module."""

    recipe: MaskRecipe
    make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        device: torch.device,
        recipe: MaskRecipe,
        make: Callable[[], Tensor],
    ) -> LazyMask:
        mask: LazyMask = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.bool, device=device
        )
        mask.recipe, mask.make = recipe, make
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)}, {type(self.recipe).__name__})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _keeps_handle(func, args, kwargs):
            device = kwargs.get("device") or args[0].device
            return LazyMask(args[0].shape, torch.device(device), args[0].recipe, args[0].make)
        if func is _aten.slice.Tensor and not kwargs:
            rows = _sliced_rows(*args)
            if rows is not None:
                return rows
        raise HandleError(
            f"model code applied {func} to an attention mask that headinfer keeps as a recipe: "
            "this model edits its masks, so it cannot run with attn_implementation='headinfer'. "
            "Use attn_implementation='eager' and on_unsupported='materialize'"
        )


def _sliced_rows(
    mask: LazyMask,
    dim: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> LazyMask | None:
    """`mask` with some of its query rows; None for any other slice that is not the whole."""
    first, last, stride = slice(start, stop, step).indices(mask.shape[dim])
    if stride != 1:
        return None
    if (first, last) == (0, mask.shape[dim]):
        return LazyMask(mask.shape, mask.device, mask.recipe, mask.make)
    if dim % 4 != 2 or first >= last:
        return None
    shape = (*mask.shape[:2], last - first, mask.shape[3])
    make = mask.make
    return LazyMask(shape, mask.device, Rows(mask.recipe, first), lambda: make()[:, :, first:last])


def _keeps_handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Moves and aliases that do not change what the handle stands for."""
    if func in _ALIASES:
        return True
    if func is _aten._to_copy.default:
        dtype = kwargs.get("dtype")
        return dtype is None or dtype == args[0].dtype
    return False


def _map_handles(replace: Callable[[KVHandle], Tensor], tree: Any) -> Any:
    return tree_map(lambda x: replace(x) if isinstance(x, KVHandle) else x, tree)


def _on_meta(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], handles: list[KVHandle]
) -> Any:
    """Run on meta tensors; outputs stand for what the model derives from the latents."""
    metas: dict[int, Tensor] = {}

    def to_meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in metas:
            strides = x.stride()
            metas[id(x)] = torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")
        return metas[id(x)]

    meta_kwargs = {key: tree_map(to_meta, value) for key, value in kwargs.items()}
    if isinstance(kwargs.get("device"), torch.device):
        meta_kwargs["device"] = torch.device("meta")
    result = func(*tree_map(to_meta, args), **meta_kwargs)
    first = handles[0]
    known = {id(metas[id(x)]): x for x in handles if id(x) in metas}
    origin = Origin(
        source=first.origin.source,
        length=first.origin.length,
        values=first.origin.values,
        latent=True,
        derived=True,
    )

    def to_handle(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:  # an in-place operation returns its argument
            return known[id(x)]
        return KVHandle(x.shape, x.dtype, first.device, origin)

    return tree_map(to_handle, result)


def _kv_message(func: Any, handle: KVHandle) -> str:
    return (
        f"{func} was applied to {handle!r}, which are kept head by head outside the GPU. Either "
        "the model runs with another attention implementation: call "
        "model.set_attn_implementation('headinfer'), or use headinfer.attach(model); or its code "
        "does arithmetic of its own on cached keys and values: use "
        "on_unsupported='materialize', which copies one layer at a time to the device"
    )
