# SPDX-License-Identifier: Apache-2.0
"""What a run reports while it works, and how long it will still take.

Events are plain records handed to an `Observer`. `PrefillClock` turns them into a remaining time:
attention makes the time per token grow with the tokens already read, so a linear bar would lie.
The prediction comes from the cost model where the machine was measured; what the chunks really
took corrects it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ForwardStarted:
    """One forward pass of the model is enqueued from now on: `new_tokens` on top of `past_tokens`."""

    past_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class ForwardFinished:
    """One forward pass of a prompt has been computed; one of a single token, enqueued.

    `seconds` is host time since the matching `ForwardStarted`. On a GPU it comes while the next
    pass is being computed.
    """

    past_tokens: int
    new_tokens: int
    seconds: float


Event = ForwardStarted | ForwardFinished


class Observer(Protocol):
    """Receives events on the thread that runs the model; must return quickly and never raise."""

    def on_event(self, event: Event) -> None: ...


ChunkCost = Callable[[int, int], tuple[float, float]]
"""Predicted seconds of a chunk, from tokens before it and tokens in it: what it takes at the start
of a prompt, and what the tokens before it add. `headinfer.cost.chunk_cost` makes one."""

TOGETHER = 0.15
"""How far a prediction may be off as a whole, as far as the cost model is held to: a busy or throttled machine
is noticed all the same."""
BASE_APART, GROWTH_APART = 0.3, 0.12
"""How far each part may be off by itself: growth is one kernel, base everything else there is."""
NOISE = 0.03
"""Of a chunk's seconds, what comes and goes."""
FIRST_NOISE = 0.5
"""... of the first one, in which memory is allocated and kernels are loaded."""
SETTLING_NOISE = 0.1
"""... of others in the first `SETTLING_S` seconds: host memory is made, and threads compile what is needed
later."""
SETTLING_S = 1.5
TAILS = 4.0
"""Degrees of freedom of what comes and goes: a chunk that is far off all the others says little."""
FEW, LATELY = 2, 10
"""Chunks: too few to leave out the quickest, and the last ones, of which it is the quickest."""
ROUNDS = 6
MORE = 1.5
"""How much more than of a chunk as expected comes and goes of a slower one, at most."""
"""Of weighing chunks by how far off they are."""
FADING = 0.9
"""Weight of a chunk for every one after it: machines get warm, others come and go."""


def tokens_squared(past_tokens: int, new_tokens: int) -> tuple[float, float]:
    """A prefill of which nothing is known: linear, and growing with the keys each query sees."""
    return float(new_tokens), new_tokens * (past_tokens + new_tokens / 2)


@dataclass(slots=True)
class PrefillClock:
    """Remaining time of a prefill: predicted, and corrected by every chunk that was computed.

    A chunk is predicted to take `base + growth` seconds; it is found to take `a * base +
    b * growth`. `a` and `b` start at 1 and move as the chunks say, weighed against how far
    predictions are off in general (Bayesian linear regression with a correlated Gaussian prior).
    Early on, when chunks differ little, the prior tells the two apart; later
    each finds its own value, and older chunks fade.

    Attributes:
        total_tokens: prompt length.
        cost: predicts a chunk; without one both factors come from least squares alone, and none
            of them below 0.
        measured: `cost` is in seconds of this machine; otherwise only its shape is used.
        chunk_tokens: tokens per chunk still to come; 0 takes those of the last one.
    """

    total_tokens: int
    cost: ChunkCost | None = None
    measured: bool = False
    chunk_tokens: int = 0
    _done: int = 0
    _begun: int = 0
    _seconds: float = 0.0
    _rows: list[tuple[float, float, float]] = field(default_factory=list)

    def resume(self, done_tokens: int) -> None:
        """The first `done_tokens` were there already and took no time."""
        self._done = self._begun = done_tokens

    def observe(self, done_tokens: int, seconds: float) -> None:
        """Record that `done_tokens` in all were finished `seconds` after the start."""
        new = done_tokens - self._done
        if new <= 0:
            return
        base, growth = self._cost(self._done, new)
        self._rows.append((base, growth, max(seconds - self._seconds, 0.0)))
        self.chunk_tokens = max(self.chunk_tokens, new)
        self._done, self._seconds = done_tokens, seconds

    @property
    def done_tokens(self) -> int:
        return self._done

    def eta_s(self) -> float | None:
        """Seconds still to go; None before the first chunk of a machine that was not measured."""
        left = self.total_tokens - self._done
        if left <= 0:
            return 0.0
        if not self._rows and not (self.measured and self.chunk_tokens):
            return None
        base_factor, growth_factor = self._factors()
        base = growth = 0.0
        for past in range(self._done, self.total_tokens, self.chunk_tokens):
            parts = self._cost(past, min(self.chunk_tokens, self.total_tokens - past))
            base, growth = base + parts[0], growth + parts[1]
        return base_factor * base + growth_factor * growth

    def fraction(self) -> float:
        """Share of the predicted time that has passed, between 0 and 1."""
        eta = self.eta_s()
        if eta is None:
            return 0.0
        whole = self._seconds + eta
        return 1.0 if whole <= 0 else min(self._seconds / whole, 1.0)

    @property
    def _cost(self) -> ChunkCost:
        return self.cost or tokens_squared

    def _factors(self) -> tuple[float, float]:
        """What predictions are multiplied by: the posterior mean of (a, b)."""
        if self.cost is None:
            return self._least_squares()
        scale = 1.0 if self.measured else self._scale()
        if scale <= 0:
            return 0.0, 0.0
        rows = [
            (base * scale, growth * scale, max(seconds, 1e-9))
            for base, growth, seconds in self._rows
        ]
        noise = [NOISE] * len(rows)
        if len(rows) > 1 and self._begun == 0:
            passed = accumulate(seconds for _, _, seconds in rows)
            noise = [SETTLING_NOISE if since <= SETTLING_S else NOISE for since in passed]
            noise[0] = FIRST_NOISE
        most = _most(rows, begins=self._begun == 0)
        weights, trust = [1.0] * len(rows), 1.0
        for _ in range(ROUNDS):
            a, b = _posterior(rows, noise, weights, most, trust)
            # A machine that is far off altogether is believed, rather than every chunk doubted.
            together = min(a - 1, b - 1, key=abs) / TOGETHER
            trust = 1 / (1 + together * together / TAILS)
            off = [
                (seconds - a * base - b * growth) / (scatter * max(a * base + b * growth, 1e-9))
                for (base, growth, seconds), scatter in zip(rows, noise, strict=True)
            ]
            weights = [1 / (1 + _apart(off, place) ** 2 / TAILS) for place in range(len(rows))]
        return a * scale, b * scale

    def _scale(self) -> float:
        """Seconds per unit of a prediction that is a shape only; later chunks say it better."""
        rows = self._rows[1:] or self._rows
        predicted = sum(base + growth for base, growth, _ in rows)
        return sum(seconds for _, _, seconds in rows) / max(predicted, 1e-12)

    def _least_squares(self) -> tuple[float, float]:
        nn = sum(n * n for n, _, _ in self._rows)
        nw = sum(n * w for n, w, _ in self._rows)
        ww = sum(w * w for _, w, _ in self._rows)
        ns = sum(n * s for n, _, s in self._rows)
        ws = sum(w * s for _, w, s in self._rows)
        det = nn * ww - nw * nw
        # One chunk, or chunks of identical work, cannot tell the two terms apart.
        if len(self._rows) > 1 and det > 1e-9 * nn * ww:
            linear, quadratic = (ns * ww - ws * nw) / det, (nn * ws - nw * ns) / det
            if linear >= 0 and quadratic >= 0:
                return linear, quadratic
            if linear < 0:
                return 0.0, max(ws / ww, 0.0)
        return ns / nn, 0.0


