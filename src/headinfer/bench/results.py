# SPDX-License-Identifier: Apache-2.0
"""What was measured, and the file it is kept in.

One JSON file per machine and commit, rewritten as a whole after every run, so that nothing is lost
when a process is ended. A file is either read completely or refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from headinfer.errors import InputError

SCHEMA = 1

MEASURED = "measured"
OUT_OF_MEMORY = "out of memory"
NOT_AVAILABLE = "not available"
REFUSED = "refused"
FAILED = "failed"
STATES = (MEASURED, OUT_OF_MEMORY, NOT_AVAILABLE, REFUSED, FAILED)

BUSY = 0.1
"""Share of CPU time taken by other processes above which a figure is not to be relied on."""

Key = tuple[str, str, int]
"""Case, contestant and context: what one run is about."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one run, or why there is none.

    Attributes:
        case, contestant, context_tokens: the run.
        metric: what was measured; empty where the run gave nothing.
        unit: "s", "GB/s", "TFLOP/s", "s/GiB" or "bytes".
        status: one of `STATES`.
        note: why there is no figure, or what to know about it.
        median, p20, p80: of `n` values; equal where n is 1.
        values: the values themselves, in order.
        moved_bytes: per path ("h2d", "d2h", "host", "gpu"), per unit of the metric; only what was
            counted.
        bytes_floor_s: the slowest path at its measured rate, moving those bytes.
        flops_floor_s: the FLOPs of the work at the measured rates.
        achieved_bytes, achieved_flops: floor over median; 1 is the limit.
        predicted: of the plan: "gpu_peak_bytes", "host_bytes"; of the cost model: "seconds" of the
            metric, None where it predicts none, and "eta_error", how far the remaining time named
            at a tenth of a prefill was off.
        held: measured memory in bytes.
        settings: what the run was given and what was decided.
        simulated: the context is random keys and values, not a prompt that was read.
        others_busy: share of the machine's CPU time that other processes took during the run.
        position: place in the shuffled order of its session.
        session: index into `Results.sessions`.
    """

    case: str
    contestant: str
    context_tokens: int
    metric: str = ""
    unit: str = ""
    status: str = MEASURED
    note: str = ""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    values: tuple[float, ...] = ()
    moved_bytes: dict[str, float] = field(default_factory=dict)
    bytes_floor_s: float | None = None
    flops_floor_s: float | None = None
    achieved_bytes: float | None = None
    achieved_flops: float | None = None
    predicted: dict[str, float | None] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    simulated: bool = False
    others_busy: float | None = None
    position: int = 0
    session: int = 0

    @property
    def key(self) -> Key:
        return self.case, self.contestant, self.context_tokens

    @property
    def disturbed(self) -> bool:
        """Other processes kept the CPUs busy meanwhile."""
        return (self.others_busy or 0.0) > BUSY


@dataclass(frozen=True, slots=True)
class Session:
    """One process that measured.

    Attributes:
        started: date and time, UTC.
        command: what was typed.
        seed: of the order and of the random tokens.
        machine: "gpu", "gpu_bytes", "cpu", "cpu_threads", "cpu_capability", "host_bytes".
        versions: "headinfer", "python", "torch", "transformers".
        commit: of the code; None where git could not tell and nobody said.
    """

    started: str
    command: str
    seed: int
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What has to be equal for figures to stand in one file."""
        machine = (self.machine.get("gpu"), self.machine.get("cpu"))
        return (*machine, *sorted(self.versions.items()), self.commit)

    def __str__(self) -> str:
        chips = [self.machine[kind] for kind in ("gpu", "cpu") if self.machine.get(kind)]
        threads = self.machine.get("cpu_threads")
        torch = self.versions.get("torch", "?").split("+")[0]
        return (
            f"{', '.join(chips)}, {threads} CPU threads, torch {torch}, transformers "
            f"{self.versions.get('transformers', '?')}, headinfer "
            f"{self.versions.get('headinfer', '?')} ({self.commit or 'commit unknown'}), "
            f"{self.started[:10]}"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of `verify`: `error` must not exceed `bound`.

    Attributes:
        gates: speed-ups are withheld when it fails.
    """

    name: str
    ok: bool
    error: float | None
    bound: float | None
    note: str = ""
    gates: bool = True


@dataclass(slots=True)
class Results:
    """All that is in a file.

    Attributes:
        pending: the run that was started and not ended.
        ended: runs during which a process has ended once; they are tried once more.
    """

    sessions: list[Session] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    pending: Key | None = None
    ended: list[Key] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        """Exactness was checked, and nothing that gates failed."""
        gating = [check for check in self.checks if check.gates]
        return bool(gating) and all(check.ok for check in gating)

    def why_unverified(self) -> str:
        failed = [check.name for check in self.checks if check.gates and not check.ok]
        if not failed:
            return "exactness was not checked: run headinfer bench verify"
        return f"exactness checks failed: {'; '.join(failed)}"

    def done(self) -> set[Key]:
        """Runs that need not be repeated."""
        return {row.key for row in self.rows}

    def find(self, case: str, contestant: str, context: int, metric: str) -> Row | None:
        """The latest measured row of that name."""
        for row in reversed(self.rows):
            if row.key == (case, contestant, context) and row.metric == metric:
                return row if row.status == MEASURED else None
        return None

    def value(self, case: str, contestant: str, context: int, metric: str) -> float | None:
        row = self.find(case, contestant, context, metric)
        return None if row is None else row.median

    def rate(self, metric: str) -> float | None:
        """A measured rate of the machine, per second: bytes or FLOPs."""
        row = self.find("rates", "machine", 0, metric)
        factor = {"GB/s": 1e9, "TFLOP/s": 1e12}
        return None if row is None or row.median is None else row.median * factor[row.unit]

    def put(self, rows: Iterable[Row]) -> None:
        """Add the rows of a run in place of earlier ones of the same run."""
        rows = list(rows)
        new = {row.key for row in rows}
        self.rows = [row for row in self.rows if row.key not in new] + rows


def write(results: Results, path: Path) -> None:
    """`path` holds `results`, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, **asdict(results)}
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read(path: Path) -> Results:
    """The results in `path`.

    Raises:
        InputError: there is no such file, or it is not one of this schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; name a file written by headinfer bench"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); name a file of headinfer bench") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise InputError(
            f"{path} has schema {found!r} and this headinfer reads schema {SCHEMA}; name a file "
            "written by headinfer bench of this version"
        )
    try:
        pending = document["pending"]
        return Results(
            sessions=[_record(Session, each) for each in document["sessions"]],
            checks=[_record(Check, each) for each in document["checks"]],
            rows=[_row(each) for each in document["rows"]],
            pending=None if pending is None else _key(pending),
            ended=[_key(each) for each in document["ended"]],
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(f"{path} is not complete ({error}); measure again") from error


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two values around; `values` must not be empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


_Record = TypeVar("_Record", Row, Session, Check)


def _record(kind: type[_Record], given: Mapping[str, Any]) -> _Record:
    names = {each.name for each in fields(kind)}
    if unknown := sorted(set(given) - names):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}")
    return kind(**given)


def _key(given: Sequence[Any]) -> Key:
    case, contestant, context = given
    return str(case), str(contestant), int(context)


def _row(given: Mapping[str, Any]) -> Row:
    row = _record(Row, {**given, "values": tuple(given.get("values", ()))})
    if row.status not in STATES:
        raise ValueError(f"status {row.status!r} is none of {', '.join(STATES)}")
    return row
