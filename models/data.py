"""Data sets as images, labels and splits. Nothing is ever fetched: what is absent is an error."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Images = npt.NDArray[Any] | Tensor

TILE = 32


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split into what models train on and what a gallery holds."""

    #: (n, channels, height, width), float32 in [0, 1] or uint8
    train_images: npt.NDArray[Any]
    #: (n,) int64
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[Any]
    test_labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]

    @property
    def channels(self) -> int:
        return int(self.train_images.shape[1])

    @cached_property
    def digest(self) -> str:
        """Return a digest of the contents: a result that was made of other images or labels is another result."""
        whole = hashlib.sha256(repr(self.class_names).encode())
        for values in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            whole.update(repr((values.shape, values.dtype.str)).encode())
            whole.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return whole.hexdigest()

    def of_classes(self, count: int) -> Dataset:
        """Return the part of the first `count` classes, as the literature splits: by class index."""
        train, test = self.train_labels < count, self.test_labels < count
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
            class_names=self.class_names[:count],
        )


def digits() -> Dataset:
    """Load scikit-learn's bundled handwritten digits: 1,797 real images of 8 x 8, half to train and half to test.

    The split is stratified and always the same: of each class every second image, in the bundled order.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only training needs scikit-learn, the worker does not

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    place = np.empty(len(labels), np.int64)  # each image's place within its class
    for label in np.unique(labels):
        place[labels == label] = np.arange((labels == label).sum())
    train = place % 2 == 0
    names = tuple(str(name) for name in bunch.target_names)
    return Dataset(images[train], labels[train], images[~train], labels[~train], names)


def cifar100(root: str | Path) -> Dataset:
    """Load CIFAR-100 from lossless WebP sheets of tiles, one per class and split.

    Args:
        root: the folder with `labels.json` and the sheets `train/<fine name>.webp` and `test/<fine name>.webp`;
            `labels.json` has `fine_names`, and `train_grid_cols_rows` and `test_grid_cols_rows`, the tiles of a sheet.

    Returns:
        50,000 + 10,000 images (n, 3, 32, 32) uint8, class by class, classes in the order of `labels.json`.

    Raises:
        FileNotFoundError: a file is missing there.
        ValueError: a sheet is not of the size its grid says.
    """
    root = Path(root)
    if not (root / "labels.json").is_file():
        raise FileNotFoundError(f"{root} has no labels.json: give the folder that holds the CIFAR-100 sheets")
    labels = json.loads((root / "labels.json").read_text(encoding="utf-8"))
    names = tuple(labels["fine_names"])
    splits = {}
    for split in ("train", "test"):
        columns, rows = labels[f"{split}_grid_cols_rows"]
        splits[split] = [_tiles(root / split / f"{name}.webp", columns, rows) for name in names]
    return Dataset(
        np.concatenate(splits["train"]),
        _class_by_class(splits["train"]),
        np.concatenate(splits["test"]),
        _class_by_class(splits["test"]),
        names,
    )


def as_tensor(values: Images) -> Tensor:
    """Return images or labels as a tensor, copying only what torch may not write to."""
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def as_floats(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1], in the memory order that convolutions on a CPU like."""
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return scaled.contiguous(memory_format=torch.channels_last)


def _tiles(path: Path, columns: int, rows: int) -> npt.NDArray[np.uint8]:
    """Cut a sheet into its images (columns * rows, 3, 32, 32), row by row."""
    from PIL import Image  # noqa: PLC0415 - as for scikit-learn

    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    if pixels.shape != (rows * TILE, columns * TILE, 3):
        raise ValueError(f"{path} has shape {pixels.shape}, not {columns} x {rows} tiles of {TILE} x {TILE}")
    tiles = pixels.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, TILE, TILE).copy()


def _class_by_class(images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(len(images)), [len(each) for each in images]).astype(np.int64)
