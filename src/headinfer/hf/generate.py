# SPDX-License-Identifier: Apache-2.0
"""One prompt in, one answer out of `generate()`, streamed as text and timed.

Knows tokenizers, chat templates and sampling flags; whether the cache is head-wise or stock is
the model's business: the same call measures both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from headinfer.budget import format_bytes
from headinfer.errors import HeadInferError, InputError
from headinfer.hf.cache_name import cache_argument
from headinfer.hf.quiet import quiet_transformers

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one sequence, `[1, tokens]`."""

    ids: torch.Tensor

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[1])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, named as in transformers; None leaves the model's own default."""

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for flags that would be ignored."""
        given = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name)]
        if given and not self.do_sample:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"{flags} has no effect without --do-sample; add it, or leave it out")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        given: dict[str, Any] = {"do_sample": self.do_sample, "num_beams": self.num_beams}
        names = ["repetition_penalty"]
        if self.do_sample:
            names += ["temperature", "top_p", "top_k"]
        else:
            # The model's own sampling defaults mean nothing to a greedy run.
            given |= {"temperature": None, "top_p": None, "top_k": None}
        return given | {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Generated:
    """An answer and when its tokens came.

    Attributes:
        text: the answer without special tokens.
        token_ids: the new tokens.
        prompt_tokens: length of the prompt.
        ttft_s: seconds until the first token; None with beams, which yield nothing before the end.
        seconds: whole call.
        stopped: "eos", or "length" at the limit of new tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    ttft_s: float | None
    seconds: float
    stopped: str

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between tokens; None with fewer than two, or with beams."""
        if self.ttft_s is None or len(self.token_ids) < 2:
            return None
        return (self.seconds - self.ttft_s) / (len(self.token_ids) - 1)

    def timings(self) -> dict[str, float | None]:
        """Plain values, for JSON."""
        itl = self.itl_s
        rate = None if not itl else 1 / itl
        return {
            "ttft_s": self.ttft_s,
            "itl_s": itl,
            "tokens_per_s": rate,
            "generate_s": self.seconds,
        }


def has_chat_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def build_prompt(
    tokenizer: Any, text: str | None, question: str | None, *, chat: bool | None = None
) -> Prompt:
    """Token ids of a document, a question, or a question about a document.

    Args:
        tokenizer: the model's.
        text: the document, or the whole prompt if there is no question.
        question: what to ask.
        chat: use the chat template; None: if the tokenizer has one.

    Raises:
        InputError: nothing to ask, or no chat template to use.
    """
    if not (text or "").strip() and not (question or "").strip():
        raise InputError("the prompt is empty: give some text, a question, or both")
    if chat and not has_chat_template(tokenizer):
        raise InputError("--chat was asked for, but this tokenizer has no chat template; use --raw")
    with quiet_transformers():
        if chat or (chat is None and has_chat_template(tokenizer)):
            message = {"role": "user", "content": chat_message(text, question)}
            encoded = tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(raw_prompt(text, question), return_tensors="pt")
    return Prompt(encoded["input_ids"])


def chat_message(text: str | None, question: str | None) -> str:
    """A document and a question about it as one message."""
    if text is None or question is None:
        return (text or question or "").strip()
    return f"<text>\n{text}\n</text>\n\nAnswer this question from the text: {question}"


def raw_prompt(text: str | None, question: str | None) -> str:
    """The same as plain text."""
    if text is None or question is None:
        return text or question or ""
    return f"{text}\n\nQuestion: {question}\nAnswer:"


def tokens_around(
    tokenizer: Any, text: str | None, question: str | None, *, chat: bool | None = None
) -> int:
    """Tokens of a prompt that are not its text: template, question, special tokens."""
    mark = "x"
    bare = tokenizer(mark, add_special_tokens=False)["input_ids"]
    asked = (mark, question) if (text or "").strip() else (None, mark)
    return max(build_prompt(tokenizer, *asked, chat=chat).tokens - len(bare), 0)


def check_positions(
    config: Any, *, prompt_tokens: int, new_tokens: int, around_tokens: int = 0
) -> None:
    """Nothing if the model was made for this length.

    Args:
        config: the model's.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
        around_tokens: of the prompt's tokens, those that stay however short its text is.

    Raises:
        InputError: with the numbers.
    """
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = prompt_tokens + new_tokens
    if isinstance(most, int) and needed > most:
        raise InputError(
            f"the prompt of {prompt_tokens:,} tokens and {new_tokens:,} new ones make {needed:,} "
            f"positions; the model was made for {most:,}. Shorten the text to "
            f"{max(most - new_tokens - around_tokens, 0):,} tokens, lower --max-new-tokens, or go on with "
            "--allow-beyond-positions, at the risk of a wrong answer"
        )


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    cache: Any = None,
) -> Generated:
    """The answer; `on_text` gets its pieces as they come (with beams: once, at the end).

    `cache` holds the beginning of the prompt, or nothing; None lets the model start one.

    Raises:
        InputError: a flag `generate` refuses.
        HeadInferError: the GPU ran out of memory.
    """
    chosen = sampling or Sampling()
    if chosen.seed is not None:
        torch.manual_seed(chosen.seed)
    streamer = _Clock(tokenizer, on_text)
    arguments = {"max_new_tokens": max_new_tokens, "pad_token_id": _pad(model, tokenizer)}
    if cache is not None:
        arguments |= cache_argument(model, cache)
    ids = prompt.ids.to(model.device)
    with quiet_transformers(), torch.inference_mode(), _out_of_memory(model.device):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer if chosen.num_beams == 1 else None,
            **arguments,
            **chosen.arguments(),
        )
        # Beams come without their prompt's timing, and encoder-decoders without their prompt.
        start = 1 if model.config.is_encoder_decoder else prompt.tokens
        tokens = tuple(output[0, start:].tolist())
    seconds = time.perf_counter() - streamer.started
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if chosen.num_beams > 1 and on_text is not None:
        on_text(text)
    return Generated(
        text=text,
        token_ids=tokens,
        prompt_tokens=prompt.tokens,
        ttft_s=streamer.ttft_s,
        seconds=seconds,
        stopped="length" if len(tokens) >= max_new_tokens else "eos",
    )


class _Clock(TextStreamer):
    """transformers' text streamer, with the time of the first token and a callback for text."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.started = time.perf_counter()
        self.ttft_s: float | None = None
        self._on_text = on_text
        self._puts = 0

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:  # the first is the prompt
            self.ttft_s = time.perf_counter() - self.started
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)


def _pad(model: Any, tokenizer: Any) -> int | None:
    for given in (
        model.generation_config.pad_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    ):
        if given is not None:
            return int(given)
    return None


@contextlib.contextmanager
def _out_of_memory(device: torch.device) -> Iterator[None]:
    """Say what the GPU held when it ran out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        held = format_bytes(torch.cuda.memory_allocated(device))
        free, total = torch.cuda.mem_get_info(device)
        raise HeadInferError(
            f"{device} ran out of memory: this process holds {held}, {format_bytes(free)} of "
            f"{format_bytes(total)} are free. Lower --chunk-tokens or --gpu-memory, use a "
            "smaller --dtype, or free memory that other processes hold"
        ) from error
