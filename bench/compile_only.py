"""Compile Triton kernels for GPUs that are not here: the real launchers run on CPU tensors, nothing is launched.

Not in a process that interprets (TRITON_INTERPRET=1).
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # come with triton
SHARED_KIB = {80: 163, 90: 227, 100: 227}                     # the most that one block may have
REGISTERS = 65536                                             # of a multiprocessor
TENSOR_MEMORY = 512                                           # columns of a multiprocessor, sm_100
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "IMMA")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    arch: int
    registers: int           # per thread
    spill_bytes: int         # per thread
    shared_bytes: int        # per block
    tensor_memory: int       # columns per block, sm_100
    num_warps: int
    num_stages: int
    tensor_core: int         # instructions in the disassembly
    wants_tensor_core: bool  # it has a product of half-precision tiles
    is_exact: bool           # all its products are of float32 tiles, to be rounded as float32

    def problems(self) -> list[str]:
        """Why this must not ship; empty where it may."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_KIB[self.arch] * 1024:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, sm_{self.arch} has {SHARED_KIB[self.arch]} KiB")
        if self.registers * 32 * self.num_warps > REGISTERS:
            found.append(f"needs {self.registers * 32 * self.num_warps} registers per block, there are {REGISTERS}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"needs {self.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY}")
        if self.wants_tensor_core and not self.tensor_core:
            found.append("multiplies half precision without tensor cores")
        if self.is_exact and self.tensor_core:
            found.append("multiplies float32 on tensor cores, which round it to tf32")
        return found


class _NoDevice(DriverBase):
    """A driver that knows for which GPU to compile and has none."""

    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self):
        import torch
        return torch.device("cpu")

    def get_benchmarker(self):
        return lambda call, quantiles=None, **kwargs: (call(), [0.0] * 3)[1]  # autotune: every configuration once

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache) -> None:
        pass


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[dict]:
    """Within the block kernels are compiled for sm_<arch>; yields {hash: (name, compiled kernel)}, one per variant."""
    compiled: dict = {}
    run = JITFunction.run
    seen: set[int] = set()

    def compile_instead(self, *args, grid, warmup, **kwargs):
        if id(self) not in seen:  # what was compiled for another target is of no use here
            self.device_caches.clear()
            seen.add(id(self))
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.metadata.hash] = (self.__name__, kernel)
        return kernel

    JITFunction.run = compile_instead
    driver.set_active(_NoDevice(GPUTarget("cuda", arch, 32)))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None  # reset_active() would look for a GPU


def resources(name: str, kernel, arch: int) -> Resources:
    """Registers, spills, shared memory and tensor-core instructions of a compiled kernel."""
    products = re.findall(r"tt\.dot .*", kernel.asm["ttir"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
        sass = _run(TOOLS / "nvdisasm", "-c", file.name) if products else ""
    registers, stack = (int(re.search(key + r":(\d+)", usage).group(1)) for key in ("REG", "STACK"))
    return Resources(
        kernel=name, arch=arch, registers=registers, spill_bytes=_spill_bytes(kernel, arch) if stack else 0,
        shared_bytes=kernel.metadata.shared, tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        num_warps=kernel.metadata.num_warps, num_stages=kernel.metadata.num_stages,
        tensor_core=sum(len(re.findall(rf"\b{name}\b", sass)) for name in TENSOR_CORE),
        wants_tensor_core=any(re.search(r"(?:bf16|f16)> \*", line) for line in products),
        is_exact=bool(products) and all(re.search(r"f32> \*", line) and "tf32" not in line for line in products))


def _spill_bytes(kernel, arch: int) -> int:
    """A stack frame is not always a spill (tl.sin keeps a small table there): ptxas knows."""
    ptxas = TOOLS / ("ptxas-blackwell" if arch >= 100 and (TOOLS / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        said = _run(ptxas, "-v", f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", "-o", "/dev/null", file.name)
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


def _run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[:500]}")
    return done.stdout + done.stderr
