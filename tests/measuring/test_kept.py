"""What a forward keeps for its backward, in bytes."""

from __future__ import annotations

import copy

import torch
from block_forms import bottleneck
from torch import nn

import fusedres
from fusedres.measuring.kept import kept_bytes


def test_saved_storages_count_once_and_parameters_do_not():
    x = torch.randn(4, 8, requires_grad=True)
    squares = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Flatten())
    assert kept_bytes(squares, (x,)) == x.nbytes + 4 * 16 * 4  # x for the weight, the sigmoid's output


def test_a_model_that_wants_no_gradient_keeps_nothing():
    assert kept_bytes(nn.Linear(8, 16).requires_grad_(False), (torch.randn(4, 8),)) == 0


def test_gram_keeps_less_whatever_the_callers_grad_mode():
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last)
    plain = nn.Sequential(bottleneck()(), bottleneck()()).to(memory_format=torch.channels_last)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="gram")
    with torch.no_grad():
        assert kept_bytes(fused, (x,)) < 0.7 * kept_bytes(plain, (x,))
