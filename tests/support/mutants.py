"""Wrong patchers, each of which its named test must catch: `make mutants`, or this file with the names of some.

A mutant changes the installed package in memory. Each runs in a forked process, with its test alone; the run fails if
a test passes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusedres.autograd import function as autograd
from fusedres.autograd import graph_task
from fusedres.blocks import recipe, separate, user_table
from fusedres.matching import ambient, dry_run, every_path, grammar, own_sizes, owners, stems
from fusedres.measuring import capturable, captured_state, cuda_graphs, verify
from fusedres.modules import derived_class, own_code, shadows, tree
from fusedres.nn import running_stats
from fusedres.ops import flops
from fusedres.ops.native import kept_memory
from fusedres.patching import (
    api,
    bound,
    call,
    fits,
    guards,
    install,
    patched_class,
    resolve,
    state,
    warm,
    watch,
)
from fusedres.recording import bundle, code, recorder, replays
from fusedres.trials import kind, proof, timed, whole_model

residual_block = sys.modules["fusedres.nn.residual_block"]
graphed = sys.modules["fusedres.measuring.graphed"]
TESTS = Path(__file__).parents[1]
MUTANTS: dict[str, tuple[str, Callable[[], None]]] = {}


def mutant(test: str):
    """Registers a wrong patcher under its function's name, with the test that must fail."""

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        MUTANTS[apply.__name__] = (test, apply)
        return apply

    return register


def wrap(owner, name: str, make) -> None:
    """Replaces owner.name by what `make` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def on_result(change):
    return lambda right: lambda *args: change(right(*args))


def on_config(**fields):
    """read_conv_bn with fields of the configuration overwritten."""
    return on_result(lambda read: (read[0]._replace(**fields), read[1]))


def remembering(key):
    """A function that gives its first result again for the same key."""

    def make(right):
        known = {}

        def wrong(*args):
            if key(*args) not in known:
                known[key(*args)] = right(*args)
            return known[key(*args)]

        return wrong

    return make


def on_statistics(change):
    """update_running_stats with every entry changed."""
    return lambda right: lambda seen: right([change(s) for s in seen])


def on_output(change):
    """A recipe's forward with its y changed."""
    return on_result(lambda out: out._replace(y=change(out.y)))


def on_gradients(change):
    """A recipe's backward with its gradients changed; change also gets dy."""
    return lambda right: lambda *args: change(right(*args), args[5])


@mutant("patching/test_hooks.py::test_hook_on_a_module[late-convolution-forward]")
def ignores_hooks_of_submodules():
    resolve.intervenes = lambda module, state: "instance_forward" if "forward" in state else None


@mutant("patching/test_hooks.py::test_hook_on_every_module[full_backward]")
def ignores_global_hooks():
    resolve.has_global_hooks = lambda: False


@mutant("patching/test_hooks.py::test_hook_on_a_module[late-norm-full_backward_pre]")
def ignores_backward_hooks():
    resolve.intervenes = lambda module, state: "hooks" if state["_forward_hooks"] else None


@mutant("patching/test_guards.py::TestPerCallGuards::test_late_hook")
def remembers_that_a_block_was_sound():
    wrap(call, "resolve", remembering(lambda block, *_: id(block)))


@mutant("patching/test_copies.py::test_a_copy_trains_the_same_and_apart[deepcopy-separate]")
def keeps_the_modules_in_the_plan():
    wrap(call, "resolve", remembering(lambda block, expected, *_: tuple(e.path for e in expected)))


@mutant(
    "patching/test_late_changes.py::test_a_change_that_no_recipe_covers_runs_the_original[submodule_forward]"
)
def ignores_forwards_set_on_submodules():
    resolve.intervenes = lambda module, state: "hooks" if state["_forward_hooks"] else None


@mutant("patching/test_late_changes.py::test_a_change_that_no_recipe_covers_runs_the_original[padding_mode]")
def ignores_the_padding_mode():
    guards.unreadable = lambda *_: None


@mutant("patching/test_late_changes.py::test_an_attribute_of_a_submodule")
def ignores_attributes():
    resolve.same = lambda found, expected: True


