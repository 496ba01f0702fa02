"""Every recipe on every form of block in 16 bits on a CPU: signs, output and gradients by the rule of accuracy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from block_accuracy import assert_block_as_accurate_as_eager, by_recipe, inputs, read
from block_forms import RECIPE_FORM_IDS, RECIPE_FORMS

from fusedres.ops.dispatch import dispatcher

every_form = pytest.mark.parametrize(("recipe", "form"), RECIPE_FORMS, ids=RECIPE_FORM_IDS)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_block_is_as_accurate_as_eager(recipe, form, dtype):
    block, x, dy = inputs(form, dtype)
    config, units = read(block, x)
    run = partial(by_recipe, dispatcher("auto"), recipe)
    assert_block_as_accurate_as_eager(run, config, x, units, dy)
