# SPDX-License-Identifier: Apache-2.0
"""`headinfer run` with a context on disk: read a text into it, ask about what was read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headinfer.cli.console import AnswerStream, PrefillBar, print_note, show_warnings
from headinfer.cli.job import Job, Outcome, Run, load
from headinfer.errors import InputError

if TYPE_CHECKING:
    from headinfer.hf.cache import HeadCache
    from headinfer.hf.generate import Generated, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What was asked for about contexts on disk.

    Attributes:
        save: folder to read the text into.
        context: folder to ask about.
        append: the question and its answer stay in the context.
        every: time or tokens between checkpoints.
        restart: forget what is in `save`.
        other_versions: accept what other versions of torch and transformers computed.
    """

    save: str | None = None
    context: str | None = None
    append: bool = False
    every: str = "30s"
    restart: bool = False
    other_versions: bool = False

    @property
    def wanted(self) -> bool:
        return self.save is not None or self.context is not None

    @property
    def folder(self) -> Path:
        return Path(self.save or self.context or "").expanduser()


def check(disk: OnDisk, *, has_text: bool, question: str | None, num_beams: int) -> None:
    """Raises InputError for a combination that means nothing, before a model is loaded."""
    if disk.save is not None and disk.context is not None:
        raise InputError(
            "--save reads a text into a context and --context asks about one; use one of them"
        )
    if disk.context is None and disk.append:
        raise InputError("--append goes with --context: it keeps the question and its answer there")
    if disk.save is None and disk.restart:
        raise InputError("--restart goes with --save: it forgets what is there")
    if disk.context is not None and has_text:
        raise InputError(
            "--context has its text already; ask with --question, or read another text with --save"
        )
    if disk.context is not None and not (question or "").strip():
        raise InputError("--context needs --question TEXT: what to ask about the text")
    if disk.wanted and num_beams > 1:
        raise InputError("--num-beams cannot start from a saved context, which has one sequence")


def execute(job: Job, disk: OnDisk) -> Outcome:
    """Read, or open what was read; then answer the question, if there is one.

    Raises:
        HeadInferError: whatever is wrong with model, text, context, budget or machine.
    """
    show_warnings()
    from headinfer.hf.generate import Sampling
    from headinfer.hf.reading import Every

    sampling = Sampling(**job.sampling)
    Every.parse(disk.every)
    prompt = _prompt_of(disk.folder) if disk.context is not None else {}
    model, tokenizer, load_s = load(job)
    framed = _framed(job, disk, tokenizer, prompt)
    plan, stats, run, held = _run(job, disk, model, tokenizer, framed, sampling)
    loaded = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_s": load_s,
    }
    return Outcome(job, loaded, plan, stats, run, None, context=held)


@dataclass(frozen=True, slots=True)
class _Framed:
    """What is read (None: it is on disk), what is asked, and how both are framed."""

    document: Prompt | None
    question: Prompt | None
    prompt: dict[str, Any]
    before: int = 0

    @property
    def tokens(self) -> int:
        parts = [part.tokens for part in (self.document, self.question) if part is not None]
        return self.before + sum(parts)


def _prompt_of(folder: Path) -> dict[str, Any]:
    """How the text in a context was framed; says at once if there is none."""
    from headinfer.snapshot import Manifest

    manifest = Manifest.read(folder)
    if not manifest.complete:
        raise InputError(
            f"{folder} holds {manifest.tokens:,} of {manifest.wanted_tokens:,} tokens: reading was "
            "interrupted. Run the command with --save again, which goes on from there"
        )
    return {**manifest.prompt, "tokens": manifest.tokens}


def _framed(job: Job, disk: OnDisk, tokenizer: Any, prompt: Mapping[str, Any]) -> _Framed:
    from headinfer.hf.frames import frame_document, frame_question, is_chat

    document = None
    chat, turns = bool(prompt.get("chat")), int(prompt.get("turns", 0))
    if disk.context is not None and job.chat is not None and job.chat != chat:
        given, made = ("--chat", "--raw") if job.chat else ("--raw", "--chat")
        raise InputError(f"{given} was asked for, but the context was made with {made}")
    if disk.save is not None:
        chat = is_chat(tokenizer, job.chat)
        document = frame_document(tokenizer, job.text or "", chat=chat)
    question = None
    if job.question is not None:
        question = frame_question(tokenizer, job.question, chat=chat, turns=turns)
    told = {"chat": chat, "turns": turns}
    return _Framed(document, question, told, int(prompt.get("tokens", 0)))