@mutant("patching/test_late_changes.py::test_an_option_changed_in_place")
def compares_attributes_by_identity():
    tree.kept = lambda value: value


@mutant("patching/test_late_flags.py::test_a_flag_of_the_class")
def ignores_attributes_of_classes():
    tree.flags = lambda module: ()


@mutant("patching/test_late_flags.py::test_an_option_of_an_object[attribute]")
def looks_into_no_object():
    tree.kept = lambda value: value.copy() if isinstance(value, (list, dict)) else value


@mutant("patching/test_late_flags.py::test_a_forward_given_to_a_class_of_torch")
def trusts_the_classes_of_submodules():
    call.method_replaced = lambda plan: None


@mutant("patching/test_patching.py::test_look_alikes_are_left_alone_with_their_code[FunctionalNorm]")
def takes_the_owner_of_a_weight_for_the_norm():
    owners.bn_owner = lambda module, flow, bn: owners.owner(bn.args[1].name, "weight")


@mutant("patching/test_patching.py::test_look_alikes_are_left_alone_with_their_code[FunctionalConvolution]")
def takes_the_owner_of_a_weight_for_the_convolution():
    owners.conv_owner = lambda flow, conv: owners.owner(conv.args[1].name, "weight")
    owners.parameter = lambda node: node and node.name


@mutant("patching/test_patching.py::test_look_alikes_are_left_alone_with_their_code[CountsInBuffer]")
def loses_writes_to_buffers():
    grammar.check_effects = lambda flow, named, paths: None


@mutant("patching/test_patching.py::test_patch_has_no_effects_of_a_forward[CountsOnObject]")
def leaves_the_effects_of_dry_runs():
    dry_run.Snapshot.restore = lambda self: False


@mutant("patching/test_patching.py::test_look_alikes_are_left_alone_with_their_code[LooksAtWidth]")
def reads_one_size():
    every_path.OTHERS = ()
    own_sizes.probes = lambda modules, channels: ()


@mutant("patching/test_patching.py::test_look_alikes_are_left_alone_with_their_code[LooksAtGradient]")
def reads_with_gradients_only():
    def make(right):
        return lambda *args, gradients=True, inference=False, **context: right(*args, **context)

    wrap(every_path, "trace", make)


@mutant("patching/test_late_changes.py::test_a_change_is_seen[parameters_replaced-separate]")
def caches_the_weights():
    wrap(residual_block, "read_conv_bn", remembering(lambda unit: id(unit.conv)))


@mutant("patching/test_late_changes.py::test_a_change_is_seen[dilation-separate]")
def keeps_the_dilation():
    wrap(residual_block, "read_conv_bn", on_config(dilation=(1, 1), padding=(1, 1)))


@mutant("patching/test_late_changes.py::test_a_change_is_seen[eps-separate]")
def keeps_eps():
    wrap(residual_block, "read_conv_bn", on_config(eps=1e-5))


@mutant("patching/test_late_changes.py::test_a_change_is_seen[norm_eval-separate]")
def keeps_batch_statistics_in_norm_eval():
    wrap(residual_block, "read_conv_bn", on_config(training=True))


@mutant("patching/test_late_changes.py::test_momentum[0.9-separate]")
def forgets_the_unbiased_variance():
    wrap(residual_block, "update_running_stats", on_statistics(lambda s: s._replace(rows=10**12)))


@mutant("patching/test_late_changes.py::test_momentum[None-separate]")
def ignores_momentum_none():
    running_stats.momentum = lambda bn: 0.1 if bn.momentum is None else bn.momentum


@mutant("patching/test_late_changes.py::test_momentum[0.0-gram]")
def forgets_to_count_batches():
    def uncounted(s):
        s.bn.num_batches_tracked.sub_(1)
        return s

    wrap(residual_block, "update_running_stats", on_statistics(uncounted))


@mutant("patching/test_late_changes.py::test_statistics_no_longer_tracked[train]")
def moves_untracked_statistics():
    def tracked(s):
        s.bn.track_running_stats = True
        return s

    wrap(residual_block, "update_running_stats", on_statistics(tracked))


