"""The stable codes for why a block was left alone or a call ran unfused, each with what to do about it."""

from __future__ import annotations

REASONS: dict[str, str] = {
    # found when the model is patched
    "not_residual": "its dataflow is not conv-BN-ReLU chains joined by one addition and a ReLU",
    "no_final_relu": "it ends in a bare addition (pre-activation form)",
    "unsupported_op": "its dataflow holds an operation that no recipe covers",
    "activation_not_relu": "only ReLU is fused",
    "mode_dependent": "training and evaluation take different paths through its forward",
    "shape_dependent": "its forward takes another path at other sizes of its input, or takes no others",
    "grad_mode_dependent": "its forward takes another path without gradients",
    "dtype_dependent": "its forward takes another path in other dtypes",
    "layout_dependent": "its forward takes another path for other memory formats",
    "asks_device": "its forward asks for the device of a tensor",
    "enters_state": "its forward enters autocast, a grad mode or another state of torch by itself",
    "asks_state": "its forward asks for autocast, grad mode, the default dtype or another state of torch",
    "asks_own_class": "its code, or that of a module around it, asks for its class in a way that would see it patched",
    "class_resists": "its class allows no subclass",
    "checks_input": "its forward raises errors of its own at some sizes",
    "not_called": "a convolution or BN of it is computed by a function that is given its parameters, not by its call",
    "hidden_write": "its forward writes into a tensor past autograd (.data, .detach() or torch.no_grad())",
    "dry_run_failed": "its forward cannot run on meta tensors",
    "mutates_input": "its forward changes its input in place",
    "mutates_module": "its forward stores state on the module, or in what the module holds",
    "checkpointed": "its forward checkpoints itself, or packs what autograd saves",
    "profiler_label": "it labels parts of itself for profilers (record_function, NVTX or ITT ranges)",
    "uninitialised": "it holds a lazy module that no call has initialised; call the model once, then patch again",
    "random": "its forward draws random numbers",
    "shared_module": "a convolution or BN of it is used elsewhere too",
    "unsupported_module": "a convolution or BN of it is of a class with behaviour of its own",
    "shortcut_not_a_module": "its shortcut is computed inline and cannot be called by itself",
    "stem_differs": "the method with its stem is not the one known for its class",
    "stem_not_called": "the forward of its class, or what was called last, computes the stem without its method",
    "instance_forward": "a forward was set on an instance",
    "instance_shadows": "an attribute set on an instance hides one of its class",
    "script_or_graph_module": "it is a ScriptModule or GraphModule",
    "excluded": "left out by include or exclude",
    # found when it is called
    "disabled": "inside fusedres.disabled()",
    "no_faster_recipe": "nothing measured is faster here; force one with recipe=",
    "no_1x1_expansion": "gram needs a last 1x1 convolution that expands at least twofold; runs separate",
    "float32_product": "gram fuses products of float16 and bfloat16 on a GPU: use autocast; runs separate",
    "few_values_per_channel": "gram's batch statistics need at least six values per channel; runs separate",
    "signature": "called with more than one positional tensor",
    "tensor_subclass": "the input or a parameter is not a plain tensor",
    "tracing": "traced, scripted, exported or transformed by torch.func: the original forward runs",
    "fake_mode": "under FakeTensorMode, which works out shapes: the original forward runs",
    "forward_ad": "forward-mode differentiation: the original forward runs",
    "hooks": "a hook is registered on a submodule, or globally on all modules",
    "module_replaced": "a submodule was replaced or changed its class; patch again",
    "forward_replaced": "its class, or a submodule's, was given another forward since patching; patch again",
    "attribute_changed": "an attribute of the block, a submodule or their classes changed since patching; patch again",
    "geometry_changed": "a convolution's stride, padding or dilation no longer fits the shortcut",
    "unusual_number": "a number of a convolution, norm or pooling is a tensor, a string or of another type; set it to "
    "one of Python or NumPy",
    "eps_not_positive": "an eps for which the original forward raises, or gives NaN",
    "shared_statistics": "a running statistic or batch counter of it is another tensor of it too",
    "parameter_shape": "a parameter or buffer has a shape that does not fit the rest of the block",
    "input_rank": "the input is not [N, C, H, W]",
    "input_channels": "the input's channels are not those of the first convolution",
    "empty_batch": "the batch has no elements",
    "single_value_per_channel": "one value per channel in training mode: the original forward raises",
    "dtype": "unsupported or mixed dtypes",
    "trainable_statistics": "the constants of a frozen norm want a gradient",
    "device": "input and parameters are on different devices, or on an unsupported one",
    "layout_mixed": "NCHW input under channels_last weights: the layout that comes out depends on the spelling",
    "layout_nchw": "NCHW on CUDA is slower fused: model.to(memory_format=torch.channels_last), inputs too",
}


def describe(code: str) -> str:
    """The sentence of a code; codes may carry a detail after a colon."""
    head, _, detail = code.partition(":")
    return f"{REASONS[head]} ({detail})" if detail else REASONS[head]
