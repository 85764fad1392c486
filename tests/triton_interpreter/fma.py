"""A fused multiply-add that rounds once, as a GPU's: the stock interpreter rounds the product first."""

import numpy
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def install() -> None:
    def fma(self, x, y, z):
        exact = x.data.astype(numpy.float64) * y.data + z.data  # the product of two float32 is exact in float64
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma
