# SPDX-License-Identifier: Apache-2.0
"""Kills processes that read, save and append to contexts, at random moments, and checks what is left.

    python -m headinfer.testing.kills --kills 200 --seed 1

Children are forked from a process that has loaded a tiny model and done nothing else. Half of them
are killed after a random time, half by themselves in front of, or in the middle of, a random write,
sync, rename or removal. After every kill the context has to open, to be sound, to hold at least what
was durable before, and in the end to equal, bit for bit, one that nobody disturbed.
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
from headinfer.snapshot import Context, durable, exists
from headinfer.testing.zoo import ZOO

TOKENS, MORE = 420, 60
CHUNK = 32
OPERATIONS = ("read", "read", "save", "append")
MODELS = ("llama", "gemma2")
ACTIONS = ("write_at", "sync", "sync_folder", "replace", "remove")


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: processes killed; `ended`: processes that were done first.
        in_writes: of the kills, those in the middle of writing.
        lost, wrong: contexts that did not open or lost durable tokens; that held other bits.
    """

    kills: int = 0
    ended: int = 0
    in_writes: int = 0
    completed: int = 0
    lost: int = 0
    wrong: int = 0
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
        self.undisturbed = self._answer(self._undisturbed)
        self.seconds = float(self.undisturbed["seconds"])
        self.actions = int(self.undisturbed["actions"])

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
        started = time.perf_counter()
        found = self._read()
        seconds, actions = time.perf_counter() - started, count[0]
        more = self._append()
        return {
            str(TOKENS): found["digest"],
            str(TOKENS + MORE): more["digest"],
            "seconds": seconds,
            "actions": actions,
        }

    def _read(self) -> dict[str, Any]:
        with headinfer.attach(self.model, chunk_tokens=CHUNK, expected_tokens=TOKENS + MORE):
            ids = self.ids[:, :TOKENS]
            cache = headinfer.read_context(self.model, ids, self.folder, checkpoint_every=CHUNK)
            return _digest(self.model, cache)

    def _save(self) -> dict[str, Any]:
        with headinfer.attach(self.model, chunk_tokens=CHUNK, expected_tokens=TOKENS + MORE) as run:
            cache = run.new_cache()
            headinfer.prefill(self.model, self.ids[:, :TOKENS], cache)
            run.save(self.folder)
            return _digest(self.model, cache)

    def _append(self) -> dict[str, Any]:
        with headinfer.attach(self.model, chunk_tokens=CHUNK, expected_tokens=TOKENS + MORE):
            cache = headinfer.load_context(self.model, self.folder, append=True)
            headinfer.prefill(self.model, self.ids[:, TOKENS:], cache)
            headinfer.save_context(self.model, cache, self.folder)
            return _digest(self.model, cache)

    def _load(self) -> dict[str, Any]:
        with headinfer.attach(self.model, chunk_tokens=CHUNK, expected_tokens=TOKENS + MORE):
            return _digest(self.model, headinfer.load_context(self.model, self.folder))

    # Processes.

    def _disturb(self, work: Callable[[], Any]) -> None:
        """Do `work` in a child and kill it."""
        by_itself = self.random.random() < 0.5
        action, share = self.random.randrange(self.actions), self.random.random()
        child = os.fork()
        if not child:
            if by_itself:
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
        logits = model(torch.tensor([[7]]), past_key_values=cache).logits
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
    return 1 if total["lost"] or total["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