def _run(
    job: Job, disk: OnDisk, model: Any, tokenizer: Any, framed: _Framed, sampling: Sampling
) -> tuple[dict[str, Any], dict[str, int], Run, dict[str, Any]]:
    import headinfer
    from headinfer.hf.forecast import cost_for
    from headinfer.hf.generate import check_positions
    from headinfer.hf.peak import PeakMemory

    new = job.max_new_tokens if framed.question is not None else 0
    if not job.beyond:
        around = framed.question.tokens if framed.question is not None else 0
        check_positions(
            model.config, prompt_tokens=framed.tokens, new_tokens=new, around_tokens=around
        )
    bar = PrefillBar(framed.tokens)
    with (
        PeakMemory(model.device) as peak,
        headinfer.attach(
            model,
            gpu_memory=job.memory.gpu_memory,
            host_memory=job.memory.host_memory,
            disk=job.memory.disk,
            disk_memory=job.memory.disk_memory,
            chunk_tokens=job.memory.chunk_tokens,
            on_unsupported=job.memory.on_unsupported,
            kv_format=job.memory.kv_format,
            expected_tokens=framed.tokens + max(new, 1),
            new_tokens=max(new, 1),
            observer=bar,
        ) as session,
    ):
        if session.plan is not None:
            print_note(str(session.plan))
            cost, measured = cost_for(session.plan, model)
            bar.expect(cost, measured=measured, chunk_tokens=session.plan.chunk_tokens)
        with bar:
            cache, held = _open(disk, model, tokenizer, framed, bar)
            answer = _answer(job, disk, model, tokenizer, framed, sampling, cache, bar)
        if disk.append:
            _append(disk, model, tokenizer, framed, cache, answer)
            held["tokens"] = cache.get_seq_length()
        plan = session.plan.as_dict() if session.plan is not None else {}
        stats = session.stats.as_dict()
    return plan, stats, Run(answer, peak.as_dict()), held


def _open(
    disk: OnDisk, model: Any, tokenizer: Any, framed: _Framed, bar: PrefillBar
) -> tuple[HeadCache, dict[str, Any]]:
    """The cache, and what to say about the context in JSON."""
    import headinfer

    folder, there = disk.folder, [0]

    def begin(done: int, total: int) -> None:
        there[0] = done
        bar.resume(done)
        if done:
            share = f"{done:,} of {total:,} tokens are in {folder}"
            print_note(f"{share} already" + ("" if done == total else ": going on from there"))

    if framed.document is None:
        cache = headinfer.load_context(
            model,
            folder,
            tokenizer=tokenizer,
            append=disk.append,
            other_versions=disk.other_versions,
        )
        begin(cache.get_seq_length(), cache.get_seq_length())
    else:
        with _interruptions_explained(folder):
            cache = headinfer.read_context(
                model,
                framed.document.ids,
                folder,
                tokenizer=tokenizer,
                checkpoint_every=disk.every,
                restart=disk.restart,
                other_versions=disk.other_versions,
                on_start=begin,
                prompt=framed.prompt,
            )
        if framed.question is None:
            bar.close()
            print_note(
                f"{folder} holds {cache.get_seq_length():,} tokens; ask about them with "
                f"--context {folder} --question TEXT"
            )
    tokens = cache.get_seq_length()
    return cache, {"path": str(folder), "tokens": tokens, "tokens_there_before": there[0]}


@contextlib.contextmanager
def _interruptions_explained(folder: Path) -> Iterator[None]:
    """Say what was kept when somebody stops the reading."""
    from headinfer.snapshot import Manifest, exists

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if exists(folder):
            found = Manifest.read(folder)
            print_note(
                f"{found.tokens:,} of {found.wanted_tokens:,} tokens are in {folder}: the same "
                "command goes on from there"
            )
        raise


def _answer(
    job: Job,
    disk: OnDisk,
    model: Any,
    tokenizer: Any,
    framed: _Framed,
    sampling: Sampling,
    cache: HeadCache,
    bar: PrefillBar,
) -> Generated:
    from headinfer.hf.frames import joined
    from headinfer.hf.generate import Generated, Prompt, generate_text

    if framed.question is None:
        return Generated("", (), framed.tokens, None, 0.0, "length")
    ids = cache.token_ids
    if ids is None:
        raise InputError(
            f"the context {disk.folder} has no token ids: it was saved from embeddings, and only a program can go on from it (headinfer.load_context)"
        )
    with AnswerStream(bar, silent=job.as_json) as stream:
        return generate_text(
            model,
            tokenizer,
            joined(Prompt(ids), framed.question),
            max_new_tokens=job.max_new_tokens,
            sampling=sampling,
            on_text=stream,
            cache=cache,
        )


def _append(
    disk: OnDisk,
    model: Any,
    tokenizer: Any,
    framed: _Framed,
    cache: HeadCache,
    answer: Generated,
) -> None:
    """The context holds the question and the whole answer, too."""
    import torch

    import headinfer

    if answer.stopped == "length" and answer.token_ids:
        # The last token was chosen and not read; what ends a text comes with the next question.
        last = torch.tensor([answer.token_ids[-1:]], device=model.device)
        headinfer.prefill(model, last, cache)
    prompt = {**framed.prompt, "turns": framed.prompt["turns"] + 1}
    headinfer.save_context(model, cache, disk.folder, tokenizer=tokenizer, prompt=prompt)
    cache.saved.close()
    print_note(f"{disk.folder} holds {cache.get_seq_length():,} tokens now")
