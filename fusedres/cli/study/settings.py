"""How large a study is: depths, steps, seeds and grids, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The sizes of all four studies; every training has the same batch, learning rate and number of steps.

    seeds: one network, one order of batches and one pair of directions each.
    gradient_steps: length of the trainings along which gradients are measured; gradient_depth: their depth.
    exit_depths, landscape_depths: are among `depths`, so that networks are trained once.
    grid: points in each direction of a loss surface, which reaches from -reach to reach.
    """

    name: str
    seeds: tuple[int, ...]
    depths: tuple[int, ...]
    steps: int
    gradient_depths: tuple[int, ...]
    gradient_depth: int
    gradient_steps: int
    exit_depths: tuple[int, ...]
    landscape_depths: tuple[int, ...]
    grid: int
    surface_images: int
    hessian_images: int
    power_steps: int
    reach: float = 1.0
    batch: int = 64
    learning_rate: float = 0.1


def quick(seeds: tuple[int, ...]) -> Settings:
    """Under 10 minutes on two cores."""
    return Settings(
        name="quick",
        seeds=seeds,
        depths=(8, 20, 56),
        steps=100,
        gradient_depths=(8, 20, 110),
        gradient_depth=20,
        gradient_steps=40,
        exit_depths=(20,),
        landscape_depths=(20, 56),
        grid=11,
        surface_images=128,
        hessian_images=128,
        power_steps=12,
    )


def full(seeds: tuple[int, ...]) -> Settings:
    """More depths, longer trainings, finer surfaces: about three times as long."""
    return Settings(
        name="full",
        seeds=seeds,
        depths=(8, 20, 32, 56),
        steps=200,
        gradient_depths=(8, 20, 56, 110),
        gradient_depth=20,
        gradient_steps=100,
        exit_depths=(20, 56),
        landscape_depths=(20, 56),
        grid=17,
        surface_images=256,
        hessian_images=128,
        power_steps=24,
    )
