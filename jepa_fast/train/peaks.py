"""What matrix units of known devices can do at most, for utilisation in percent."""

import torch

# dense TFLOP/s by name as the driver gives it, from the manufacturer's data sheets; the first name that fits counts
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "H200 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "H100 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "tf32": 495, "fp32": 67},
    "GH200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A30": {"bf16": 165, "tf32": 82, "fp32": 10.3},
    "A40": {"bf16": 150, "tf32": 75, "fp32": 37.4},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 4090": {"bf16": 165, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
}


def peak_of(device_name: str, precision: str) -> float | None:
    """FLOP/s at most in "bf16", "tf32" or "fp32"; None for a device that is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, peaks in PEAKS.items():
        parts = name.split()
        # "L4" is not "L40S", "NVIDIA H100 80GB HBM3" is "H100"
        if all(part in words for part in parts):
            return peaks[precision] * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s at most of a device in train.precision; None where no data sheet says: on CPUs, on unknown GPUs."""
    if device.type != "cuda":
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return peak_of(torch.cuda.get_device_name(device), precision)
