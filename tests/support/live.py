"""How many bytes of tensors are alive at once."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.holders, self.sizes, self.peak = {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)} - set(self.sizes)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (at := x.untyped_storage().data_ptr()) not in given:
                self.holders[at] = self.holders.get(at, 0) + 1
                self.sizes[at] = x.untyped_storage().nbytes()
                weakref.finalize(x, self.drop, at)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def drop(self, at):
        self.holders[at] -= 1
        if not self.holders[at]:
            del self.holders[at], self.sizes[at]
