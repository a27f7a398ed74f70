"""Counts the living tensors of given sizes while operators run."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveTensors(TorchDispatchMode):
    """Walks what lives while backward runs: storages as large as one of the matrices, the weights themselves aside."""

    def __init__(self, matrices):
        super().__init__()
        self.sizes = {m.untyped_storage().nbytes() for m in matrices}
        self.own = {m.untyped_storage()._cdata for m in matrices}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if storage.nbytes() in self.sizes and key not in self.own and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.most = max(self.most, len(self.alive))
                    weakref.finalize(storage, self.alive.pop, key, None)
        return out
