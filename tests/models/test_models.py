"""The reference models: shapes, names that load torchvision's checkpoints, plain twins, activations, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedres import models
from fusedres.models import BasicBlock, CifarResNet

PARAMETERS = {  # as published for 1,000 classes
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_imagenet_models_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = models.create(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_names_are_those_of_torchvision():
    with torch.device("meta"):
        keys = list(models.resnet50().state_dict())
    assert keys[0] == "conv1.weight" and keys[-2:] == ["fc.weight", "fc.bias"] and len(keys) == 320
    assert {"layer1.0.downsample.0.weight", "layer4.2.bn3.num_batches_tracked", "bn1.running_var"} <= set(
        keys
    )


@pytest.mark.parametrize("depth", models.CIFAR_DEPTHS)
def test_cifar_depth_counts_its_layers(depth):
    with torch.device("meta"):
        model = models.create(f"cifar_resnet{depth}")
    counted = [
        n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n
    ]
    assert len(counted) == depth
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "cifar_resnet29"])
def test_the_plain_twin_has_the_layers_without_shortcuts(name):
    model, twin = models.create(name), models.create(name, residual=False)
    layers = {k for k in model.state_dict() if "downsample" not in k}
    assert set(twin.state_dict()) == layers
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in layers})
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(model.eval()(x), twin.eval()(x))


def test_the_activation_is_a_choice():
    model = models.create("cifar_resnet20", activation="sigmoid")
    kinds = {type(m) for m in model.modules()}
    assert nn.Sigmoid in kinds and nn.ReLU not in kinds


def test_zero_init_starts_every_block_as_the_identity():
    model = models.create("cifar_resnet29", zero_init_residual=True).eval()
    x = torch.rand(1, 64, 4, 4)
    assert torch.equal(model.layer1[1](x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.create("resnet51"), "choose from resnet18"),
        (lambda: models.create("resnet18", activation="gelu"), r"choose from \['relu', 'sigmoid'\]"),
        (lambda: CifarResNet(BasicBlock, 21), r"not 6n\+2; the nearest is 20"),
    ],
    ids=["name", "activation", "depth"],
)
def test_bad_requests_name_the_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()
