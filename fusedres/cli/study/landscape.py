"""Study 4: the loss around a trained network, along two filter-normalised random directions (Li et al. 2018), and
the ends of its Hessian's spectrum.

Surface and Hessian are those of the loss in evaluation mode, on training images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

from fusedres.cli.study import depth as trainings
from fusedres.cli.study import networks, training
from fusedres.cli.study.networks import Kind
from fusedres.cli.study.settings import Settings
from fusedres.cli.study.tasks import Context, Task

KINDS = (networks.RESIDUAL, networks.PLAIN)
Direction = list[Tensor]


def directions(model: nn.Module, seed: int) -> tuple[Direction, Direction]:
    """Two of them, one tensor a parameter; each filter, or row, has the norm of the parameter's own.

    Parameters of one dimension, which are those of BN and the biases, stay as they are. A parameter's random numbers
    depend on the seed and its name: a residual network and its plain twin are moved alike.
    """
    first, second = (
        [direction(p, f"{seed} {which} {name}") for name, p in model.named_parameters()] for which in (0, 1)
    )
    return first, second


def direction(parameter: Tensor, seed: str) -> Tensor:
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    norms, own = (
        t.flatten(1).norm(dim=1).view(-1, *[1] * (t.dim() - 1)) for t in (drawn, parameter.detach())
    )
    return drawn * (own / norms)


@torch.no_grad()
def surface(
    model: nn.Module, along: tuple[Direction, Direction], grid: Tensor, images: Tensor, labels: Tensor
) -> list[list[float]]:
    """[len(grid), len(grid)]: the loss at weights + a*first + b*second. The weights are put back."""
    parameters = list(model.parameters())
    start = [p.clone() for p in parameters]
    rows: list[list[float]] = []
    for a in grid.tolist():
        rows.append([])
        for b in grid.tolist():
            for p, s, first, second in zip(parameters, start, *along, strict=True):
                p.copy_(s + a * first + b * second)
            rows[-1].append(F.cross_entropy(model(images), labels).item())
    for p, s in zip(parameters, start, strict=True):
        p.copy_(s)
    return rows


def hessian_product(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> H v, by a second backward through the blocks' first one; v [parameters] flat."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(images), labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])

    def product(v: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
        return torch.cat([t.flatten() for t in found])

    return product


def power(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[float, float]:
    """The eigenvalue of largest magnitude, and ||H v - value*v|| / |value|: how far the iteration still is from it."""
    v, value, left = start / start.norm(), 0.0, float("inf")
    for _ in range(steps):
        image = product(v)
        value = torch.dot(v, image).item()
        left = ((image - value * v).norm() / max(abs(value), 1e-30)).item()
        v = image / image.norm().clamp_min(1e-30)
    return value, left


def spectrum(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values and weights of that many Lanczos steps, every vector kept orthogonal to all before.

    The weights sum to 1: the values stand for the eigenvalues, each weight for the share that lies near it
    (stochastic Lanczos quadrature).
    """
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(steps):
        image = product(basis[-1])
        diagonal.append(torch.dot(basis[-1], image).item())
        for _ in range(2):  # once more, for what rounding left
            for vector in basis:
                image = image - torch.dot(vector, image) * vector
        length = image.norm().item()
        if length <= torch.finfo(start.dtype).eps * abs(diagonal[0]):
            break
        beside.append(length)
        basis.append(image / length)
    values, vectors = eigh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    return values, vectors[0] ** 2


def ends(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, steps: int, seed: int
) -> dict[str, Any]:
    """Of the Hessian: largest eigenvalue, the least one that Lanczos found, and the share of negative curvature.

    negative_curvature: the sum of |eigenvalue| over the negative ones, as a share of that over all, by quadrature.
    """
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    largest, left = power(product, start, steps)
    values, weights = spectrum(product, start, steps)
    mass = weights * np.abs(values)
    return {
        "largest": largest,
        "residual": left,
        "least": float(values[0]),
        "negative_curvature": float(mass[values < 0].sum() / max(mass.sum(), 1e-300)),
    }


def second_differences(values: np.ndarray, spacing: float) -> np.ndarray:
    """[n-2, n-2, 2, 2]: the Hessian of a surface at its inner points."""
    inner = values[1:-1, 1:-1]
    aa = values[2:, 1:-1] - 2 * inner + values[:-2, 1:-1]
    bb = values[1:-1, 2:] - 2 * inner + values[1:-1, :-2]
    ab = (values[2:, 2:] - values[2:, :-2] - values[:-2, 2:] + values[:-2, :-2]) / 4
    return np.stack([np.stack([aa, ab], -1), np.stack([ab, bb], -1)], -1) / spacing**2


def shape_of(values: list[list[float]], grid: np.ndarray) -> dict[str, float]:
    """negative: the share of inner points at which the surface curves downwards in some direction.

    roughness: the share of the surface's variance that the best quadratic does not explain; 0 for a paraboloid.
    """
    z = np.array(values)
    lowest = np.linalg.eigvalsh(second_differences(z, float(grid[1] - grid[0])))[..., 0]
    a, b = (t.ravel() for t in np.meshgrid(grid, grid, indexing="ij"))
    terms = np.stack([np.ones_like(a), a, b, a * a, a * b, b * b], 1)
    left = z.ravel() - terms @ np.linalg.lstsq(terms, z.ravel(), rcond=None)[0]
    return {"negative": float((lowest < 0).mean()), "roughness": float(left.var() / max(z.var(), 1e-300))}


def study(context: Context, kind: Kind, depth: int, seed: int) -> dict[str, Any]:
    settings, images = context.settings, context.images
    model = trainings.trained(context, kind, depth, seed)
    chosen = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(seed))
    pictures, labels = images.train[chosen], images.train_labels[chosen]
    grid = torch.linspace(-settings.reach, settings.reach, settings.grid, dtype=torch.float64)
    n, m = settings.surface_images, settings.hessian_images
    values = surface(model, directions(model, seed), grid, pictures[:n], labels[:n])
    networks.check_ran(model, kind)
    product = hessian_product(model, pictures[:m], labels[:m])
    size = sum(p.numel() for p in model.parameters())
    found = ends(product, size, torch.float32, settings.power_steps, seed)
    return {"surface": values, **shape_of(values, grid.numpy()), **found}


def tasks(settings: Settings) -> list[Task]:
    studied = [
        Task(f"landscape-{training.key(kind, depth, seed)}", study, (kind, depth, seed), after=1)
        for depth in sorted(settings.landscape_depths, reverse=True)
        for kind in KINDS
        for seed in settings.seeds
    ]
    return [*trainings.tasks(settings, KINDS, settings.landscape_depths), *studied]


def small(context: Context, is_patched: bool) -> Tensor:
    """A surface of 3 x 3 points and a product with the Hessian, of untrained networks, in float64."""
    images, labels = context.images.train[:32].double(), context.images.train_labels[:32]
    values = []
    for kind in KINDS:
        model = networks.small(context.images, kind, 8, is_patched).double().eval()
        along = directions(model, 0)
        grid = torch.linspace(-1, 1, 3, dtype=torch.float64)
        values.append(torch.tensor(surface(model, along, grid, images, labels)).flatten())
        v = torch.cat([d.flatten() for d in along[0]])
        values.append(hessian_product(model, images, labels)(v))
        if is_patched:
            networks.check_ran(model, kind)
    return torch.cat([v.double() for v in values])
