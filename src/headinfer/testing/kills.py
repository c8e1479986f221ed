# SPDX-License-Identifier: Apache-2.0
"""Kills processes that read, save and append to contexts, or read with keys and values on disk, at
random moments, and checks what is left.

    python -m headinfer.testing.kills --kills 200 --seed 1

Children are forked from a process that has loaded a tiny model and done nothing else. Half of them
are killed after a random time, half by themselves in front of, or in the middle of, a random write,
sync, rename or removal. After every kill the context has to open, to be sound, to hold at least what
was durable before, and in the end to equal, bit for bit, one that nobody disturbed. What the disk
took for host memory has to be gone with its process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import headinfer
from headinfer.errors import HeadInferError
from headinfer.hf.cache_name import cache_argument
from headinfer.snapshot import Context, durable, exists
from headinfer.testing.zoo import ZOO
from headinfer.tiers import DiskTier

TOKENS, MORE = 420, 60
CHUNK = 32
OPERATIONS = ("read", "read", "save", "append", "spill", "spill")
MODELS = ("llama", "gemma2")
ACTIONS = ("write_at", "sync", "sync_folder", "replace", "remove")


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: processes killed; `ended`: processes that were done first.
        in_writes: of the kills, those in the middle of writing.
        in_spills: of the kills, those of processes with keys and values on disk.
        lost, wrong: contexts that did not open or lost durable tokens; that held other bits.
        left: files that a killed process left on the disk.
    """

    kills: int = 0
    in_spills: int = 0
    ended: int = 0
    in_writes: int = 0
    completed: int = 0
    lost: int = 0
    wrong: int = 0
    left: int = 0
    problems: list[str] = field(default_factory=list)


class Campaign:
    """One model, one seed."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.model = ZOO[name].build()
        self.folder = folder / name
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, 99, (1, TOKENS + MORE), generator=generator)
        self.tally = Tally()
        self.disk = folder / f"{name}-disk"
        self.disk.mkdir()
        self.placement: dict[str, Any] = {}
        self.undisturbed = self._answer(self._undisturbed)
        self.seconds = float(self.undisturbed["seconds"])
        self.actions = int(self.undisturbed["actions"])
        self._remove()
        self.expected = {"": self.undisturbed, "spill": self._spilling(self._undisturbed)}
        self.spills = int(self.expected["spill"]["spills"])

    def run(self, kills: int) -> Tally:
        """Kill `kills` processes."""
        while self.tally.kills < kills:
            operation = self.random.choice(OPERATIONS)
            self._remove()
            if operation == "append" and self._answer(self._read) is None:
                raise RuntimeError("reading failed though nobody disturbed it")
            getattr(self, f"_try_{operation}")()
        return self.tally

    def _try_read(self) -> None:
        """Killed up to three times on the way, then left alone."""
        durable_tokens = 0
        for _ in range(3):
            self._disturb(self._read)
            durable_tokens = self._check(durable_tokens)
        self._compare(self._answer(self._read), TOKENS)

    def _try_spill(self) -> None:
        """As `_try_read`, all keys and values on disk but for a head of each layer."""
        before = self.tally.kills
        self.undisturbed = self.expected["spill"]
        self._spilling(self._try_read, here=True)
        self.undisturbed = self.expected[""]
        self.tally.in_spills += self.tally.kills - before

    def _spilling(self, work: Callable[[], Any], *, here: bool = False) -> Any:
        """Do `work` with a disk, in a child or `here`; nothing may be left there."""
        self.placement = {"disk": str(self.disk), "resident_heads": 1, "tile_bytes": 2**13}
        try:
            return work() if here else self._answer(work)
        finally:
            self.placement = {}
            for found in self.disk.iterdir():
                self._problem("left", f"{found.name} is left on the disk")
                found.unlink()

    def _try_save(self) -> None:
        self._disturb(self._save)
        if self._check(0):
            self._compare(self._answer(self._load), TOKENS)

    def _try_append(self) -> None:
        self._disturb(self._append)
        held = self._check(TOKENS)
        if held not in (TOKENS, TOKENS + MORE):
            self._problem("lost", f"{held} tokens after an interrupted append")
        self._compare(self._answer(self._load), held)
        if held == TOKENS:
            self._compare(self._answer(self._append), TOKENS + MORE)

    def _check(self, before: int) -> int:
        """Tokens that are durable now; at least `before`."""
        if not exists(self.folder):
            if before:
                self._problem("lost", "the manifest is gone")
            return 0
        try:
            context = Context(self.folder)
            for _ in context.check_all():
                pass
        except HeadInferError as error:
            self._problem("lost", str(error))
            return 0
        tokens = context.manifest.tokens
        if tokens < before:
            self._problem("lost", f"{tokens} tokens left of {before}")
        return tokens

    def _compare(self, found: dict[str, Any] | None, tokens: int) -> None:
        if found is None:
            self._problem("lost", "an undisturbed process failed on what was left")
            return
        self.tally.completed += 1
        if found["digest"] != self.undisturbed[str(tokens)] or found["tokens"] != tokens:
            self._problem("wrong", f"{found['tokens']} of {tokens} tokens with other bits")

    def _problem(self, kind: str, text: str) -> None:
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        self.tally.problems.append(text)

    # What children do.

    def _undisturbed(self) -> dict[str, Any]:
        count = [0]
        _before_each(lambda name, data: count.__setitem__(0, count[0] + 1))
        spills, begin = [0], DiskTier.begin_write

        def look(tier: DiskTier, job: int, ops: Any) -> None:
            spills[0] += 1
            begin(tier, job, ops)

        setattr(DiskTier, "begin_write", look)  # noqa: B010
        started = time.perf_counter()
        found = self._read()
        seconds, actions = time.perf_counter() - started, count[0]
        writes = spills[0]
        more = self._append()
        return {
            str(TOKENS): found["digest"],
            str(TOKENS + MORE): more["digest"],
            "seconds": seconds,
            "actions": actions,
            "spills": writes,
        }

    def _attached(self) -> headinfer.Session:
        return headinfer.attach(
            self.model, chunk_tokens=CHUNK, expected_tokens=TOKENS + MORE, **self.placement
        )

    def _read(self) -> dict[str, Any]:
        with self._attached():
            ids = self.ids[:, :TOKENS]
            cache = headinfer.read_context(self.model, ids, self.folder, checkpoint_every=CHUNK)
            return _digest(self.model, cache)

    def _save(self) -> dict[str, Any]:
        with self._attached() as run:
            cache = run.new_cache()
            headinfer.prefill(self.model, self.ids[:, :TOKENS], cache)
            run.save(self.folder)
            return _digest(self.model, cache)

    def _append(self) -> dict[str, Any]:
        with self._attached():
            cache = headinfer.load_context(self.model, self.folder, append=True)
            headinfer.prefill(self.model, self.ids[:, TOKENS:], cache)
            headinfer.save_context(self.model, cache, self.folder)
            return _digest(self.model, cache)

    def _load(self) -> dict[str, Any]:
        with self._attached():
            return _digest(self.model, headinfer.load_context(self.model, self.folder))

    # Processes.

    def _disturb(self, work: Callable[[], Any]) -> None:
        """Do `work` in a child and kill it."""
        by_itself = self.random.random() < 0.5
        action, share = self.random.randrange(self.actions), self.random.random()
        child = os.fork()
        if not child:
            if by_itself:
                if self.placement and action % 2:
                    _kill_in_spill(action * self.spills // self.actions)
                else:
                    _kill_at(action, share)
            _leave(work)
        if not by_itself:
            time.sleep(self.random.uniform(0.0, 1.2 * self.seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        self.tally.kills += killed
        self.tally.in_writes += killed and by_itself
        self.tally.ended += not killed

    def _answer(self, work: Callable[[], dict[str, Any]]) -> Any:
        """What an undisturbed child says; None if it failed."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)

            def tell() -> None:
                with os.fdopen(writing, "w") as pipe:
                    json.dump(work(), pipe)

            _leave(tell)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        return json.loads(text) if status == 0 else None

    def _remove(self) -> None:
        for item in self.folder.iterdir() if self.folder.exists() else ():
            item.unlink()