@mutant("patching/test_late_changes.py::test_one_value_per_channel_raises_as_unpatched")
def normalises_one_value_per_channel():
    guards.unfit_sizes = lambda *_: None
    running_stats.update_running_stats = residual_block.update_running_stats = lambda seen: None


@mutant("ops/test_same_as_eager.py::test_every_change_made_after_patching[short_running_mean-separate]")
def trusts_the_shapes_of_parameters():
    guards.norm_vectors = lambda t, bn: []
    residual_block.update_running_stats = lambda seen: None


@mutant("blocks/test_blocks.py::test_only_wanted_gradients_are_made[separate]")
def wants_gradients_for_the_input_only():
    residual_block.wants_gradient = call.wants_gradient = lambda call: call.x.requires_grad


@mutant("blocks/test_blocks.py::test_gradients_own_their_storage_and_dy_is_untouched[separate-basic]")
def writes_into_the_incoming_gradient():
    def change(grads, dy):
        dy.zero_()
        return grads

    wrap(separate, "backward", on_gradients(change))


@mutant("patching/test_copies.py::test_gradients_through_an_inner_step[separate]")
def differentiates_saved_tensors_twice():
    autograd.wants_differentiable = lambda dy: False


@mutant("patching/test_copies.py::test_a_batch_of_gradients[gram]")
def takes_no_batch_of_gradients():
    autograd.wants_differentiable = lambda dy: torch.is_grad_enabled()


@mutant("autograd/test_asked_gradients.py::test_gradients_asked_for_and_no_other[x]")
def makes_gradients_that_nobody_asked_for():
    autograd.taken = lambda ctx, wanted, *rest: wanted


@mutant("autograd/test_asked_gradients.py::test_gradients_asked_for_and_no_other[all-parameters]")
def drops_gradients_that_torch_does_not_speak_of():
    graph_task.will_run = lambda node: node.next_functions != ()


@mutant("autograd/test_asked_gradients.py::test_a_gradient_penalty_alone[x-separate]")
def forgets_that_the_mask_is_a_function_of_the_parameters():
    wrap(autograd, "through_relu", lambda right: lambda dy, mask, graph: right(dy, mask, []))


@mutant("ops/test_fake_mode.py::test_a_real_model[real-identity-separate]")
def runs_kernels_under_fake_tensor_mode():
    guards.transformed = lambda: None


@mutant("ops/test_flops.py::test_separate_counts_what_eager_counts[bottleneck-eval-auto]")
def counts_products_of_torch_alone():
    flops.hand_over = lambda counter: None
    registry = importlib.import_module(flops.COUNTER).flop_registry
    for op in [op for op in registry if str(op).startswith("fusedres")]:
        del registry[op]


@mutant("patching/test_copies.py::test_a_copy_trains_the_same_and_apart[pickle-separate]")
def loses_reduce():
    def change(cls):
        if "__reduce_ex__" in vars(cls):
            type.__delattr__(cls, "__reduce_ex__")
        return cls

    wrap(patched_class, "subclass", on_result(change))


@mutant("patching/test_patching.py::test_patch_returns_the_same_model_and_changes_nothing_visible")
def adds_a_buffer():
    def make(right):
        def wrong(block, state):
            block.register_buffer("mask", torch.zeros(1))
            right(block, state)

        return wrong

    wrap(install, "install", make)


@mutant("autograd/test_transforms.py::test_an_in_place_operation_on_the_output_is_legal")
def returns_a_view():
    wrap(separate, "forward", on_output(lambda y: y[:]))


@mutant("blocks/test_dtypes_and_layouts.py::test_half_weights_with_float32_norms[separate-basic-bf16]")
def returns_float32():
    wrap(separate, "forward", on_output(lambda y: y.float()))


@mutant("blocks/test_dtypes_and_layouts.py::test_memory_formats[InPlaceAdd-channels_last]")
def returns_nchw():
    wrap(separate, "forward", on_output(lambda y: y.contiguous()))


@mutant("blocks/test_dtypes_and_layouts.py::test_memory_formats[FunctionalReLU-channels_last]")
def ignores_mixed_layouts():
    guards.is_nchw = lambda weight: True


