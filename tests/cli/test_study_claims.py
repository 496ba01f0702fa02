"""The claims of the studies do not show for networks that only say they are residual; what the figures are made of.

That they show for residual networks is asserted in `test_study.py`, of the run of the command there.
"""

from __future__ import annotations

import pytest
import tiny_studies
import torch
from called_ops import change_results
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fusedres
from fusedres.cli.study import comparison, exits, landscape, networks, training
from fusedres.cli.study.networks import Kind
from fusedres.measuring.verify import FLOAT64_LIMIT
from fusedres.ops.accuracy import error_limit, relative_error
from fusedres.ops.contract import BnAddReluForward

# what each wrong network has to be told by
CAUGHT = {
    "cut": {
        "gradients": (0, 2, 3),
        "depth": (1,),
        "exits": (1, 2, 3),
        "landscape": (1, 2),  # the Hessian has rows for the unused projections too
    },
    "scaled": {"gradients": (0,)},
    "swapped": {"gradients": (0, 3), "depth": (1,), "exits": (1, 2, 3), "landscape": (0, 1, 2)},
}


SEEDS = {"landscape": (0, 1, 2)}  # one seed's sharpness is chance, which differs from processor to processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each way in which networks are broken: studies share their trainings."""
    return {how: tmp_path_factory.mktemp(str(how)) for how in CAUGHT}


def run(study, how, folders, monkeypatch):
    monkeypatch.setattr(networks, "build", tiny_studies.BROKEN[how](networks.build))
    monkeypatch.setattr(networks, "patched", lambda model, kind: model)
    monkeypatch.setattr(networks, "check_ran", lambda model, kind: None)
    return tiny_studies.found(study, folders[how], tiny_studies.of_seeds(SEEDS.get(study, (0,))))


@pytest.mark.parametrize(("how", "study"), [(how, study) for how in CAUGHT for study in CAUGHT[how]])
def test_broken_networks_do_not_show_them(how, study, folders, monkeypatch):
    shown = tiny_studies.shown(run(study, how, folders, monkeypatch))
    for place in CAUGHT[how][study]:
        beginning = tiny_studies.DIRECTIONS[study][place]
        assert not any(claim.startswith(beginning) for claim in shown), beginning


@pytest.mark.parametrize("block", [tiny_studies.Cut, tiny_studies.Scaled])
def test_blocks_that_do_not_run_fused_are_told(block):
    kind = Kind("residual")
    model = tiny_studies.with_blocks(networks.build(kind, 8, 1, 10, 0), kind, block, block)
    fusedres.patch(model, recipe="separate")
    model(torch.randn(4, 1, 8, 8))
    with pytest.raises(fusedres.VerificationError, match="have to run as separate"):
        networks.check_ran(model, kind)


@pytest.mark.parametrize("study", comparison.SMALL)
def test_a_wrong_kernel_is_found_by_the_comparison(study, tmp_path, monkeypatch):
    change_results(monkeypatch, BnAddReluForward, lambda result: (result[0] * (1 + 1e-6), *result[1:]))
    with pytest.raises(
        fusedres.VerificationError, match=f"study {study}: patched and unpatched networks differ"
    ):
        tiny_studies.found(study, tmp_path)


def test_exits_are_the_first_block_from_which_an_image_stays_right():
    right = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]]).bool().numpy()
    assert exits.exits(right).tolist() == [2, 3, 0, 1]


def test_eigenvalues_are_those_of_a_known_matrix():
    values = torch.tensor([-2.0, -0.5, 0.1, 1.0, 5.0], dtype=torch.float64)
    found = landscape.ends(lambda v: values * v, 5, torch.float64, 60, 0)
    assert abs(found["largest"] - 5) <= error_limit(0, torch.float64) * 5
    assert abs(found["least"] + 2) <= error_limit(0, torch.float64) * 5
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0)).double() ** 2
    mass = (weights * values.abs()) / (weights * values.abs()).sum()
    assert abs(found["negative_curvature"] - mass[:2].sum().item()) <= 5 * error_limit(0, torch.float64)


def test_the_product_is_that_of_the_hessian():
    """Of a patched network, against torch's own product for the unpatched one."""
    images, kind = tiny_studies.few_images(), Kind("residual")
    pictures, labels = images.train[:16].double(), images.train_labels[:16]
    patched, plain = (networks.small(images, kind, 8, p).double().eval() for p in (True, False))
    names, values = zip(*plain.named_parameters(), strict=True)
    v = landscape.directions(plain, 0)[0]

    def loss(*parameters):
        outputs = functional_call(plain, dict(zip(names, parameters, strict=True)), pictures)
        return cross_entropy(outputs, labels)

    _, exact = torch.autograd.functional.hvp(loss, values, tuple(v))
    product = landscape.hessian_product(patched, pictures, labels)(torch.cat([d.flatten() for d in v]))
    networks.check_ran(patched, kind)
    assert relative_error(product, torch.cat([t.flatten() for t in exact])) <= FLOAT64_LIMIT


def test_a_paraboloid_is_smooth_and_convex_and_a_saddle_is_not():
    grid = landscape.np.linspace(-1, 1, 9)
    a, b = landscape.np.meshgrid(grid, grid, indexing="ij")
    bowl, saddle = (landscape.shape_of((a**2 + sign * b**2).tolist(), grid) for sign in (1, -1))
    eps = error_limit(0, torch.float64)
    assert bowl["negative"] == 0 and saddle["negative"] == 1
    assert bowl["roughness"] <= eps and saddle["roughness"] <= eps
    assert landscape.shape_of((a**2 + landscape.np.sin(9 * b)).tolist(), grid)["roughness"] > 0.1


def test_batches_go_on_over_epochs():
    images = tiny_studies.few_images()
    found = list(training.batches(images, 100, 5, 0))
    assert [len(labels) for _, labels in found] == [100] * 5
    again = list(training.batches(images, 100, 5, 0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, again, strict=True))
