"""Study 3: where in a network each image is recognised, what later blocks do to it, and what a block is worth.

A linear probe reads the class from every block's output, averaged over space. An image's exit is the first block from
which on every probe is right.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fusedres.cli.study import depth as trainings
from fusedres.cli.study import networks, training
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings
from fusedres.cli.study.tasks import Context, Task

KINDS = (networks.RESIDUAL, networks.PLAIN)
PROBE_ITERATIONS = 300


@torch.no_grad()
def states(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The stem's output, then every block's."""
    found = [model.stem(images)]  # type: ignore[operator]
    for block in networks.blocks(model):
        found.append(block(found[-1]))
    return found


def pooled(found: list[Tensor]) -> list[np.ndarray]:
    """[N, C] of every block's output; 0 where a network that diverged has no number."""
    return [np.nan_to_num(state.mean((2, 3)).double().numpy()) for state in found[1:]]


def probed(
    train: list[np.ndarray], labels: np.ndarray, test: list[np.ndarray], truth: np.ndarray
) -> np.ndarray:
    """[blocks, N] bool: which test images the probe after each block gets right."""
    right = []
    for seen, unseen in zip(train, test, strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))
        right.append(probe.fit(seen, labels).predict(unseen) == truth)
    return np.stack(right)


def exits(right: np.ndarray) -> np.ndarray:
    """[N] the first block from which on an image is right; the number of blocks where the last one is wrong."""
    stays = np.logical_and.accumulate(right[::-1])[::-1]
    return np.where(stays.any(0), stays.argmax(0), len(right))


@torch.no_grad()
def moves(model: nn.Module, found: list[Tensor], right: np.ndarray) -> list[dict[str, Any]]:
    """What each block that keeps its input's shape does to the images that were right before it.

    ratio: ||F(x)|| / ||x||; cosine: of F(x) and x; kept: cosine of y and x. Means over those images.
    """
    rows = []
    for i, block in enumerate(networks.blocks(model)):
        x, y = found[i], found[i + 1]
        if i == 0 or x.shape != y.shape:
            continue
        chosen = torch.from_numpy(np.flatnonzero(right[i - 1]))
        if not len(chosen):
            continue
        x, y, branch = (t[chosen].flatten(1) for t in (x, y, networks.main_path(block, x)))
        rows.append(
            {
                "block": i,
                "images": len(chosen),
                "ratio": (branch.norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)).mean().item(),
                "cosine": F.cosine_similarity(branch, x).mean().item(),
                "kept": F.cosine_similarity(y, x).mean().item(),
            }
        )
    return rows


def lesions(model: nn.Module, removable: list[int], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Test error with blocks removed or swapped, of those whose input and output have one shape (Veit et al. 2016)."""
    blocks = networks.blocks(model)

    def error(order: list[nn.Module]) -> float:
        return training.error_rate(lambda x: networks.run(model, x, order), images, labels)

    def without(*gone: int) -> list[nn.Module]:
        return [block for i, block in enumerate(blocks) if i not in gone]

    def swapped(a: int, b: int) -> list[nn.Module]:
        order = list(blocks)
        order[a], order[b] = order[b], order[a]
        return order

    width = {i: blocks[i].conv2.weight.shape[0] for i in removable}  # type: ignore[union-attr,index]
    pairs = list(combinations(removable, 2))
    return {
        "whole": error(blocks),
        "single": [[i, error(without(i))] for i in removable],
        "pairs": [[a, b, error(without(a, b))] for a, b in pairs],
        "swaps": [[a, b, error(swapped(a, b))] for a, b in pairs if width[a] == width[b]],
    }


def measure(model: nn.Module, context: Context) -> dict[str, Any]:
    images = context.images
    dtype = next(model.parameters()).dtype
    unseen = states(model, images.test.to(dtype))
    labels, truth = images.train_labels.numpy(), images.test_labels.numpy()
    right = probed(pooled(states(model, images.train.to(dtype))), labels, pooled(unseen), truth)
    first = exits(right)
    last = len(right)
    removable = [i for i in range(last) if unseen[i].shape == unseen[i + 1].shape]
    return {
        "blocks": last,
        "probe_error": [1 - row.mean() for row in right.astype(float)],
        "exits": [
            np.bincount(first[truth == c], minlength=last + 1).tolist() for c in range(len(images.classes))
        ],
        "lost": float((right[:-1].any(0) & ~right[-1]).mean()),
        "moves": moves(model, unseen, right),
        "lesions": lesions(model, removable, images.test.to(dtype), images.test_labels),
    }


def study(context: Context, kind: Kind, depth: int, seed: int) -> dict[str, Any]:
    model = trainings.trained(context, kind, depth, seed)
    found = measure(model, context)
    networks.check_ran(model, kind)
    return found


def tasks(settings: Settings) -> list[Task]:
    studied = [
        Task(f"exits-{training.key(kind, depth, seed)}", study, (kind, depth, seed), after=1)
        for depth in sorted(settings.exit_depths, reverse=True)
        for kind in KINDS
        for seed in settings.seeds
    ]
    return [*trainings.tasks(settings, KINDS, settings.exit_depths), *studied]


def small(context: Context, is_patched: bool) -> Tensor:
    """Features of every block, the cosines and norms, and the outputs without one block, in float64."""
    images, values = context.images.test[:64].double(), []
    for kind in KINDS:
        model = networks.small(context.images, kind, 14, is_patched).double().eval()
        found = states(model, images)
        if is_patched:
            networks.check_ran(model, kind)
        blocks = networks.blocks(model)
        rows = moves(model, found, np.ones((len(blocks), len(images)), bool))
        without = networks.run(model, images, [block for block in blocks if block is not blocks[1]])
        values += [t.mean((2, 3)).flatten() for t in found]
        values += [
            torch.tensor([[r["ratio"], r["cosine"], r["kept"]] for r in rows]).double().flatten(),
            without,
        ]
    return torch.cat([v.detach().flatten() for v in values])