@mutant("patching/test_guards.py::TestPerCallGuards::test_autocast_with_float32_input_keeps_the_result_type")
def ignores_autocast():
    for module in (residual_block, guards, install):
        module.compute_dtype = lambda x: x.dtype


@mutant("patching/test_instance_attributes.py::test_set_after_patching[circular-separate]")
def sees_no_new_attributes():
    shadows.new_attribute = lambda *args: None


@mutant("patching/test_instance_attributes.py::test_set_before_patching[doubled]")
def reads_the_class_alone():
    shadows.shadowing = lambda module: None


@mutant("patching/test_instance_attributes.py::test_in_a_compiled_graph[bottleneck]")
def compiles_past_attributes():
    wrap(
        shadows,
        "new_attribute",
        lambda right: lambda m, f, h, compiling: None if compiling else right(m, f, h, False),
    )


@mutant("patching/test_instance_attributes.py::test_the_stem_of_a_model[before]")
def trusts_the_instances_of_a_stem():
    shadows.shadowing = lambda module: None


@mutant("autograd/test_thread_state.py::test_the_original_runs[Decorated]")
def sees_no_state_of_torch():
    ambient.state = lambda: ()


@mutant("autograd/test_thread_state.py::test_the_original_runs[OnDeterminism]")
def hears_no_question_about_state():
    ambient.question = lambda functions: None


@mutant("autograd/test_thread_state.py::test_verify_compares_layouts")
def verifies_values_alone():
    verify.differing = lambda actual, expected: 0.0


@mutant("patching/test_input_checks.py::test_a_blocks_own_checks_of_its_input[EvenWidth-separate]")
def takes_a_blocks_own_errors_for_torchs():
    every_path.FAILS_AS_FUSED = {*every_path.FAILS_AS_FUSED, None}


@mutant("patching/test_input_checks.py::test_a_blocks_own_checks_of_its_input[AtMost-separate]")
def tries_no_sizes_of_the_code():
    own_sizes.numbers_named = lambda modules: set()


@mutant("patching/test_kinds_of_tensors.py::test_other_paths_for_other_kinds_of_tensors[GivesFloat64]")
def tries_one_kind_of_tensor():
    every_path.check_kinds_of_tensors = lambda paths, first, training: None


@mutant("patching/test_classes_around.py::test_modules_around_that_ask_for_the_type[AsksTypeOfBlock-False]")
def overlooks_modules_around():
    own_code.types_asked_for = lambda cls: frozenset()


@mutant(
    "patching/test_forwards_put_back.py::test_every_forward_of_a_model_wrapped_and_put_back[hook, unhook, patch]"
)
def leaves_a_forward_in_the_way():
    shadows.has_own_forward = lambda module: False


@mutant("patching/test_instance_attributes.py::test_what_hides_a_parameter_a_buffer_or_a_submodule[weight]")
def looks_at_the_class_alone():
    shadows.hidden = lambda cls, module, name: getattr(cls, name, shadows.MISSING)


@mutant("patching/test_patched_classes.py::test_classes_that_act_when_subclassed[InRegistry]")
def subclasses_as_anybody_would():
    patched_class.derive = lambda base, namespace: type(base.__name__, (base,), namespace)


@mutant("patching/test_patched_classes.py::test_an_error_while_installing_leaves_the_model_as_it_was")
def stops_half_way():
    def half(modules):
        for module, wanted in modules:
            if wanted is not None:
                install.install(module, wanted)

    install.install_all = half


@mutant("patching/test_patched_classes.py::test_another_module_made_from_the_class[False]")
def makes_patched_modules():
    del derived_class.PatchedType.__call__


@mutant("patching/test_patched_classes.py::test_the_method_of_the_class_called_with_another_module")
def takes_every_module_for_a_patched_one():
    wrap(
        install,
        "call",
        lambda right: (
            lambda module, *args: right(module, *args) if vars(module)[derived_class.STATE] else None
        ),
    )
    install.BEHAVIOUR = install.BEHAVIOUR._replace(call=install.call)


@mutant("patching/test_patched_classes.py::test_forwards_that_ask_for_their_class[TrainsBySuperOfType-False]")
def overlooks_super_of_the_own_type():
    own_code.skips_own_class = lambda cls: False


