"""Energy that a GPU has used, from its own counter (NVML; the extra jepa_fast[energy])."""

import torch


class EnergyCounter:
    """Joules of one device since the driver was loaded. `reason` says why there is no counter, where there is none."""

    def __init__(self, device: torch.device):
        self.reason, self._handle, self._nvml = "", None, None
        if device.type != "cuda":
            self.reason = "no GPU"
            return
        try:
            import pynvml
        except ImportError:
            self.reason = 'needs pip install "jepa_fast[energy]"'
            return
        try:
            pynvml.nvmlInit()
            # by identity: CUDA_VISIBLE_DEVICES renumbers
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def joules(self) -> float | None:
        """None where nothing is counted."""
        return None if self._nvml is None else self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
