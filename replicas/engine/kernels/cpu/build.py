"""Compiles the C++ kernels once and keeps the library, under a name that changes with whatever went into it.

    python -m replicas.engine.kernels.cpu.build        compile now, so that the first start need not

Every instruction set is compiled from one source into one library; which one runs is decided when it is opened. Needs a
C++20 compiler and nothing else: no headers of Python's or PyTorch's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
_X86_SETS = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
}


class KernelsUnavailable(ValueError):
    """The library cannot be built or used here; the message says why."""


def library_path(on_compile: Callable[[], None] = lambda: None) -> Path:
    """The compiled library; if it is not there yet, it is compiled after a call of `on_compile`.

    Raises KernelsUnavailable."""
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelsUnavailable("there is no C++ compiler; install g++ (Debian: apt-get install g++)")
    path = _cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        on_compile()
        started = time.perf_counter()
        _compile(compiler, path)
        logger.info("compiled the CPU kernels in %.0f s: %s", time.perf_counter() - started, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sets = {"portable": (), **(_X86_SETS if is_x86 else {})}
    shared = (*_FLAGS, *(("-DMILLRACE_X86",) if is_x86 else ()))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = {f"{name}.o": ("kernels.cpp", f"-DMILLRACE_ISA={name}", *flags) for name, flags in sets.items()}
        objects |= {"pool.o": ("pool.cpp",), "program.o": ("program.cpp",)}
        commands = [
            [compiler, *shared, *flags, "-c", str(SOURCES / source), "-o", f"{folder}/{name}"]
            for name, (source, *flags) in objects.items()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, commands))
        library = f"{folder}/kernels.so"
        _run([compiler, "-shared", "-pthread", *(f"{folder}/{name}" for name in objects), "-o", library])
        os.replace(library, path)  # in one step: other replicas may be doing the same


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise KernelsUnavailable(f"{Path(command[0]).name} cannot compile the CPU kernels: {reason}")


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(f"{version}{_FLAGS}{_X86_SETS}{platform.machine()}".encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    """Ours alone: what lies in it is loaded as code."""
    try:
        folder = Path.home() / ".cache" / "millrace"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except (OSError, RuntimeError):  # no home, or none that can be written
        pass
    return Path(tempfile.mkdtemp(prefix="millrace-"))


if __name__ == "__main__":
    try:
        library_path(lambda: print("compiling the CPU kernels, once (about 10 s) ...", flush=True))
    except KernelsUnavailable as unavailable:
        print(f"{unavailable}; until then plain torch does the work, several times slower", flush=True)