def _leave(work: Callable[[], Any]) -> None:
    """Do `work` and end this process, without what the parent would do at its end."""
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def _before_each(call: Callable[[str, Any], None]) -> None:
    """`call` runs before every durable action of this process."""
    for name in ACTIONS:
        real = getattr(durable, name)

        def wrapped(*args: Any, _real: Any = real, _name: str = name) -> Any:
            call(_name, args)
            return _real(*args)

        setattr(durable, name, wrapped)


def _kill_at(action: int, share: float) -> None:
    """This process dies in front of its durable action number `action`; of a write, a share is
    done."""
    left, write_at = [action], durable.write_at

    def look(name: str, args: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            return
        if name == "write_at":
            descriptor, data, offset, path = args
            part = memoryview(data).cast("B")
            write_at(descriptor, part[: int(len(part) * share)], offset, path)
        os.kill(os.getpid(), signal.SIGKILL)

    _before_each(look)


def _kill_in_spill(write: int) -> None:
    """This process dies when it has begun write number `write` to the disk."""
    left, begin = [write], DiskTier.begin_write

    def look(tier: DiskTier, job: int, ops: Any) -> None:
        begin(tier, job, ops)
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(DiskTier, "begin_write", look)  # noqa: B010


def _digest(model: Any, cache: Any) -> dict[str, Any]:
    """SHA-256 over all bits the cache holds, and over the logits of one more token."""
    found, tokens = hashlib.sha256(), cache.get_seq_length()
    for layer in cache.layers:
        gather = getattr(layer, "gather", None)
        for values in (False, True):
            part: Any = layer.values if values else layer.keys
            if gather is not None:
                part = gather(tokens, values=values)
            found.update(part.contiguous().numpy().tobytes())
    found.update(cache.token_ids.numpy().tobytes())
    with torch.no_grad():
        logits = model(torch.tensor([[7]]), **cache_argument(model, cache)).logits
    found.update(logits.numpy().tobytes())
    return {"digest": found.hexdigest(), "tokens": tokens}


def main() -> int:
    """Print the tally; 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads: children are forked
    started = time.perf_counter()
    total: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(MODELS):
            share = given.kills // len(MODELS) + (place < given.kills % len(MODELS))
            tally = Campaign(name, given.seed + place, Path(folder)).run(share)
            for key, value in asdict(tally).items():
                total[key] = total.get(key, type(value)()) + value
    total["seconds"] = round(time.perf_counter() - started, 1)
    total["seed"] = given.seed
    print(json.dumps(total, indent=1))  # noqa: T201  what the command is for
    return 1 if total["lost"] or total["wrong"] or total["left"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