@mutant("patching/test_patched_classes.py::test_forwards_that_ask_for_their_class[AsksDunderClass-False]")
def runs_dry_under_the_own_class_alone():
    wrap(
        every_path, "trace", lambda right: lambda *args, subclassed=False, **context: right(*args, **context)
    )


@mutant("patching/test_patched_classes.py::test_a_pickle_is_loaded_with_weights_only")
def pickles_the_plan():
    del state.BlockState.__reduce__


@mutant("patching/test_numbers.py::test_a_number_that_is_left_to_torch[momentum]")
def takes_any_number():
    running_stats.momentum = lambda bn: bn.momentum
    residual_block.real = residual_block.whole = lambda value, name: value
    residual_block.pair = lambda value, name: value if isinstance(value, tuple) else (value, value)


@mutant("patching/test_numbers.py::test_norms_that_share_a_buffer[mean]")
def moves_shared_statistics_together():
    call.shared_statistics = lambda *_: None


@mutant("matching/test_lazy_modules.py::test_a_lazy_head_hides_no_block[head1]")
def looks_into_uninitialised_modules():
    dry_run.is_uninitialised = lambda module: False


@mutant("matching/test_stem_reach.py::test_a_forward_that_passes_the_method_by[Encoder]")
def trusts_that_the_stem_is_called():
    stems.reaches = lambda base, method: True


@mutant("matching/test_stem_reach.py::test_a_caller_that_passes_the_method_by")
def trusts_the_callers_of_a_stem():
    api.is_passed_by = lambda found: False


@mutant("matching/test_profiler_labels.py::test_a_label_is_kept[KeptLabel]")
def loses_labels():
    grammar.check_no_labels = lambda stand_in, channels: None


@mutant("patching/test_warm_calls.py::test_warmed_as_the_reason_advises_it_is_fused")
def compiles_inside_of_a_capture():
    warm.not_warm = lambda *call: None


@mutant("patching/test_warm_calls.py::test_another_kind_of_call_is_cold")
def takes_any_call_for_warm():
    warm.kind_of = lambda *call: ()


@mutant("measuring/test_graphed.py::test_training_is_what_it_is_without_graphs[None]")
def hands_out_the_memory_of_gradients():
    def make(right):
        def replay_backward(graphs, turn, given):
            right(graphs, turn, given)
            by_source = dict(zip(map(id, graphs.wanted), graphs.gradients, strict=True))
            return [None if (g := by_source.get(id(t))) is None else g.detach() for t in graphs.sources]

        return replay_backward

    wrap(cuda_graphs.CudaGraphs, "replay_backward", make)


@mutant("measuring/test_graphed.py::test_no_backward_of_a_replaced_forward")
def takes_any_forward_for_its_own():
    def make(right):
        return lambda graphs, turn, given: right(graphs, graphs.turn, given)

    wrap(cuda_graphs.CudaGraphs, "replay_backward", make)


@mutant("measuring/test_graphed.py::test_casts_of_weights_are_made_in_each_replay")
def captures_the_cache_of_autocast():
    graphed.without_cache = lambda device_type: contextlib.nullcontext()


@mutant("measuring/test_graphed.py::test_capturing_leaves_everything_as_it_was")
def moves_statistics_while_it_warms_up():
    graphed.restored_buffers = lambda model: contextlib.nullcontext()


@mutant("measuring/test_graphed.py::test_capturing_leaves_everything_as_it_was")
def draws_random_numbers_while_it_warms_up():
    torch.random.fork_rng = lambda devices: contextlib.nullcontext()


@mutant("measuring/test_graphed.py::test_a_model_changed_since")
def replays_whatever_the_model_is_now():
    captured_state.ModelState.check = lambda state: None


@mutant("measuring/test_graphed.py::test_another_input")
def copies_inputs_of_any_form():
    captured_state.form = lambda t: ()


@mutant("measuring/test_graphed.py::test_models_that_no_graph_can_hold")
def captures_cumulative_averages():
    capturable.check_norms = lambda model: None


TRIALS = "trials/test_misuse.py"


