"""Whole models of libraries that can be installed beside torch: transformers and pytorchcv."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accuracy import assert_same_float64
from pytorchcv.models.resnet import ResNet as PytorchcvResNet
from pytorchcv.models.resnet import ResUnit
from torch import nn
from training import assert_trained_alike
from transformers import ResNetBackbone, ResNetConfig, ResNetModel
from transformers.models.detr.modeling_detr import replace_batch_norm
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

import fusedres

TRANSFORMERS = {
    "basic": {"layer_type": "basic", "hidden_sizes": [16, 32]},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [32, 64]},
    "bottleneck-v1": {
        "layer_type": "bottleneck",
        "hidden_sizes": [32, 64],
        "downsample_in_bottleneck": True,
    },
}
PYTORCHCV = {
    "basic": {"bottleneck": False, "conv1_stride": False},
    "bottleneck": {"bottleneck": True, "conv1_stride": False},
    "bottleneck-v1": {"bottleneck": True, "conv1_stride": True},
}


def transformers_config(form: str) -> ResNetConfig:
    return ResNetConfig(embedding_size=16, depths=[2, 2], **TRANSFORMERS[form])


def transformers_model(form: str) -> nn.Module:
    model = ResNetModel(transformers_config(form))
    for block in model.modules():
        if isinstance(block, (ResNetBasicLayer, ResNetBottleNeckLayer)):
            nn.init.zeros_(block.layer[-1].normalization.weight)  # starts as the identity: noise stays small
    return model


def pytorchcv_model(form: str) -> nn.Module:
    model = PytorchcvResNet([[32, 32], [64, 64]], 16, num_classes=5, **PYTORCHCV[form])
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    for unit in [m for m in model.modules() if isinstance(m, ResUnit)]:
        nn.init.zeros_([m for m in unit.body.modules() if isinstance(m, nn.BatchNorm2d)][-1].weight)
    return model


MODELS = {
    **{f"transformers-{form}": partial(transformers_model, form) for form in TRANSFORMERS},
    **{f"pytorchcv-{form}": partial(pytorchcv_model, form) for form in PYTORCHCV},
}


def scalar(output) -> torch.Tensor:
    return (output if isinstance(output, torch.Tensor) else output.pooler_output).square().mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_three_sgd_steps_equal_unpatched(name, recipe):
    torch.manual_seed(0)
    plain = MODELS[name]().double().train()
    fused = fusedres.patch(copy.deepcopy(plain), recipe=recipe, strict=True)
    forms = [row.form for row in fusedres.report(fused).matched]
    assert len(forms) == 5 and forms[0] == "stem: conv-bn-relu-maxpool"
    images = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    assert_trained_alike(plain, fused, images, scalar)


def test_a_detection_backbone_with_frozen_norms():
    torch.manual_seed(0)
    plain = ResNetBackbone(transformers_config("bottleneck"))
    with torch.no_grad():
        for bn in [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
        replace_batch_norm(plain)
    plain.double().train()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="gram", strict=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, actual = plain(images).feature_maps, fused(images).feature_maps
    assert {row.runs_as for row in fusedres.report(fused).matched} == {"separate", "gram"}
    for exact, found in zip(expected, actual, strict=True):
        assert_same_float64(found, exact)
