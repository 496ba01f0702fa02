"""Patched models whose recipes are on trial: the same model all the while, and the verdict that the times give."""

import copy
import gc
import io
import threading
import warnings

import pytest
import torch
from accuracy import assert_same_float64
from library_models import TorchvisionResNet
from same_model import assert_same_step, images
from torch import nn
from torch.utils.checkpoint import checkpoint
from trials_on import FASTER, STEPS, block, row, told, trials_on, without_proof, x_for

import fusedres
from fusedres.blocks import user_table
from fusedres.models import BasicBlock, cifar_resnet, resnet18
from fusedres.patching import call as calls
from fusedres.trials import on_block
from fusedres.trials.clocks import Clock
from fusedres.trials.trial import ORIGINAL

SLOWER = {ORIGINAL: 1.0, "separate": 1.5, "gram": 1.5}


@pytest.fixture
def patching(tmp_path):
    with trials_on(tmp_path) as patching:
        without_proof(patching)
        yield patching


def step(model, x, training=True):
    with torch.set_grad_enabled(training):
        y = model(x)
    if training:
        y.sum().backward()
    return y.detach()


def test_the_fastest_recipe_is_kept_and_said(patching):
    told(patching, FASTER.__getitem__)
    model, seen = fusedres.patch(block()), []
    for _ in range(STEPS):
        step(model, x_for())
        seen.append((row(model).runs_as, row(model).code))
    assert {recipe for recipe, _ in seen} == {"unfused", "separate", "gram"}
    assert seen[0] == ("unfused", "measuring:0/7") and seen[-1] == ("separate", None)
    assert row(model).trial == "1.50x [1.50 1.50]"
    assert "separate, 1.50x [1.50 1.50]" in str(fusedres.report(model))


def test_a_slow_recipe_is_left_and_the_block_is_not_read_again(patching):
    told(patching, SLOWER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(STEPS):
        step(model, x_for())
    assert row(model).runs_as == "unfused"
    assert row(model).code == "no_faster_recipe:the best had 0.67x [0.67 0.67]"
    patching.setattr(calls, "read", None)
    step(model, x_for())


@pytest.mark.parametrize(
    "build", [block, lambda: cifar_resnet(8).double(), lambda: BasicBlock(16, 16).double()]
)
def test_training_is_that_of_the_unpatched_model_all_along(patching, build):
    """Outputs, gradients, running statistics and losses, while calls run now this way and now that."""
    told(patching, FASTER.__getitem__)
    torch.manual_seed(0)
    plain = build()
    fused = fusedres.patch(copy.deepcopy(plain))
    channels = next(m for m in plain.modules() if isinstance(m, nn.Conv2d)).in_channels
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, 0.9) for m in (plain, fused)]
    ran = set()
    for i in range(STEPS):
        assert_same_step(plain, fused, images(3, channels, 6, 6, seed=i))
        for optimizer in optimizers:
            optimizer.step()
        ran |= {r.runs_as for r in fusedres.report(fused).matched}
    assert ran >= {"unfused", "separate"} and row(fused).code is None
    for name, exact in plain.state_dict().items():
        if exact.is_floating_point():
            assert_same_float64(fused.state_dict()[name], exact, name, limit=1e-8)
        else:
            assert torch.equal(fused.state_dict()[name], exact)


def test_random_numbers_and_hooks_are_those_of_the_unpatched_model(patching):
    told(patching, FASTER.__getitem__)
    plain = nn.Sequential(block(), nn.Dropout(0.5), block(1))
    fused, seen = fusedres.patch(copy.deepcopy(plain)), []
    for model in (plain, fused):
        torch.manual_seed(3)
        said = []
        model[0].register_forward_hook(lambda module, args, y, said=said: said.append(("forward", y.shape)))
        model[2].register_full_backward_hook(lambda *args, said=said: said.append("backward"))
        drawn = []
        for _ in range(STEPS):
            step(model, x_for().requires_grad_())
            drawn.append(torch.rand(1))
        seen.append((said, torch.cat(drawn)))
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])
    assert {r.runs_as for r in fusedres.report(fused).matched} == {"separate"}