@mutant(f"{TRIALS}::test_checkpoints_that_wait_keep_their_recipe")
def forgets_how_a_checkpoint_began():
    kind.Kind.hold = lambda self, y: None


@mutant(f"{TRIALS}::test_two_forwards_before_a_backward")
def tells_autograd_of_running_statistics():
    running_stats.versions_kept = lambda running: contextlib.nullcontext()
    running_stats.moved_natively = lambda seen: False


@mutant("trials/test_proof.py::test_what_was_found_is_known_in_the_next_process")
def proves_nothing_that_a_table_names():
    wrap(proof, "prove", lambda right: lambda *a: None if user_table.table() else right(*a))


@mutant(f"{TRIALS}::test_a_candidate_without_memory_in_its_backward_is_out_after_it")
def tries_what_failed_in_its_backward_again():
    wrap(timed, "time_backward", lambda right: lambda *a: right(*a[:5], lambda: None))


@mutant(f"{TRIALS}::test_a_graph_of_torch_compile_holds_nothing_of_it")
def asks_for_trials_in_a_graph():
    wrap(
        call,
        "decide",
        lambda right: lambda m, s, *rest: (user_table.has_trials(torch.device("cpu")), right(m, s, *rest))[1],
    )


@mutant("trials/test_patched_models.py::test_the_wins_of_blocks_that_do_not_add_up_are_taken_back")
def trusts_the_wins_of_blocks():
    whole_model.WholeModel.begin = lambda self, *call: (True, None)


PROLOGUE = "blocks/test_prologue.py"


@mutant(f"{PROLOGUE}::test_a_graph_keeps_what_no_convolution_can_make")
def keeps_no_activation_in_a_graph():
    recipe.Recipe.kept_activations = lambda self, config, units, stored: (None,) * len(stored)


@mutant(f"{PROLOGUE}::test_no_inner_activation_is_stored")
def stores_every_activation():
    wrap(separate, "unstored", lambda right: lambda *args: None)


REPLAYS = "recording/test_replays.py"


@mutant(f"{REPLAYS}::test_absent_tensors_are_part_of_the_form")
def takes_one_absent_tensor_for_another():
    wrap(replays, "pass_of", lambda right: lambda key: right(key[::2]))


@mutant(f"{REPLAYS}::test_autograd_is_told_of_what_a_replay_writes_into")
def tells_autograd_twice():
    recorder.Recorder.told = property(lambda self: {}, lambda self, value: None)


@mutant(f"{REPLAYS}::test_after_an_input_was_written_into_the_error_is_raised")
def runs_a_pass_again_that_has_written():
    replays.failed = lambda error, recording, found, compute: compute()


@mutant("recording/test_recorder.py::test_what_is_read_no_more_is_given_back")
def keeps_every_tensor_to_the_end():
    code.with_frees = lambda steps, kept, inputs: list(steps)


@mutant("recording/test_recorded_models.py::test_training_and_inference")
def records_composite_operators():
    recorder.is_composite = lambda name: False


@mutant("patching/test_fits.py::test_a_weight_of_another_layout_is_seen")
def compares_no_strides():
    fits.places.of = lambda tensors: None  # else the native library compares
    wrap(fits, "likeness", lambda right: lambda tensors: [v for v in right(tensors) if type(v) is not tuple])


@mutant("patching/test_fits.py::test_a_weight_of_another_layout_is_seen")
def trusts_places():
    fits.Fit.holds = lambda self, tensors: True


@mutant("recording/test_bundles.py::test_what_is_somebody_elses_is_not_kept")
def bundles_what_is_somebody_elses():
    def init(right):
        def made(self, *args):
            right(self, *args)
            self.may_keep = True

        return made

    wrap(replays.Recording, "__init__", init)


@mutant("recording/test_bundles.py::test_a_bundle_is_given_back_with_the_last_that_holds_it")
def keeps_bundles():
    bundle.Bundle.__del__ = lambda self: None


@mutant("patching/test_bound.py::test_a_change_between_two_bound_calls_counts[a hook]")
def watches_no_hooks():
    watch.HOOKS = ()


