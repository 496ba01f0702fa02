"""How many bytes a forward keeps for its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def kept_bytes(model: nn.Module, example: tuple[Any, ...]) -> int:
    """Bytes of every storage that autograd saves in one forward in training mode, parameters and buffers apart.

    Of the model's state the running statistics move, as in any forward.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # held until all is counted: a storage that is freed gives its address to the next one
        outputs = model.train()(*example)
    if not any(isinstance(out, Tensor) and out.requires_grad for out in tree_leaves(outputs)):
        return 0
    return sum(saved.values())
