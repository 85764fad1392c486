"""What Triton's interpreter lacks to prove kernels on CPU tensors: right bfloat16 and fma, speed, and a memory checker.

Import after TRITON_INTERPRET=1 is set and before a kernel runs. For triton 3.6 to 3.9.
"""

from .bfloat16 import install as _install_bfloat16
from .fma import install as _install_fma
from .memory import check_memory
from .speed import install as _install_speed

__all__ = ["check_memory", "install"]


def install() -> None:
    _install_fma()
    _install_bfloat16()
    _install_speed()