@mutant("patching/test_bound.py::test_a_change_between_two_bound_calls_counts[eps]")
def watches_no_numbers():
    watch.NUMBERS_OF_BN = watch.NUMBERS_OF_BN[1:]


@mutant(
    "patching/test_bound.py::test_a_change_between_two_bound_calls_counts[an attribute that forward reads]"
)
def watches_no_attributes():
    wrap(watch, "expected_of", lambda right: lambda found, *a: right(found._replace(attributes=()), *a))


@mutant("patching/test_bound.py::test_a_change_between_two_bound_calls_counts[another storage]")
def binds_to_no_places():
    def at_any_place(right):
        return lambda self, replay, call, *a: right(self, replay, (*call[:4], 0, *call[5:]), *a)

    wrap(replays.Recording, "run_block", at_any_place)


@mutant("patching/test_bound.py::test_a_call_in_another_context_is_not_the_bound_one")
def binds_whatever_autocast_says():
    bound.autocast_dtype = lambda device: None


@mutant("patching/test_bound.py::test_auto_is_bound_while_its_tables_are_the_same")
def binds_whatever_tables_say():
    bound.Chosen.holds = lambda self, *a: True


@mutant("patching/test_bound_stems.py::test_a_change_between_two_bound_calls_counts[ceil]")
def watches_no_pooling():
    watch.NUMBERS_OF_POOL = ()


@mutant("patching/test_bound_stems.py::test_a_stem_is_bound[torchvision-layout0]")
def binds_a_stem_to_images_as_they_are():
    def as_they_are(right):
        def init(self, *args):
            right(self, *args)
            self.stem_takes = None

        return init

    wrap(bound.Bound, "__init__", as_they_are)


@mutant("patching/test_bound.py::test_a_bound_block_keeps_nothing_that_was_replaced")
def watches_modules_themselves():
    wrap(fits, "watch_of", lambda right: lambda block, plan, modules: (*right(block, plan, modules), modules))


@mutant("recording/test_replays.py::test_a_kernel_that_somebody_put_before_torchs_is_not_passed_by")
def passes_by_kernels_of_others():
    recorder.is_called_directly = lambda name, device: name in recorder.DIRECT


@mutant("patching/test_fits.py::test_a_change_between_two_calls_counts")
def compares_no_constants():
    wrap(fits, "gathered", lambda right: lambda *a: None if (found := right(*a)) is None else ([], found[1]))


@mutant("patching/test_fits.py::test_a_list_of_numbers_is_read_always")
def trusts_lists():
    fits.CONSTANT_TYPES.add(list)


@mutant("native/test_kept_memory.py::test_memory_is_not_given_away_while_somebody_holds_it[a view]")
def gives_away_memory_that_is_held():
    kept_memory.Kept.holders = lambda self: kept_memory.holders_of_free()


@mutant("native/test_kept_memory.py::test_memory_is_not_given_away_while_somebody_holds_it[its storage]")
def looks_at_the_tensors_alone():
    kept_memory.Kept.holders = lambda self: kept_memory.use_count(self.storage._cdata)
    kept_memory.holders_of_free = lambda: 1


@mutant("native/test_kept_memory.py::test_memory_that_somebody_changed_is_not_given_away")
def gives_away_memory_that_was_shared():
    kept_memory.Kept.is_as_made = lambda self: self.storage.nbytes() == self.size


def run(name: str) -> None:
    """Exits with pytest's status for the mutant's test: 1 where it failed, as it must."""
    test, apply = MUTANTS[name]
    apply()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS / test)])
    if status not in (0, 1):
        print(output.getvalue(), file=sys.stderr)
    sys.exit(int(status))


def main() -> int:
    names = sys.argv[1:] or list(MUTANTS)
    context = multiprocessing.get_context("fork")
    missed = []
    for name in names:
        process = context.Process(target=run, args=(name,))
        process.start()
        process.join()
        caught = process.exitcode == pytest.ExitCode.TESTS_FAILED
        print(f"{'caught' if caught else 'MISSED'}  {name}  by {MUTANTS[name][0]}", flush=True)
        if not caught:
            missed.append(name)
    print(f"{len(names) - len(missed)} of {len(names)} wrong patchers caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
