"""Real images that need no download: scikit-learn's 1,797 scans of handwritten digits (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIZE = 16
TEST_SHARE = 0.25


class Digits(NamedTuple):
    """Images [N, 1, 16, 16] float32, standardised by the training set, and labels [N] int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int = 0) -> Digits:
    """The digits, resized from 8x8 to 16x16, split into training and test images of equal class shares."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=TEST_SHARE, random_state=seed, stratify=labels)
    train, test = (
        F.interpolate(
            torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8),
            size=SIZE,
            mode="bilinear",
            align_corners=False,
        )
        for part in split[:2]
    )
    mean, std = train.mean(), train.std()
    train_labels, test_labels = (torch.tensor(part) for part in split[2:])
    return Digits((train - mean) / std, train_labels, (test - mean) / std, test_labels)
