"""What `jepa-fast info` prints: devices, versions, and which code each op would run here, and why."""

import importlib.metadata
import platform

import torch

from . import ops

PACKAGES = ("jepa_fast", "torch", "triton", "flash-attn", "xformers", "numpy")


def versions() -> dict[str, str]:
    """Version of each package that matters, or "not installed"."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """One line per device."""
    cpu = f"cpu: {cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return [cpu, *(f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(show_all: bool = False) -> str:
    lines = ["devices", *(f"  {line}" for line in devices()), "versions",
             "  " + "  ".join(f"{name} {version}" for name, version in versions().items())]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() or show_all else [])]:
        lines.append(f"ops on {device}  (order: {', '.join(ops.ORDER[device])})")
        for name, chosen, others in ops.info(device):
            lines.append(f"  {name:28s} {chosen}")
            if show_all:
                lines += [f"    {'not ' + backend:26s} {reason}" for backend, reason in others.items()]
    if ops.COMPILED_MISSING:
        lines.append(f"C++ kernels: {ops.COMPILED_MISSING}")
    return "\n".join(lines)
