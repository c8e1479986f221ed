# SPDX-License-Identifier: Apache-2.0
"""A document and questions about it as separate runs of tokens, so that the document is read once.

The chat template is rendered around marks and cut there; each part is tokenized by itself. Joined
they say what `build_prompt` says, though tokens may differ where they meet.
"""

from __future__ import annotations

from typing import Any

import torch

from headinfer.errors import InputError
from headinfer.hf.generate import Prompt, chat_message, has_chat_template, raw_prompt
from headinfer.hf.quiet import quiet_transformers

MARK, ANSWER = "@@headinfer:text@@", "@@headinfer:answer@@"
END = "</text>"


def is_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Whether the chat template is used; `chat` None: if there is one.

    Raises:
        InputError: it was asked for, and there is none.
    """
    if chat and not has_chat_template(tokenizer):
        raise InputError("--chat was asked for, but this tokenizer has no chat template; use --raw")
    return has_chat_template(tokenizer) if chat is None else chat


def frame_document(tokenizer: Any, text: str, *, chat: bool) -> Prompt:
    """The ids of a document, up to where a question begins."""
    if not chat:
        return _ids(tokenizer, text, special=True)
    rendered = _rendered(tokenizer, [("user", chat_message(text, MARK))])
    return _ids(tokenizer, rendered[: rendered.rindex(END, 0, rendered.rindex(MARK)) + len(END)])


def frame_question(tokenizer: Any, question: str, *, chat: bool, turns: int) -> Prompt:
    """The ids of a question behind a document and `turns` questions with their answers."""
    if not question.strip():
        raise InputError("the question is empty")
    if not chat:
        return _ids(tokenizer, raw_prompt("", question))
    if not turns:
        rendered = _rendered(tokenizer, [("user", chat_message(MARK, question))])
        start = rendered.index(END, rendered.index(MARK)) + len(END)
        return _ids(tokenizer, rendered[start:])
    rendered = _rendered(tokenizer, [("user", MARK), ("assistant", ANSWER), ("user", question)])
    if ANSWER not in rendered:
        raise InputError(
            "this tokenizer's chat template drops earlier answers, so a question cannot follow one; "
            "ask without what was appended"
        )
    return _ids(tokenizer, rendered[rendered.index(ANSWER) + len(ANSWER) :])


def joined(*parts: Prompt) -> Prompt:
    """One prompt after the other."""
    return Prompt(torch.cat([part.ids for part in parts], dim=1))


def _rendered(tokenizer: Any, messages: list[tuple[str, str]]) -> str:
    said = [{"role": role, "content": content} for role, content in messages]
    with quiet_transformers():
        return str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> Prompt:
    with quiet_transformers():
        found = tokenizer(text, add_special_tokens=special, return_tensors="pt")
    return Prompt(found["input_ids"])
