"""What the patcher must match, as libraries build it: name -> block, each taking [N, CIN, H, W]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from frozen_norms import CastingFrozenNorm, ConstantEpsFrozenNorm, FrozenNorm
from repository_blocks import (
    AkamasterOptionA,
    ClipBottleneck,
    Detectron2Bottleneck,
    KuangliuBasic,
    MmcvBottleneck,
    PyclsBlock,
    RepVGG,
    WeiaicunzaiBottleneck,
)
from torch import nn
from torchvision_blocks import (
    FastaiResBlock,
    RegNetX,
    TimmBottleneck,
    TorchvisionBasic,
    TorchvisionBottleneck,
    TorchvisionQuantizable,
)


def with_bias(block: nn.Module) -> nn.Module:
    """As Cadene's FBResNet: every convolution has a bias."""
    for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))
    return block


LIBRARY_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision-basic": TorchvisionBasic,
    "torchvision-bottleneck": TorchvisionBottleneck,
    "torchvision-bottleneck-strided": partial(TorchvisionBottleneck, cout=64, stride=2),
    "torchvision-resnext": partial(TorchvisionBottleneck, width=16, groups=4),
    "torchvision-wide": partial(TorchvisionBottleneck, width=24),
    "torchvision-dilated": partial(TorchvisionBottleneck, dilation=2),
    "torchvision-frozen": partial(TorchvisionBottleneck, cout=64, stride=2, norm=FrozenNorm),
    "torchvision-frozen-eps-0": partial(TorchvisionBasic, norm=partial(FrozenNorm, eps=0.0)),
    "torchvision-quantizable": TorchvisionQuantizable,
    "torchvision-regnet-x": RegNetX,
    "torchvision-regnet-x-strided": partial(RegNetX, stride=2),
    "timm": TimmBottleneck,
    "timm-strided": partial(TimmBottleneck, cout=64, stride=2),
    "timm-d": partial(TimmBottleneck, cout=64, stride=2, average=True),
    "kuangliu": KuangliuBasic,
    "kuangliu-strided": partial(KuangliuBasic, stride=2),
    "akamaster-a": AkamasterOptionA,
    "weiaicunzai": WeiaicunzaiBottleneck,
    "weiaicunzai-resnext": partial(WeiaicunzaiBottleneck, groups=4),
    "detectron2": Detectron2Bottleneck,
    "detectron2-strided": partial(Detectron2Bottleneck, stride=2),
    "detectron2-frozen": partial(Detectron2Bottleneck, stride=2, stride_in_1x1=False, norm=CastingFrozenNorm),
    "detr-frozen": partial(TorchvisionBottleneck, norm=ConstantEpsFrozenNorm),
    "fastai": FastaiResBlock,
    "fastai-strided": partial(FastaiResBlock, stride=2, cout=64),
    "clip": ClipBottleneck,
    "mmcv": MmcvBottleneck,
    "repvgg": RepVGG,
    "repvgg-strided": partial(RepVGG, stride=2),
    "pycls": PyclsBlock,
    "cadene-fbresnet": lambda: with_bias(TorchvisionBottleneck(cout=64, stride=2)),
}