def _apart(off: Sequence[float], place: int) -> float:
    """How far a chunk is off what it and two beside it are off in the middle: what lasts is not held
    against any of them."""
    first = max(min(place - 1, len(off) - 3), 0)
    near = sorted(off[first : first + 3])
    return off[place] - (near[1] if len(near) == 3 else 0.0)


def _most(rows: Sequence[tuple[float, float, float]], *, begins: bool) -> float | None:
    """What a cannot be above, as no chunk takes less than its base, whatever held up the others. The
    quickest of many may have been reported late, so that is the second quickest of the last ones; early
    on a first chunk, which takes longer than others, is all there is."""
    if begins and len(rows) > FEW:
        rows = rows[1:]
    quotients = sorted(seconds / base for base, _, seconds in rows[-LATELY:] if base)
    if not quotients:
        return None
    return (1 + 2 * NOISE) * quotients[1 if len(quotients) > FEW else 0]


def _posterior(
    rows: Sequence[tuple[float, float, float]],
    noise: Sequence[float],
    weights: Sequence[float],
    most: float | None,
    trust: float,
) -> tuple[float, float]:
    """The posterior mean of (a, b) given rows of base, growth, seconds; `a` at most `most`, neither
    below 0. What predictions are off as a whole has a variance of TOGETHER^2 / `trust`."""
    # The inverse of the prior's covariance [[t + u, t], [t, t + w]].
    t, u, w = TOGETHER**2 / trust, BASE_APART**2, GROWTH_APART**2
    det = (t + u) * (t + w) - t * t
    aa, ab, bb = (t + w) / det, -t / det, (t + u) / det
    pull_a, pull_b = aa + ab, ab + bb
    for age, place in enumerate(range(len(rows) - 1, -1, -1)):
        base, growth, seconds = rows[place]
        weight = weights[place] * FADING**age
        expected = max(base + growth, 1e-9)
        # Of slower chunks more, but not as much more as they are slower: all may be from now on.
        weight /= (noise[place] * min(max(seconds, expected), MORE * expected)) ** 2
        aa, ab, bb = (
            aa + weight * base * base,
            ab + weight * base * growth,
            bb + weight * growth * growth,
        )
        pull_a += weight * base * seconds
        pull_b += weight * growth * seconds
    det = aa * bb - ab * ab
    a = (pull_a * bb - pull_b * ab) / det
    a = max(a if most is None else min(a, most), 0.0)
    b = (pull_b - ab * a) / bb
    if b >= 0:
        return a, b
    a = max(pull_a / aa, 0.0)
    return a if most is None else min(a, most), 0.0


def eta_errors(
    clock: PrefillClock, chunk_seconds: Sequence[float], chunk_tokens: int
) -> list[tuple[float, float]]:
    """After each chunk but the last: the share of the tokens that was read, and how far the
    remaining time that `clock` named was off, as a share of the true one.

    `clock` is new, and `chunk_seconds` are what the chunks of its prompt took.
    """
    whole, passed = sum(chunk_seconds), 0.0
    found = []
    for index, seconds in enumerate(chunk_seconds[:-1]):
        passed += seconds
        done = (index + 1) * chunk_tokens
        clock.observe(done, passed)
        left = whole - passed
        found.append((done / clock.total_tokens, (clock.eta_s() or 0.0) / left - 1))
    return found
