"""The images of a study: the bundled digits as they are, 8 x 8, or a folder with one sub-folder a class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.25
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LEAST_PER_CLASS = 4  # so that both parts of the split have one


class Images(NamedTuple):
    """Images [N, C, H, W] float32, standardised by the training part, and labels [N] int64 in [0, classes)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    source: str

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    def digest(self) -> str:
        """Of every image and label: what tells whether a study that goes on has the same ones."""
        found = hashlib.sha256(repr(self.classes).encode())
        for part in self[:4]:
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


def split(images: Tensor, labels: Tensor, classes: tuple[str, ...], source: str) -> Images:
    """Training and test images in equal class shares; the split is the same for every seed of a study."""
    chosen = train_test_split(range(len(labels)), test_size=TEST_SHARE, random_state=0, stratify=labels)
    train, test = (torch.tensor(part) for part in chosen)
    mean, std = images[train].mean(), images[train].std().clamp_min(1e-6)
    images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
    return Images(images[train], labels[train], images[test], labels[test], classes, source)


def digits() -> Images:
    """scikit-learn's 1,797 scans of handwritten digits (Alpaydin & Kaynak 1998), [N, 1, 8, 8]."""
    images, labels = load_digits(return_X_y=True)
    tensor = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    source = "scikit-learn's handwritten digits, 8 x 8"
    return split(tensor, torch.tensor(labels), tuple(map(str, range(10))), source)


def read_image(file: Path, size: int) -> Tensor:
    """[3, size, size] in [0, 1]

    Raises:
        ValueError: the file is no image that Pillow reads.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"fusedres study: {file} cannot be read as an image ({error}); remove it from the folder"
        ) from error
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = values.view(picture.height, picture.width, 3).permute(2, 0, 1).float().div(255)
    return F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]


def folder(path: Path, size: int) -> Images:
    """The images in the sub-folders of a folder, resized to [N, 3, size, size].

    Raises:
        ValueError: no folder, no images, fewer than two classes, or too few images of one.
    """
    if not path.is_dir():
        raise ValueError(
            f"fusedres study: --data {path} is no folder; it has to hold one sub-folder of images a class"
        )
    files = {
        sub.name: sorted(f for f in sub.rglob("*") if f.suffix.lower() in SUFFIXES)
        for sub in sorted(p for p in path.iterdir() if p.is_dir())
    }
    classes = tuple(name for name, found in files.items() if found)
    if not classes:
        raise ValueError(
            f"fusedres study: no images in sub-folders of {path}; "
            f"it has to hold one sub-folder a class, with files that end in {', '.join(SUFFIXES)}"
        )
    if len(classes) == 1:
        raise ValueError(
            f"fusedres study: {path} has images of one class, {classes[0]!r}; two are needed at least, "
            "each in a sub-folder of its own"
        )
    for name in classes:
        if len(files[name]) < LEAST_PER_CLASS:
            raise ValueError(
                f"fusedres study: class {name!r} in {path} has {len(files[name])} images, "
                f"needed are {LEAST_PER_CLASS} at least; add some or remove the class"
            )
    images = torch.stack([read_image(file, size) for name in classes for file in files[name]])
    labels = torch.tensor([i for i, name in enumerate(classes) for _ in files[name]])
    return split(images, labels, classes, f"{path.name}, {size} x {size}")
