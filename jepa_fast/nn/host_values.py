"""Numbers that live in a module's buffers, known on the host without waiting for the device in every step."""

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # buffer -> (its version, what it holds)


def host_value(buffer: Tensor):
    """buffer.tolist(), read from the device only where somebody has written to it since: load_state_dict, copy_, add_.

    Writes through `.data` are not seen; a module that is moved or given another buffer is, as that is another tensor.
    """
    if buffer.is_inference():  # has no version
        return buffer.tolist()
    known = _KNOWN.get(buffer)
    if known is None or known[0] != buffer._version:
        known = _KNOWN[buffer] = (buffer._version, buffer.tolist())
    return known[1]


def count_up_(buffer: Tensor) -> int:
    """Add 1 to a 0-dim int64 buffer; the number before, read on the host as `host_value` does."""
    before = host_value(buffer)
    buffer.add_(1)
    if not buffer.is_inference():
        _KNOWN[buffer] = (buffer._version, before + 1)
    return before
