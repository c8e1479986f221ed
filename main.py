# SPDX-License-Identifier: Apache-2.0
"""One click: the published interface at work, `python main.py`.

First a prompt of random tokens is read chunk by chunk, then a long context is put into the cache
without reading it, and a few tokens are decoded after it. Both are timed. Sizes suit a CPU with
two cores unless there is a GPU; --help lists them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

try:
    import headinfer
except ModuleNotFoundError:  # not installed: run from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    import headinfer


def main() -> int:
    given = arguments()
    try:
        run(given)
    except headinfer.HeadInferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time a prefill in chunks and decoding after a long context, head by head."
    )
    parser.add_argument("--model", default="demo", help="folder, GGUF file, hub id, or demo")
    parser.add_argument(
        "--chunk-tokens", type=positive, help="tokens per chunk [GPU 8192, CPU 256]"
    )
    parser.add_argument("--chunks", type=positive, default=4, help="chunks to read [4]")
    parser.add_argument(
        "--start-length", type=positive, help="context before decoding [GPU 200000, CPU 8000]"
    )
    parser.add_argument("--new-tokens", type=positive, default=10, help="tokens to decode [10]")
    parser.add_argument("--device", help="cuda, cuda:N or cpu [cuda where there is one]")
    return parser.parse_args()


def positive(text: str) -> int:
    count = int(text.replace(",", "").replace("_", ""))
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return count


def run(given: argparse.Namespace) -> None:
    from headinfer.hf.load import load_model
    from headinfer.mp import mp_headinfer

    model, _ = load_model(given.model, device=given.device)
    on_gpu = model.device.type == "cuda"
    print(f"{type(model).__name__} on {model.device}, {model.dtype}")
    mp_headinfer(model)
    prefill(model, given.chunks, given.chunk_tokens or (8192 if on_gpu else 256))
    decode(model, given.start_length or (200_000 if on_gpu else 8_000), given.new_tokens)


def prefill(model: Any, chunks: int, chunk_tokens: int) -> None:
    """Read `chunks` chunks of random tokens into one cache."""
    import torch

    from headinfer.cache import OffloadedCache

    past = OffloadedCache()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, chunks * chunk_tokens), device=model.device)
    whole = Clock(model)
    for number, chunk in enumerate(ids.split(chunk_tokens, dim=1), start=1):
        clock = Clock(model)
        step(model, chunk, past)
        rate = chunk_tokens / clock.seconds()
        print(f"  chunk {number} of {chunks}: {clock.read:.2f} s, {rate:,.0f} tokens/s")
    print(f"prefill of {past.get_seq_length():,} tokens: {whole.seconds():.2f} s")
    report(past)
    past.close()


def decode(model: Any, start_length: int, new_tokens: int) -> None:
    """Decode after a context that nobody read: its keys and values are random."""
    from headinfer.mp import mp_simulate_decode

    clock = Clock(model)
    past = mp_simulate_decode(model, start_length=start_length)
    print(f"context of {start_length:,} tokens put in place: {clock.seconds():.2f} s")
    token = step(model, None, past)
    times = []
    for _ in range(new_tokens):
        clock = Clock(model)
        token = step(model, token, past)
        times.append(clock.seconds())
    median = sorted(times)[len(times) // 2]
    print(f"decode of {new_tokens} tokens: {median * 1e3:.1f} ms each, {1 / median:.2f} tokens/s")
    report(past)
    past.close()


def step(model: Any, ids: Any, past: Any) -> Any:
    """One forward pass; returns the likeliest next token, [1, 1]."""
    import torch

    if ids is None:
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        logits = model(
            input_ids=ids, past_key_values=past, use_cache=True, num_logits_to_keep=1
        ).logits
    return logits[:, -1:].argmax(dim=-1)


def report(past: Any) -> None:
    from headinfer.budget import format_bytes

    stats = past.stats()
    print(
        f"  keys and values: {format_bytes(stats.host_bytes)} in host memory, "
        f"{format_bytes(stats.resident_bytes + stats.staging_bytes + stats.tail_bytes)} beside "
        f"the model; {format_bytes(stats.loaded_bytes)} loaded"
    )


class Clock:
    """Seconds since it was made, the device's work included."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.read = 0.0
        self._wait()
        self.started = time.perf_counter()

    def seconds(self) -> float:
        self._wait()
        self.read = time.perf_counter() - self.started
        return self.read

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.current_stream(self.model.device).synchronize()


if __name__ == "__main__":
    sys.exit(main())
