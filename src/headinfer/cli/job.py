# SPDX-License-Identifier: Apache-2.0
"""One question to one model: load, plan, prefill, stream, measure. `run` and `demo` both do this."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headinfer.cli.console import (
    AnswerStream,
    PrefillBar,
    PreparationBar,
    print_note,
    show_warnings,
    working,
    write_answer,
)

if TYPE_CHECKING:
    from headinfer.cost import Prediction
    from headinfer.hf.compared import Comparison
    from headinfer.hf.generate import Generated, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class Memory:
    """What `attach` is told about memory; None lets the plan decide."""

    gpu_memory: str | None = None
    host_memory: str | None = None
    chunk_tokens: int | None = None
    on_unsupported: str = "error"
    disk: str | None = None
    disk_memory: str | None = None
    kv_format: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What was asked for on the command line.

    Attributes:
        sampling: flags named as in transformers.
        chat: use the chat template; None: if there is one.
        beyond: allow more positions than the model was made for.
        compare: also run with the cache resident.
    """

    model: str
    text: str | None
    question: str | None
    max_new_tokens: int
    memory: Memory = field(default_factory=Memory)
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    chat: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    beyond: bool = False
    compare: bool = False
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One measured generation."""

    answer: Generated
    peak: dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished job: decided and measured, never mixed; `context` if it was on disk.

    `predicted` is None where the machine's rates are not known: `headinfer doctor --probe`;
    `compared` where nothing ran.
    """

    job: Job
    loaded: dict[str, Any]
    plan: dict[str, Any]
    stats: dict[str, int]
    headwise: Run
    resident: Run | None
    predicted: Prediction | None = None
    compared: Comparison | None = None
    context: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        answer = self.headwise.answer
        found: dict[str, Any] = {
            "model": self.job.model,
            "question": self.job.question,
            "answer": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.token_ids),
            "stopped": answer.stopped,
            **self.loaded,
            "plan": self.plan,
            "stats": self.stats,
            "timings": answer.timings(),
            "peak": self.headwise.peak,
            "predicted": None,
        }
        if self.predicted is not None:
            found["predicted"] = {
                "ttft_s": self.predicted.prefill_s,
                "itl_s": self.predicted.decode_s,
                "prefill_limit": self.predicted.prefill_limit,
                "decode_limit": self.predicted.decode_limit,
            }
        if self.compared is not None:
            found["compared"] = self.compared.as_dict()
        if self.context is not None:
            found["context"] = self.context
        if self.resident is not None:
            found["resident"] = {
                "answer": self.resident.answer.text,
                "same_tokens": self.same_tokens,
                "timings": self.resident.answer.timings(),
                "peak": self.resident.peak,
            }
        return found

    @property
    def same_tokens(self) -> bool | None:
        """The resident cache gave the same tokens; None if it was not asked."""
        if self.resident is None:
            return None
        return self.resident.answer.token_ids == self.headwise.answer.token_ids


def execute(job: Job) -> Outcome:
    """Do it: the answer streams to standard output unless JSON was asked for.

    Raises:
        HeadInferError: whatever is wrong with model, prompt, budget or machine.
    """
    show_warnings()
    from headinfer.hf.generate import Sampling, build_prompt, check_positions, tokens_around

    sampling = Sampling(**job.sampling)
    model, tokenizer, load_s = load(job)
    prompt = build_prompt(tokenizer, job.text, job.question, chat=job.chat)
    if not job.beyond:
        check_positions(
            model.config,
            prompt_tokens=prompt.tokens,
            new_tokens=job.max_new_tokens,
            around_tokens=tokens_around(tokenizer, job.text, job.question, chat=job.chat),
        )
    plan, predicted, compared, stats, headwise = _run_headwise(
        job, model, tokenizer, prompt, sampling
    )
    resident = _run_resident(job, model, tokenizer, prompt, sampling) if job.compare else None
    loaded = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_s": load_s,
    }
    return Outcome(job, loaded, plan, stats, headwise, resident, predicted, compared)


def print_comparison(outcome: Outcome) -> None:
    """The last lines: what was predicted beside what was measured."""
    if outcome.compared is not None:
        for figure in outcome.compared.figures:
            if figure.predicted is not None and figure.measured is not None:
                print_note(str(figure))


def print_json(found: Mapping[str, Any]) -> None:
    write_answer(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load(job: Job) -> tuple[Any, Any, float]:
    """Model, tokenizer, and the seconds they took."""
    from headinfer.hf.load import load_model

    started = time.perf_counter()
    with PreparationBar() as preparation:
        model, tokenizer = load_model(
            job.model,
            job.dtype,
            job.device,
            trust_remote_code=job.trust_remote_code,
            on_step=preparation,
        )
    seconds = time.perf_counter() - started
    dtype = str(model.dtype).removeprefix("torch.")
    print_note(f"{job.model}: {dtype} on {model.device}, loaded in {seconds:.1f} s")
    return model, tokenizer, seconds


def _run_headwise(
    job: Job, model: Any, tokenizer: Any, prompt: Prompt, sampling: Sampling
) -> tuple[dict[str, Any], Prediction | None, Comparison | None, dict[str, int], Run]:
    import headinfer
    from headinfer.hf.forecast import cost_for, predicted_for
    from headinfer.hf.generate import generate_text
    from headinfer.hf.peak import PeakMemory

    bar = PrefillBar(prompt.tokens)
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
            expected_tokens=prompt.tokens + job.max_new_tokens,
            new_tokens=job.max_new_tokens,
            batch_size=sampling.num_beams,
            observer=bar,
        ) as session,
    ):
        predicted = None
        if session.plan is not None:
            print_note(str(session.plan))
            cost, measured = cost_for(session.plan, model)
            bar.expect(cost, measured=measured, chunk_tokens=session.plan.chunk_tokens)
            predicted = predicted_for(session.plan, model, prompt_tokens=prompt.tokens)
        with bar, AnswerStream(bar, silent=job.as_json) as stream:
            answer = generate_text(
                model,
                tokenizer,
                prompt,
                max_new_tokens=job.max_new_tokens,
                sampling=sampling,
                on_text=stream,
            )
        plan = session.plan.as_dict() if session.plan is not None else {}
        stats, compared = session.stats.as_dict(), session.compared
    return plan, predicted, compared, stats, Run(answer, peak.as_dict())


def _run_resident(job: Job, model: Any, tokenizer: Any, prompt: Prompt, sampling: Sampling) -> Run:
    from headinfer.hf.generate import generate_text
    from headinfer.hf.peak import PeakMemory

    name = "the same question with the whole cache resident, for comparison"
    with working(name), PeakMemory(model.device) as peak:
        answer = generate_text(
            model, tokenizer, prompt, max_new_tokens=job.max_new_tokens, sampling=sampling
        )
    return Run(answer, peak.as_dict())