def test_gradients_lie_as_the_unpatched_models_do(patching):
    told(patching, FASTER.__getitem__)
    plain = resnet18(num_classes=4).to(memory_format=torch.channels_last)
    fused, x = fusedres.patch(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
    for model in (plain, fused):
        step(model, x)
    for (name, expected), actual in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert actual.grad.stride() == expected.grad.stride(), name
        assert actual.grad.storage_offset() == 0 and actual.grad.is_leaf, name
        assert actual.grad.untyped_storage().nbytes() == expected.grad.untyped_storage().nbytes(), name


def test_training_and_evaluation_are_two_kinds_of_calls(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for i in range(3 * STEPS):  # evaluated in the middle of its trial in training
        training = i % 3 != 2
        model.train(training)
        step(model, x_for(), training)
    keys = [key for key in user_table.table() if "together" not in key.call]
    assert {key.gradients for key in keys} == {True, False} and len(keys) == 2
    assert all(key.exact for key in keys)


def test_alternating_shapes_have_a_trial_each(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for i in range(3 * STEPS):
        step(model, x_for(batch=(2, 3)[i % 2]))
    calls = sorted(key.call[:1] for key in user_table.table() if "together" not in key.call)
    assert calls == ["2", "3"] and row(model).runs_as == "separate"


def test_the_next_process_knows_and_tries_nothing(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(STEPS):
        step(model, x_for())
    entries = dict(user_table.table())
    assert {entry.source for entry in entries.values()} == {"trial"}
    on_block.registry.forget()
    user_table.forget()
    patching.setattr(on_block.Trial, "next", None)
    again = fusedres.patch(block())
    step(again, x_for())
    assert row(again).runs_as == "separate" and row(again).code is None
    assert dict(user_table.table()) == entries


def test_a_copy_in_the_middle_goes_on_by_itself(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(4):
        step(model, x_for())
    twin = copy.deepcopy(model)
    assert row(twin).trial is None
    for _ in range(STEPS):
        step(twin, x_for())
    assert row(twin).runs_as == "separate" and row(model).trial == row(twin).trial


def test_a_pickle_in_the_middle_holds_nothing_of_it(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(4):
        step(model, x_for())
    file = io.BytesIO()
    torch.save(model, file)
    assert b"trial" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for _ in range(STEPS):
        step(loaded, x_for())
    assert row(loaded).runs_as == "separate"


def test_two_threads(patching):
    told(patching, FASTER.__getitem__)
    model, failed = fusedres.patch(block().eval()), []
    expected = block().eval()(x_for())

    def calls():
        try:
            for _ in range(STEPS):
                assert_same_float64(step(model, x_for(), False), expected.detach())
        except Exception as error:  # a thread's exception would else be lost
            failed.append(error)

    threads = [threading.Thread(target=calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and row(model).runs_as == "separate"


def test_out_of_memory_puts_the_candidate_out_and_the_original_runs(patching):
    told(patching, FASTER.__getitem__)
    right = calls.run

    def run(call, recipe, ops):
        if recipe == "separate":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(call, recipe, ops)

    patching.setattr(calls, "run", run)
    plain, fused = block(), fusedres.patch(block())
    for i in range(STEPS):
        assert_same_step(plain, fused, x_for(seed=i))
    assert row(fused).runs_as == "gram" and row(fused).trial.startswith("1.25x")


def test_another_error_of_a_candidate_is_raised(patching):
    patching.setattr(calls, "run", lambda *args: 1 / 0)
    model = fusedres.patch(block())
    step(model, x_for())
    with pytest.raises(ZeroDivisionError):
        step(model, x_for())


class NeverReady(Clock):
    def stamp(self):
        return None

    def seconds(self, start, end):
        return None


def test_a_clock_that_is_never_ready(patching):
    patching.setattr(on_block, "clock_of", lambda device: NeverReady())
    patching.setattr("fusedres.trials.trial.MOST_WAITING", 6)
    model = fusedres.patch(block())
    for _ in range(8):
        step(model, x_for())
    assert row(model).runs_as == "unfused"
    assert row(model).code == "not_measured_here:6 calls in a row gave no time"
    assert not user_table.table()


def test_a_clock_that_answers_late(patching):
    """As a GPU's: what was asked is known a step later."""

    class Late(Clock):
        def __init__(self):
            self.asked = set()

        def stamp(self):
            return object()

        def seconds(self, start, end):
            known = end in self.asked
            self.asked.add(end)
            return 1.0 if known else None

    clock = Late()
    patching.setattr(on_block, "clock_of", lambda device: clock)
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(3 * STEPS):
        step(model, x_for())
    assert row(model).runs_as == "separate" and row(model).code is None


def test_the_wins_of_blocks_that_do_not_add_up_are_taken_back(patching):
    told(patching, FASTER.__getitem__, whole=lambda fused: 1.2 if fused else 1.0)
    model = fusedres.patch(nn.Sequential(block(), block(1)))
    with pytest.warns(
        UserWarning, match=r"training steps of Sequential were 0\.83x .* 2 blocks fused"
    ) as said:
        for _ in range(2 * STEPS):
            step(model, x_for())
    assert len(said) == 1
    assert {r.runs_as for r in fusedres.report(model).matched} == {"unfused"}
    assert row(model).code.startswith("no_faster_recipe:the whole model, 0.83x")
    on_block.registry.forget()  # the next process turns them back without a step, and without a word
    again = fusedres.patch(nn.Sequential(block(), block(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(again, x_for())
    assert {r.runs_as for r in fusedres.report(again).matched} == {"unfused"}


def test_inference_is_compared_as_a_whole_too(patching):
    seen = []
    told(patching, FASTER.__getitem__, whole=lambda fused: seen.append(fused) or (1.0 if fused else 1.5))
    model = fusedres.patch(nn.Sequential(block(), block(1)).eval())
    for _ in range(STEPS):
        step(model, x_for(), False)
    assert seen == [True, False, False, True, True, False]
    assert {r.runs_as for r in fusedres.report(model).matched} == {"separate"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_forwards_are_the_same_both_times_and_are_not_measured(patching, reentrant):
    told(patching, FASTER.__getitem__)
    plain, fused = block(), fusedres.patch(block())

    def through(model):
        def forward(x):
            return checkpoint(model, x, use_reentrant=reentrant)

        return forward

    for i in range(12):
        results = []
        for model in (plain, fused):
            model.zero_grad()
            x = x_for(seed=i).requires_grad_()
            y = through(model)(x)
            y.sum().backward()
            results.append((y.detach(), x.grad, *(p.grad for p in model.parameters())))
        for actual, expected in zip(*reversed(results), strict=True):
            assert_same_float64(actual, expected)
    assert not [key for key in user_table.table() if key.gradients]


def test_a_checkpoint_keeps_its_recipe_whatever_is_found_out_meanwhile(patching):
    """Its second forward has to save what the first one did, or torch refuses it."""
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    x = x_for().requires_grad_()
    waiting = checkpoint(model, x, use_reentrant=False)
    for _ in range(STEPS):
        step(model, x_for())
    assert row(model).runs_as == "separate"
    waiting.sum().backward()


def off_by_environment(patching):
    patching.setenv("FUSEDRES_TRIAL", "0")


def off_by_determinism(patching):
    patching.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def off_by_cudnn(patching):
    patching.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("off", [off_by_environment, off_by_determinism, off_by_cudnn])
def test_off(patching, off):
    told(patching, FASTER.__getitem__)
    off(patching)
    model = fusedres.patch(block())
    for _ in range(4):
        step(model, x_for())
    assert row(model).trial is None and row(model).runs_as == "unfused"
    assert row(model).code.startswith("not_measured_here")


def test_off_uses_what_is_known(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(STEPS):
        step(model, x_for())
    on_block.registry.forget()
    off_by_environment(patching)
    again = fusedres.patch(block())
    step(again, x_for())
    assert row(again).runs_as == "separate"


def test_off_in_the_middle_runs_the_original(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    for _ in range(3):
        step(model, x_for())
    off_by_determinism(patching)
    step(model, x_for())
    assert row(model).runs_as == "unfused" and row(model).code.startswith("not_measured_here")


def test_warmup_settles_it_before_training(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(nn.Sequential(block(), block(1)))
    before = copy.deepcopy(model.state_dict())
    fusedres.warmup(model, x_for(), measure=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    seen = []
    patching.setattr(on_block.Trial, "next", lambda self: seen.append(self))
    step(model, x_for())
    assert not seen and {r.runs_as for r in fusedres.report(model).matched} == {"separate"}


def test_a_recipe_that_is_named_is_never_on_trial(patching):
    patching.setattr(on_block.OnBlock, "turn", None)
    for recipe in ("separate", "unfused"):
        model = fusedres.patch(block(), recipe=recipe)
        step(model, x_for())
        assert row(model).runs_as == recipe


def test_what_the_user_tuned_comes_first(patching):
    model = fusedres.patch(block())
    with user_table.recorded_keys() as keys:
        step(model, x_for())
    user_table.write({keys[-1]: user_table.Entry("gram", 1.1)})
    again = fusedres.patch(block())
    step(again, x_for())
    assert row(again).runs_as == "gram" and row(again).trial is None


@pytest.mark.parametrize("text", ["", "{", '{"kind": "other"}', '{"kind": 3, "entries": [1]}'])
def test_a_corrupt_table_is_said_once_and_written_anew(patching, tmp_path, text):
    told(patching, FASTER.__getitem__)
    (tmp_path / "table.json").write_text(text)
    user_table.forget()
    model = fusedres.patch(block())
    with pytest.warns(RuntimeWarning, match="no table of recipes"):
        for _ in range(STEPS):
            step(model, x_for())
    assert row(model).runs_as == "separate" and user_table.parse(tmp_path / "table.json")


def test_a_table_that_cannot_be_written_is_said_once(patching, tmp_path):
    told(patching, FASTER.__getitem__)
    patching.setenv("FUSEDRES_TABLE", str(tmp_path / "table.json" / "below a file" / "table.json"))
    user_table.forget()
    model = fusedres.patch(block())
    with pytest.warns(RuntimeWarning) as said:
        for _ in range(STEPS):
            step(model, x_for())
    assert row(model).runs_as == "separate"
    assert len([w for w in said if "cannot be written" in str(w.message)]) == 1


def test_a_stem_in_a_models_own_method_is_timed_without_the_rest(patching):
    """Its original forward is that of the whole model: the parts of the stem are what counts."""
    told(patching, FASTER.__getitem__)
    torch.manual_seed(0)
    plain = TorchvisionResNet().double()
    fused = fusedres.patch(copy.deepcopy(plain))
    for i in range(STEPS):
        assert_same_step(plain, fused, images(2, 3, 32, 32, seed=i))
    assert {r.runs_as for r in fusedres.report(fused).matched} == {"separate"}


def alive():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def test_a_trial_keeps_no_tensor_alive(patching):
    told(patching, FASTER.__getitem__)
    model = fusedres.patch(block())
    counts = []
    for i in range(STEPS):
        step(model, x_for())
        if i in (1, 2, 3, STEPS - 1):  # once there are gradients
            counts.append(alive())
    assert max(counts[1:]) <= counts[0]  # what earlier tests left may go meanwhile
