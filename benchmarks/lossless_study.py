# SPDX-License-Identifier: Apache-2.0
"""What keys and values of a real model look like to the lossless format, and what other splits cost.

    python benchmarks/lossless_study.py [--model demo] [--out benchmarks/results/lossless-study.json]

A model reads a real text in bfloat16; per layer and KV head of its cache, keys and values are cut into
blocks and counted: entropy of the exponents, escapes, raw blocks, bytes of the format as it is, and
bits a value of what it might have been (fewer bits, a base that is not the maximum, other blocks, keys
before their rotation). Bits of alternatives count an escape as 24 bits and nothing else as overhead but
bases; the format's own ratio counts everything.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headinfer.formats.lossless import BlockLayout, encode, why_not
from headinfer.hf.cache_name import cache_returned
from headinfer.hf.load import load_model

BLOCKS = (32, 64, 128, 256, 512)


def exponents(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int16).to(torch.int32) >> 7) & 0xFF


def entropy(symbols: Tensor, bins: int = 512) -> float:
    p = torch.bincount(symbols.flatten(), minlength=bins).double()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log2()).sum())


def split_cost(exponent: Tensor, *, tokens: int, bits: int, base: str) -> tuple[float, float]:
    """Escape rate and bits a value of exponent [t, d] in blocks of `tokens`, `bits` per value."""
    blocks = exponent[: exponent.shape[0] // tokens * tokens].view(-1, tokens, exponent.shape[1])
    reach = 2**bits - 2  # the largest distance that is not an escape
    if base == "maximum":
        tops = blocks.amax(dim=1, keepdim=True)
        far = (tops - blocks > reach).sum()
    else:  # the window of reach + 1 exponents with the fewest values outside
        low = blocks.amin()
        counts = torch.zeros(
            (blocks.shape[0], int(blocks.amax() - low) + 2 + reach, blocks.shape[2]),
            dtype=torch.int32,
        )
        counts.scatter_add_(1, (blocks - low).long() + reach, torch.ones_like(blocks))
        sums = counts.cumsum(1)
        inside = sums[:, reach:] - torch.cat(
            [torch.zeros_like(sums[:, :1]), sums[:, : -reach - 1]], dim=1
        )
        far = (tokens - inside.amax(dim=1)).sum()
    rate = float(far) / blocks.numel()
    return rate, 8 + bits + 8 / tokens + 24 * rate


def study(x: Tensor) -> dict[str, float]:
    """Figures of one head's keys or values x [t, d]."""
    exponent = exponents(x)
    found: dict[str, float] = {"entropy": entropy(exponent)}
    centred = exponent - exponent.amax(dim=0, keepdim=True) + 256
    found["entropy below the channel's maximum"] = entropy(centred)
    whole = x[: x.shape[0] // 128 * 128].view(-1, 128, x.shape[1])
    packed, layout = encode(whole), BlockLayout(x.shape[1])
    below = exponents(whole).amax(dim=1, keepdim=True) - exponents(whole)
    escapes = (below > 14).flatten(1).sum(1)
    raw = packed.raw.sum().item()
    found["escapes a value"] = float(escapes.sum()) / whole.numel()
    found["most escapes of a block"] = int(escapes.max())
    found["raw blocks"] = raw / whole.shape[0]
    stored = whole.shape[0] * layout.slot_bytes + raw * layout.entry_bytes
    found["ratio"] = stored / (2 * whole.numel())
    for tokens in BLOCKS:
        rate, bits = split_cost(exponent, tokens=tokens, bits=4, base="maximum")
        found[f"bits a value: 4 bits, blocks of {tokens}"] = bits
    for bits, base in ((4, "best window"), (3, "maximum"), (3, "best window")):
        rate, cost = split_cost(exponent, tokens=128, bits=bits, base=base)
        found[f"escapes a value: {bits} bits, {base}"] = rate
        found[f"bits a value: {bits} bits, {base}"] = cost
    return found


@torch.no_grad()
def keys_and_values(name: str, tokens: int) -> tuple[str, list[dict[str, Tensor]]]:
    """Per layer: keys, values and keys before rotation, [h, t, d]."""
    model, tokenizer = load_model(name, dtype="bfloat16", device="cpu")
    text = importlib.resources.files("headinfer").joinpath("data", "small_desk.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    unrotated: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: unrotated.append(out[0]))
        for path, module in model.named_modules()
        if path.endswith("self_attn.k_proj")
    ]
    model.set_attn_implementation("sdpa")
    cache = cache_returned(model(ids, use_cache=True, logits_to_keep=1))
    for hook in hooks:
        hook.remove()
    layers = []
    for layer, plain in zip(cache.layers, unrotated, strict=True):
        k, v = layer.keys[0], layer.values[0]
        before = plain.view(k.shape[1], k.shape[0], k.shape[2]).transpose(0, 1)
        layers.append({"keys": k, "values": v, "keys before rotation": before})
    return f"{name}, {ids.shape[1]} tokens of small_desk.md", layers


ROW = ("entropy", "escapes a value", "most escapes of a block", "raw blocks", "ratio")


def _compact(record: dict[str, Any]) -> str:
    """A row per line, of what docs/lossless.md speaks of; means of everything."""
    rows = [
        [row["layer"], row["head"], row["what"], *(round(row[name], 5) for name in ROW)]
        for row in record.pop("rows")
    ]
    head = json.dumps({**record, "columns": ["layer", "head", "what", *ROW]}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return head.removesuffix("\n}") + ',\n "rows": [\n' + lines + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    title, layers = keys_and_values(chosen.model, chosen.tokens)
    rows = []
    for index, layer in enumerate(layers):
        for what, x in layer.items():
            reason = why_not(x.dtype, x.shape[-1])
            if reason is not None:
                raise SystemExit(f"{chosen.model}: {reason}")
            for head in range(x.shape[0]):
                rows.append({"layer": index, "head": head, "what": what, **study(x[head])})
    means: dict[str, dict[str, float]] = {}
    for what in layers[0]:
        mine = [row for row in rows if row["what"] == what]
        names = [name for name in mine[0] if name not in ("layer", "head", "what")]
        means[what] = {name: sum(row[name] for row in mine) / len(mine) for name in names}
        means[what]["largest ratio of a head"] = max(row["ratio"] for row in mine)
        means[what]["most escapes of a block"] = max(row["most escapes of a block"] for row in mine)
    stored = [means[what]["ratio"] for what in ("keys", "values")]
    print(title)
    for what, mean in means.items():
        print(what)
        for name, value in mean.items():
            print(f"  {name:45} {value:.5f}")
    print(f"stored, everything included: {sum(stored) / 2:.5f} of bfloat16")
    if chosen.out is not None:
        record = {
            "title": title,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "ratio": sum(stored) / 2,
            "means": means,
            "rows": rows,
        }
        chosen.out.write_text(_compact(record))


if __name__ == "__main__":
    main()
