"""Builds the two native parts, and nothing else.

`jepa_fast/_C.so`       csrc/bindings.cpp, csrc/cpu/*.cpp and, where there is nvcc, csrc/cuda/*.cu against PyTorch's
                        stable ABI: tensor ops, no Python ABI.
`jepa_fast/_masking`    csrc/masking/*.cpp with pybind11: mask samplers.

Both are optional: without a C++ compiler (or without torch at build time) the package installs and runs on plain
PyTorch. CUDA kernels are built for a CUDA build of PyTorch, or where JEPA_FAST_CUDA_ARCHS ("90a" or "80;90a") asks for
them. JEPA_FAST_REQUIRE_NATIVE=1 turns a failed build into an error.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
# every csrc/cpu file is compiled once per instruction set; the best one is chosen when the library is loaded
X86_CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c",
               "-mprefer-vector-width=512"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES = X86_CAPABILITIES if IS_X86 else {"default": []}


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("no C++ compiler found (looked for $CXX, g++, clang++, c++)")


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout)


class BuildNative(build_ext):
    def get_ext_filename(self, name: str) -> str:
        if name.rpartition(".")[2] == "_C":
            return os.path.join(*name.split(".")) + ".so"  # no Python version in the name, as there is none in the file
        return super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        try:
            out = pathlib.Path(self.get_ext_fullpath(ext.name))
            out.parent.mkdir(parents=True, exist_ok=True)
            tmp = pathlib.Path(self.build_temp)
            tmp.mkdir(parents=True, exist_ok=True)
            build = build_tensor_ops if ext.name == "jepa_fast._C" else build_masking
            build(compiler().split(), out, tmp)
        except Exception as error:
            if os.environ.get("JEPA_FAST_REQUIRE_NATIVE") == "1":
                raise
            print(f"jepa_fast: {ext.name} not built, plain PyTorch will be used: {error}", file=sys.stderr)

    def build_extensions(self) -> None:
        super().build_extensions()
        # what could not be built is not there to be copied or recorded
        self.extensions = [e for e in self.extensions if os.path.exists(self.get_ext_fullpath(e.name))]


def nvcc() -> str | None:
    """The CUDA compiler, where kernels for a GPU are wanted: a CUDA build of PyTorch, or architectures asked for."""
    import torch

    home = os.environ.get("CUDA_HOME")
    candidates = (home and f"{home}/bin/nvcc", os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    found = next((name for name in candidates if name and shutil.which(name)), None)
    return found if torch.version.cuda or os.environ.get("JEPA_FAST_CUDA_ARCHS") else None


def cuda_architectures(nvcc: str) -> list[str]:
    """JEPA_FAST_CUDA_ARCHS ("90a", "80;90a"), or all of the list below that this nvcc knows."""
    asked = os.environ.get("JEPA_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return asked or [arch for arch in ("80", "90a", "100a") if f"sm_{arch.rstrip('a')}" in known]


def cuda_commands(nvcc: str, cxx: list[str], tmp: pathlib.Path) -> dict[str, list[str]]:
    """object -> command, for each file of csrc/cuda."""
    import torch

    architectures = cuda_architectures(nvcc)
    newest = max((arch.rstrip("af") for arch in architectures), key=int)
    codes = [(arch, f"sm_{arch}") for arch in architectures] + [(newest, f"compute_{newest}")]  # the last is PTX
    flags = [STABLE_ABI, f"-I{pathlib.Path(torch.__file__).parent}/include", "-std=c++20", "-O3"]
    device = [nvcc, *flags, "-Xcompiler", "-fPIC,-fvisibility=hidden",
              *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes)]
    host = [*cxx, *flags, "-fPIC", "-fvisibility=hidden", f'-DJEPA_FAST_CUDA_ARCHITECTURES="{";".join(architectures)}"']
    sources = {path: command for pattern, command in (("*.cu", device), ("*.cpp", host))
               for path in sorted((ROOT / "csrc/cuda").glob(pattern))}
    return {str(tmp / f"{path.name}.o"): [*command, "-c", str(path), "-o", str(tmp / f"{path.name}.o")]
            for path, command in sources.items()}


def build_tensor_ops(cxx: list[str], out: pathlib.Path, tmp: pathlib.Path) -> None:
    import torch

    home = pathlib.Path(torch.__file__).parent
    # no contraction: products are fused into sums only where simd.h's fma() says so, never as the compiler likes
    flags = [STABLE_ABI, f"-I{home}/include", "-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden",
             "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fno-math-errno", "-ffp-contract=off"]
    # plain objects first: where an inline function exists in several objects, the linker keeps the first one
    units = [(ROOT / "csrc/bindings.cpp", "default", [])]
    for name, arch in CAPABILITIES.items():
        units += [(source, name, arch) for source in sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    commands, objects = [], []
    for source, capability, arch in units:
        objects.append(str(tmp / f"{source.stem}.{capability}.o"))
        define = f"-DCPU_CAPABILITY={capability}_isa"
        commands.append([*cxx, *flags, *arch, define, "-c", str(source), "-o", objects[-1]])
    libraries = [f"-L{home}/lib", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        cuda = nvcc()
        # first those that take longest
        compiling = {target: pool.submit(run, command)
                     for target, command in (cuda_commands(cuda, cxx, tmp) if cuda else {}).items()}
        list(pool.map(run, commands))
        try:
            for done in compiling.values():
                done.result()
            if cuda:  # nvcc links: it knows where the run time lies
                run([cuda, "-cudart", "static", "-shared", "-Xcompiler", "-fopenmp", "-o", str(out), *objects,
                     *compiling, *libraries])
                return
        except Exception as error:
            if os.environ.get("JEPA_FAST_REQUIRE_NATIVE") == "1":
                raise
            lines = str(error).splitlines()
            reason = next((line for line in lines[1:] if "error" in line), lines[0])
            print(f"jepa_fast: CUDA kernels not built, GPUs will use Triton or plain PyTorch: {reason}", file=sys.stderr)
    run([*cxx, "-shared", "-fopenmp", "-o", str(out), *objects, *libraries])


def build_masking(cxx: list[str], out: pathlib.Path, tmp: pathlib.Path) -> None:
    import sysconfig

    import pybind11

    sources = [str(path) for path in sorted((ROOT / "csrc/masking").glob("*.cpp"))]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    run([*cxx, "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-shared", *includes, *sources, "-o", str(out)])


setup(
    ext_modules=[Extension("jepa_fast._C", sources=[]), Extension("jepa_fast._masking", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
