"""Runs csrc/cuda without a GPU: the same files, compiled as C++ against `include/`, as backend "cuda" of CPU tensors."""

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = [HERE / "emulator.cpp", HERE / "library.cpp", HERE / "self_test.cu",
           *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
HEADERS = [*sorted((HERE / "include").glob("*.h")), *sorted((ROOT / "csrc").glob("*.h")),
           *sorted((ROOT / "csrc/cuda").glob("*.cuh"))]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DJEPA_FAST_CUDA_LIBRARY=jepa_fast_cuda_host",
         "-DJEPA_FAST_CUDA_KEY=CPU"]


def compiler() -> str | None:
    """A C++ compiler for Linux, where the emulator can switch stacks."""
    return shutil.which(os.environ.get("CXX", "g++").split()[0]) if sys.platform == "linux" else None


def build() -> pathlib.Path:
    """The shared library, made anew where a source has changed; objects are kept, so only what changed is compiled."""
    out = ROOT / "build/cuda_host"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two pytest workers do not build twice
        common = hashlib.sha256(torch.__version__.encode() + " ".join(FLAGS).encode())
        for header in HEADERS:
            common.update(header.read_bytes())
        objects = [out / f"{source.stem}.{_digest(common, source)}.o" for source in SOURCES]
        library = out / f"cuda_host.{_digest(common, *SOURCES)}.so"
        if not library.exists():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(_compile, SOURCES, objects))
            home = pathlib.Path(torch.__file__).parent
            _run([compiler(), "-shared", "-o", f"{library}.tmp", *map(str, objects), f"-L{home}/lib",
                  "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"])
            os.replace(f"{library}.tmp", library)
            for old in set(out.glob("*.o")) | set(out.glob("*.so")):
                if old != library and old not in objects:
                    old.unlink()
    return library


def install() -> None:
    """Backend "cuda" takes CPU tensors from here on."""
    from jepa_fast.ops import _backends

    torch.ops.load_library(str(build()))
    _backends.emulate("cuda", torch.ops.jepa_fast_cuda_host)


def _digest(common, *sources: pathlib.Path) -> str:
    digest = common.copy()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source: pathlib.Path, target: pathlib.Path) -> None:
    if target.exists():
        return
    include = pathlib.Path(torch.__file__).parent / "include"
    _run([compiler(), *FLAGS, f"-I{HERE}/include", f"-I{ROOT}/csrc", f"-I{include}", "-x", "c++", "-c", str(source),
          "-o", f"{target}.tmp"])
    os.replace(f"{target}.tmp", target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
