"""compare: what it times, that it refuses wrong models, and what it says."""

from __future__ import annotations

import copy

import pytest
import torch
from block_forms import randomize
from called_ops import change_results
from torch import nn
from torchvision_blocks import CIN, TorchvisionBasic

import fusedres
from fusedres.measuring import compare as comparison
from fusedres.measuring.compare import Comparison, summarise
from fusedres.ops.contract import BnAddReluForward


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(randomize(TorchvisionBasic()))


EXAMPLE = torch.randn(2, CIN, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES = [1.0, 1.1, 0.9, 1.0, 1.0, 1.0]
FUSED = {"separate": 1}


def said(*phases: tuple[str, float]) -> str:
    """The sentence for phases in which the patched model takes that multiple of the unpatched one's time."""
    found = [summarise(phase, TIMES, [t * factor for t in TIMES], FUSED) for phase, factor in phases]
    return Comparison(tuple(found), None).sentence


def test_both_phases_are_timed_and_the_model_is_left_alone():
    plain = model()
    before = copy.deepcopy(plain.state_dict())
    found = fusedres.compare(plain, EXAMPLE, recipe="separate", rounds=3)
    assert [phase.phase for phase in found.phases] == ["training", "inference"]
    for phase in found.phases:
        assert phase.runs_as == FUSED and phase.rounds == 3
        assert 0 < phase.low <= phase.ratio <= phase.high
        assert phase.patched_seconds > 0 and phase.unpatched_seconds > 0
    assert found.checks and found.checks.fused_blocks == FUSED
    assert str(found).splitlines()[-1] == found.sentence == found.as_dict()["sentence"]
    assert not fusedres.is_patched(plain) and plain[0].conv1.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_the_steps_are_whole_ones(monkeypatch):
    """Each timed step of training runs a backward, none of inference does; both models take turns."""
    steps = []

    def interleave(unpatched, patched, device, rounds, after_round):
        steps.append((unpatched, patched))
        return [1.0] * rounds, [1.0] * rounds

    monkeypatch.setattr(comparison, "interleave", interleave)
    fusedres.compare(model(), EXAMPLE, recipe="separate", rounds=2)
    backwards, forwards, inner = [], [], torch.autograd.backward

    def backward(outputs, gradients):
        backwards.append([type(out.grad_fn).__name__ for out in outputs])
        inner(outputs, gradients)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda m, _: forwards.append((m.training, torch.is_grad_enabled()))
    )
    try:
        (unpatched, _), (inference, _) = steps
        unpatched()
        assert backwards == [["ReluBackward0"]] and set(forwards) == {(True, True)}
        forwards.clear()
        inference()
        assert len(backwards) == 1 and set(forwards) == {(False, False)}
    finally:
        handle.remove()
    steps[0][1]()
    assert backwards[1] == ["ResidualBlockBackward"]


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    change_results(monkeypatch, BnAddReluForward, lambda result: (result[0] * 1.001, result[1]))
    with pytest.raises(fusedres.VerificationError, match="FAIL"):
        fusedres.compare(model(), EXAMPLE, recipe="separate", backend="reference", rounds=2)


def test_the_check_is_of_fewer_images_where_asked():
    seen, plain = set(), model()
    plain.register_forward_pre_hook(lambda _, args: seen.add((args[0].dtype, len(args[0]))))
    found = fusedres.compare(plain, EXAMPLE, recipe="separate", rounds=2, check_with=EXAMPLE[:1])
    assert seen == {(torch.float64, 1), (torch.float32, 1), (torch.float32, 2)}
    assert found.checks and found.checks.fused_blocks == FUSED


def test_nothing_fused_says_so():
    found = fusedres.compare(model(), EXAMPLE, recipe="unfused", rounds=2)
    assert found.checks is None and found.sentence == str(found).splitlines()[-1] == "no block runs fused"


@pytest.mark.parametrize("recipe", ["unfused", "separate"])
def test_a_frozen_model_has_no_training_step(recipe):
    frozen = model().requires_grad_(False)
    found = fusedres.compare(frozen, (EXAMPLE,), recipe=recipe, rounds=2)
    assert [phase.phase for phase in found.phases] == ["inference"]
    assert found.phases[0].runs_as == {recipe: 1}


def test_progress_is_told_between_steps():
    told = []
    options = {"recipe": "separate", "rounds": 2, "progress": lambda *step: told.append(step)}
    fusedres.compare(model(), EXAMPLE, **options)
    assert told[:5] == [("checking", done, 4) for done in range(5)]
    assert told[5:] == [(f"timing {phase}", n, 2) for phase in ("training", "inference") for n in range(3)]


def test_the_callers_mode_does_not_count():
    with torch.no_grad():
        found = fusedres.compare(model(), EXAMPLE, recipe="separate", rounds=2)
    assert [phase.phase for phase in found.phases] == ["training", "inference"]


def test_random_numbers_go_on_as_if_nothing_had_been_compared():
    with_dropout = nn.Sequential(model(), nn.Dropout())
    before = torch.get_rng_state()
    for recipe in ("separate", "unfused"):
        fusedres.compare(with_dropout, EXAMPLE, recipe=recipe, rounds=2)
        assert torch.equal(torch.get_rng_state(), before)


def test_sentences():
    assert said(("training", 0.5)) == "patched trains 2.00x as fast [2.00 2.00]"
    slower = said(("training", 0.5), ("inference", 2.0))
    assert slower == (
        "patched trains 2.00x as fast [2.00 2.00] and infers slower, 0.50x as fast [0.50 0.50]: "
        "leave it unpatched for inference"
    )
    noise = summarise("training", [1.0] * 6, [0.5, 0.5, 1.0, 1.0, 2.0, 2.0], FUSED)
    assert noise.clause.startswith("trains no faster within the noise, 1.00x as fast [0.5")


def test_few_rounds_decide_nothing():
    five, six = (summarise("training", [2.0] * n, [1.0] * n, FUSED) for n in (5, 6))
    assert five.clause == "trains 2.00x as fast in 5 rounds, too few to tell from noise (needed 6)"
    assert "[" not in str(Comparison((five,), None)) and six.clause == "trains 2.00x as fast [2.00 2.00]"
    slow = summarise("inference", [1.0] * 5, [2.0] * 5, FUSED)
    assert "slower" not in slow.clause and "leave it unpatched" not in Comparison((slow,), None).sentence


def test_a_phase_in_which_nothing_runs_fused_is_given_no_speed():
    trained = summarise("training", TIMES, [t / 2 for t in TIMES], FUSED)
    for factor in (0.5, 2.0):
        inferred = summarise("inference", TIMES, [t * factor for t in TIMES], {"unfused": 1})
        assert Comparison((trained, inferred), None).sentence == (
            "patched trains 2.00x as fast [2.00 2.00] and infers as unpatched, for no block runs fused there"
        )


def test_bad_requests_raise():
    with pytest.raises(ValueError, match="at least 2 rounds, found 1"):
        fusedres.compare(model(), EXAMPLE, rounds=1)
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        fusedres.compare(EXAMPLE, EXAMPLE)
    with pytest.raises(fusedres.UnsupportedModelError, match=r"fusedres\.compare: no residual block"):
        fusedres.compare(nn.Sequential(nn.Conv2d(3, 3, 1)), EXAMPLE)
