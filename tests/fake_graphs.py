"""CUDA graphs on the CPU: the ops of a step are recorded with the very tensors and numbers that they were called with.

A replay runs them again on the same memory, as a CUDA graph does: what the host computed at capture stays as it was, and
what a step reads on the host is refused at capture.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# on a GPU these wait for the device, or copy from memory of the host that a replay would not find
HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::lift_fresh", "aten::lift"}


class HostRead(RuntimeError):
    pass


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.undo = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        if schema.name in HOST or (schema.name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            raise HostRead(f"{schema.name} in a captured step")
        written = [value for argument, value in zip(schema.arguments, args, strict=False)
                   if argument.alias_info is not None and argument.alias_info.is_write]
        unmarked = args[3:5] if schema.name == "aten::native_batch_norm" else ()  # its running mean and variance
        self.undo += [(t, t.clone()) for t in tensors([written, unmarked])]
        out = func(*args, **kwargs)
        returns = [value.alias_info for value in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        is_empty = "empty" in schema.name
        if not is_view and not is_empty:
            self.calls.append((func, args, kwargs, None if written else out))
        return out


class FakeGraphs:
    def __init__(self):
        self.num_ops = []

    def warm_up(self, function):
        return function()

    def capture(self, function):
        generator = torch.get_rng_state()
        with Record() as record:
            outputs = function()
        torch.set_rng_state(generator)
        for tensor, before in reversed(record.undo):  # a capture computes and draws nothing
            tensor.detach().copy_(before)
        self.num_ops.append(len(record.calls))

        @torch.no_grad()
        def replay():
            for func, args, kwargs, out in record.calls:
                new = func(*args, **kwargs)
                for old, value in zip(tensors(out), tensors(new) if out is not None else (), strict=True):
                    old.copy_(value)

        return replay, outputs
