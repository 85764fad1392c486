"""bfloat16 as a GPU computes it: the stock interpreter does integer arithmetic on its bits and truncates casts.

Every operation on bfloat16 values widens them to float32 and rounds the result to nearest even.
"""

import numpy
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def widen(bits) -> numpy.ndarray:
    return (numpy.asarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def narrow(values) -> numpy.ndarray:
    values = numpy.ascontiguousarray(values, dtype=numpy.float32)
    bits = values.view(numpy.uint32).astype(numpy.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(values), numpy.uint16(0x7FC0), rounded)


def _is_bfloat16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(value):
    return TensorHandle(widen(value.data), tl.float32) if _is_bfloat16(value) else value


# conversions are replaced below; fabs is right on the bits
_NOT_ARITHMETIC = {"create_fabs", "create_fp_to_fp", "create_fp_ext", "create_fp_trunc", "create_fp_to_si",
                   "create_fp_to_ui"}
_ARITHMETIC = ("create_f", "create_precise_", "create_min", "create_max", "create_cos", "create_sin", "create_exp",
               "create_log", "create_sqrt", "create_rsqrt", "create_erf", "create_floor", "create_ceil",
               "create_clampf")


def install() -> None:
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_bfloat16_is_right", False):
        return
    builder._bfloat16_is_right = True
    for name in dir(builder):
        if name.startswith(_ARITHMETIC) and name not in _NOT_ARITHMETIC and callable(getattr(builder, name)):
            setattr(builder, name, _in_float32(getattr(builder, name)))
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest, **kwargs: dot(self, _widened(a), _widened(b), *rest, **kwargs)
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _rounding_cast(getattr(builder, name)))
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext",
                 "create_fp_trunc"):
        setattr(builder, name, lambda self, value, dtype: self.cast_impl(value, dtype))
    builder.get_bf16 = lambda self, value: TensorHandle(narrow(numpy.array([value], numpy.float32)), tl.bfloat16)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _reduced_in_float32(operation.apply_impl)


def _in_float32(operation):
    def wrapped(self, *args, **kwargs):
        if not any(_is_bfloat16(arg) for arg in args):
            return operation(self, *args, **kwargs)
        result = operation(self, *(_widened(arg) for arg in args), **kwargs)
        return result if result.data.dtype == numpy.bool_ else TensorHandle(narrow(result.data), tl.bfloat16)
    return wrapped


def _rounding_cast(cast):
    def wrapped(self, value, dtype, *args, **kwargs):
        source, target = value.dtype.scalar, dtype.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = TensorHandle(widen(value.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, dtype, *args, **kwargs)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(narrow(value.data.astype(numpy.float32)), tl.bfloat16)
        return cast(self, value, dtype, *args, **kwargs)
    return wrapped


def _reduced_in_float32(apply):
    def wrapped(self, tensors):
        is_narrow = [t.dtype == tl.bfloat16 for t in tensors]
        if not any(is_narrow):
            return apply(self, tensors)
        wide = tuple(
            tl.core.tensor(_widened(t.handle), tl.block_type(tl.float32, list(t.handle.data.shape))) if narrow_ else t
            for t, narrow_ in zip(tensors, is_narrow, strict=True))
        results = apply(self, wide)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(self.to_tensor(narrow(t.handle.data) if t.handle.data.shape != (1,) else narrow(t.handle.data)[0],
                                    tl.bfloat16) if t.dtype == tl.float32 else t for t in results)
    return wrapped
