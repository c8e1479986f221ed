# SPDX-License-Identifier: Apache-2.0
"""Runs what was chosen, run by run, and keeps every result the moment it exists.

A run is one contestant at one length of one case. Its failure is a row like any other; only time
running out, or a device that no longer answers, ends the program before its end, and `--resume`
goes on from there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from headinfer.bench import measure
from headinfer.bench.cases import CASES, KNOWN, Case, Mode, chosen_cases, narrowed
from headinfer.bench.clock import Deadline, OutOfTime
from headinfer.bench.contestants import Ground, NotAvailable, clean
from headinfer.bench.machine import Others, devices_here, interpreter_ms, session_now, settle
from headinfer.bench.models import build
from headinfer.bench.packed import packed_rows
from headinfer.bench.rates import kernel_rows, pinning_rows, rate_rows
from headinfer.bench.results import (
    FAILED,
    NOT_AVAILABLE,
    OUT_OF_MEMORY,
    REFUSED,
    Key,
    Results,
    Row,
    read,
    write,
)
from headinfer.bench.shapes import SHAPES
from headinfer.bench.verify import Say, verify
from headinfer.budget import format_bytes, parse_bytes
from headinfer.errors import HeadInferError, InputError, TierFull
from headinfer.hf.probe import rates_for
from headinfer.rates import Rates

SPARE_HOST_BYTES = 3 * 2**30
"""Left to the system when a run is judged to fit into host memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        out: the file of results.
        cases, contestants: patterns; empty for the default.
        contexts: lengths in the place of those of the cases; empty for theirs.
        resume: go on with `out`, which has to be of this machine and these versions.
        max_seconds: no new work after that; None for no limit.
        quick: fewer repeats.
        seed: of the order.
        device: "cpu" leaves a GPU alone.
        command: what was typed, for the record.
        commit: of the code, where git cannot tell.
    """

    out: Path
    cases: tuple[str, ...] = ()
    contestants: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    resume: bool = False
    max_seconds: float | None = None
    quick: bool = False
    seed: int = 0
    device: str | None = None
    command: str = "headinfer bench"
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended; `left` runs were not made, `why` is empty when all were."""

    results: Results
    left: int
    why: str


def bench(request: Request, say: Say) -> Ended:
    """Measure what is asked and not yet in the file.

    Raises:
        InputError: unknown names, an existing file without `resume`, or one of another machine.
    """
    devices = devices_here(request.device)
    cases = [
        narrowed(case, contestants=request.contestants, contexts=request.contexts)
        for case in chosen_cases(request.cases, devices=devices)
    ]
    results = _opened(request, say)
    runs = _Runs(request, results, devices, Deadline(request.max_seconds), say)
    return runs.all(cases)


def verify_only(device: str | None, say: Say) -> Results:
    """The exactness checks alone.

    Raises:
        InputError: there is no such device.
    """
    return Results(checks=verify(devices_here(device), say))


class _Runs:
    """The state of one process: which model is loaded, what is done, what time is left."""

    def __init__(
        self,
        request: Request,
        results: Results,
        devices: Sequence[str],
        deadline: Deadline,
        say: Say,
    ) -> None:
        self._request, self._results, self._devices = request, results, devices
        self._deadline, self._say = deadline, say
        self._model: Any = None
        self._model_key: tuple[str, str, str] | None = None
        self._warm: set[tuple[str, str | None, int]] = set()
        self._position = 0
        self._predicting: dict[tuple[str, str], Rates | None] = {}

    def all(self, cases: Sequence[Case]) -> Ended:
        """Exactness, rates, then every run in shuffled order."""
        results = self._results
        plan = list(self._runs(cases))
        done = self._done(plan)
        todo = [(case, key) for case, key in plan if key not in done]
        if len(todo) < len(plan):
            self._say(f"{len(plan) - len(todo)} of {len(plan)} runs are in the file already")
        why = ""
        made = 0
        try:
            if not results.checks:
                results.checks = verify(self._devices, self._say)
                self._keep()
            for case, key in todo:
                self._deadline.check()
                self._one(case, key, f"{made + 1}/{len(todo)}")
                made += 1
        except OutOfTime:
            results.pending = None
            why = f"the {self._request.max_seconds:.0f} s allowed are over"
        except _DeviceLost as error:
            made += 1
            why = f"the GPU no longer answers ({error}); a new process is needed"
        self._keep()
        return Ended(results, len(todo) - made, why)

    def _runs(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Key]]:
        """Every run: the machine's rates first, the order of contestants shuffled."""
        shuffle = random.Random(self._request.seed).shuffle
        for case in [CASES["rates"], *(case for case in cases if case.name != "rates")]:
            own = _OWN_NAMES.get(case.mode)
            for context in case.contexts:
                names = list(case.contestants) if own is None else [own]
                shuffle(names)
                for name in names:
                    yield case, (case.name, name, context)

    def _done(self, plan: Iterable[tuple[Case, Key]]) -> set[Key]:
        """The runs of `plan` whose rows are there."""
        done = self._results.done()
        cases = {(case, context) for case, _, context in done}
        return {
            key
            for case, key in plan
            if key in done or (case.mode in _OWN_NAMES and (key[0], key[2]) in cases)
        }

    def _one(self, case: Case, key: Key, count: str) -> None:
        """One run, with its rows in the file afterwards."""
        results = self._results
        results.pending = key
        self._keep()
        self._position += 1
        length = f" at {key[2]:,} tokens" if key[2] else ""
        self._say(f"[{count}] {key[0]}: {key[1]}{length}")
        others, before = Others(), interpreter_ms()
        rows, lost = self._attempt(case, key)
        busy, session = others.share(), len(results.sessions) - 1
        speed = {"interpreter_ms": [before, interpreter_ms()]}
        results.put(
            replace(
                row,
                others_busy=busy,
                position=self._position,
                session=session,
                settings=row.settings | speed,
            )
            for row in rows
        )
        results.pending = None
        self._keep()
        for row in rows:
            if row.median is None:
                self._say(f"    {row.status}: {row.note}")
        if lost:
            raise _DeviceLost(rows[0].note)

    def _attempt(self, case: Case, key: Key) -> tuple[list[Row], bool]:
        """The rows of a run, and whether the device is lost; what fails is a row."""
        row = Row(*key)
        try:
            return self._rows(case, key), False
        except OutOfTime:
            raise
        except NotAvailable as error:
            row = replace(row, status=NOT_AVAILABLE, note=str(error))
        except TierFull as error:
            row = replace(row, status=OUT_OF_MEMORY, note=str(error))
        except HeadInferError as error:
            row = replace(row, status=REFUSED, note=_first_line(error))
        except Exception as error:  # noqa: BLE001  whatever a contestant dies of, the others go on
            status = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED
            row = replace(row, status=status, note=f"{type(error).__name__}: {_first_line(error)}")
        finally:
            self._tidy(case)
        return [row], row.status == FAILED and not self._answers()

    def _rows(self, case: Case, key: Key) -> list[Row]:
        results, quick, deadline = self._results, self._request.quick, self._deadline
        if case.mode is Mode.RATES:
            cuda = "cuda" in self._devices
            return list(rate_rows(case, cuda=cuda, quick=quick, deadline=deadline))
        if case.mode is Mode.PINNING:
            return list(pinning_rows(case, quick=quick))
        if case.mode is Mode.KERNELS:
            return list(kernel_rows(case, key[2], results, deadline=deadline))
        if case.mode is Mode.PACKED:
            cuda = "cuda" in self._devices
            return list(packed_rows(case, key[2], cuda=cuda, quick=quick, deadline=deadline))
        if quick:
            case = replace(case, repeats=min(case.repeats, 2), steps=min(case.steps, 4))
        ground = self._ground(case, key)
        # Ours plan by length, so that another length may use other kernels for the first time.
        warm = (key[1], case.cap, key[2] if KNOWN[key[1]].ours else 0)
        if warm not in self._warm:
            first = case.mode is Mode.GENERATE and KNOWN[key[1]].ours
            measure.warm_up(key[1], ground, first_token=first)
            clean(ground.device)
            self._warm.add(warm)
        return measure.run(case, key[1], key[2], ground, results, deadline)

    def _ground(self, case: Case, key: Key) -> Ground:
        """The model, the cap and the memory for this run.

        Raises:
            MemoryError: host memory would not do.
        """
        _, contestant, context = key
        shape, device = SHAPES[case.shape], "cpu" if case.device == "cpu" else self._devices[0]
        new = case.chunk_tokens if case.mode is Mode.ATTENTION else 0
        tokens = context + new + case.steps + measure.WARM_STEPS + 2
        self._load(case.shape, case.dtype, device)
        factor = KNOWN[contestant].host_factor if device == "cuda" else 2.5
        needs = int(factor * shape.kv_bytes(tokens, case.dtype)) + SPARE_HOST_BYTES
        free = psutil.virtual_memory().available
        if factor and needs > free and context >= 2**14:
            raise MemoryError(
                f"not started: it may take {format_bytes(needs)} of host memory, and "
                f"{format_bytes(free)} are free"
            )
        rates = self._rates(device, case.dtype) if KNOWN[contestant].ours else None
        if device == "cuda":
            self._cap(case.cap)
        return Ground(
            self._model,
            shape,
            case.dtype,
            tokens,
            case.chunk_tokens,
            cap=case.cap,
            extra={} if case.kv_format is None else {"kv_format": case.kv_format},
            rates=rates,
        )

    def _rates(self, device: str, dtype: str) -> Rates | None:
        """What predictions are made from: as `headinfer doctor --probe` measures it, once."""
        key = (device, dtype)
        if key not in self._predicting:
            self._say(f"    rates of {dtype} on {device}, for predictions")
            found = self._predicting[key] = rates_for(device, getattr(torch, dtype))
            if found is not None:
                # With the figures: what another cost model would have said can be worked out later.
                kept = self._results.sessions[-1].machine.setdefault("rates", {})
                kept[f"{dtype} on {device}"] = found.as_dict()
        return self._predicting[key]

    def _load(self, shape: str, dtype: str, device: str) -> None:
        if self._model_key == (shape, dtype, device):
            return
        self._model, self._model_key = None, None
        self._warm.clear()
        clean(torch.device(device))
        self._say(f"    making a model of the shape of {shape} in {dtype} on {device}")
        self._model = build(SHAPES[shape], dtype, device, seed=self._request.seed)
        self._model_key = (shape, dtype, device)

    def _cap(self, cap: str | None) -> None:
        """What torch may take of the GPU, as if it were a smaller one."""
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if cap is None else min(parse_bytes(cap) / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(share)

    def _tidy(self, case: Case) -> None:
        if self._model is not None:
            self._model.set_attn_implementation("sdpa")
        cuda = "cuda" in self._devices
        try:
            clean(torch.device("cuda" if cuda and case.device != "cpu" else "cpu"))
            if cuda:
                self._cap(None)
        except RuntimeError:  # a lost device cannot be tidied; `_answers` will say so
            self._model, self._model_key = None, None

    def _answers(self) -> bool:
        """The device still computes: after some errors it refuses everything."""
        if "cuda" not in self._devices:
            return True
        try:
            torch.ones(1, device="cuda").add_(1)
            settle(torch.device("cuda"))
        except RuntimeError:
            return False
        return True

    def _keep(self) -> None:
        write(self._results, self._request.out)


class _DeviceLost(Exception):
    """After an error the GPU refuses everything."""


_OWN_NAMES = {
    Mode.RATES: "machine",
    Mode.PINNING: "host memory",
    Mode.KERNELS: "kernels",
    Mode.PACKED: "lossless format",
}
"""Runs of modes that find their contestants by themselves."""


def _opened(request: Request, say: Say) -> Results:
    """The file to go on with, or a new one, with this session in it."""
    session = session_now(request.command, request.seed, request.commit)
    if not request.resume:
        if request.out.exists():
            raise InputError(
                f"{request.out} exists; --resume goes on with it, --out names another file"
            )
        return Results(sessions=[session])
    if not request.out.exists():
        return Results(sessions=[session])
    results = read(request.out)
    for earlier in results.sessions:
        if earlier.identity != session.identity:
            raise InputError(
                f"{request.out} was measured on {earlier}; this is {session}. Figures of two "
                "machines or versions do not stand in one file: name another with --out"
            )
    _after_a_death(results, say)
    results.sessions.append(session)
    return results


def _after_a_death(results: Results, say: Say) -> None:
    """A run that took its process with it is tried once more, and given up after that."""
    key = results.pending
    if key is None:
        return
    again = key not in results.ended
    say(
        f"a process ended during {' '.join(map(str, key))}: {'tried again' if again else 'left out'}"
    )
    if again:
        results.ended.append(key)
    else:
        note = "two processes ended during this run"
        results.put([Row(*key, status=FAILED, note=note, session=len(results.sessions) - 1)])
    results.pending = None


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a type for it on a GPU, and words on a host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]}..."
