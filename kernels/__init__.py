"""Triton kernels, one file per op. Import them as `jepa_fast.kernels`."""

if __name__ == "kernels":
    raise ImportError("the folder kernels/ is imported as jepa_fast.kernels")
