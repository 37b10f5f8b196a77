"""What a host would wait for a device for, seen as operations on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Inside, `found` lists them."""

    KINDS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.KINDS or (name == "index" and any(getattr(x, "dtype", None) == torch.bool for x in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
