import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import as_floats, as_tensor, cifar100, digits
from tests.real_data import IMAGES, needs


def test_digits_are_split_in_half_class_by_class_and_always_the_same() -> None:
    data = digits()
    assert len(data.train_images) + len(data.test_images) == 1797
    difference = np.bincount(data.train_labels) - np.bincount(data.test_labels)
    assert set(difference.tolist()) <= {0, 1}
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert data.train_images.dtype == np.float32
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    assert data.class_names == tuple("0123456789")
    np.testing.assert_array_equal(digits().train_images, data.train_images)


def test_no_digit_is_in_both_splits() -> None:
    data = digits()
    train = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in train for image in data.test_images)


def test_the_first_classes_are_taken_by_index() -> None:
    part = digits().of_classes(5)
    assert set(part.train_labels.tolist()) == set(part.test_labels.tolist()) == {0, 1, 2, 3, 4}
    assert part.class_names == tuple("01234")
    assert len(part.train_images) == len(part.train_labels)


def sheets(root: Path, names: list[str], tiles: dict[str, np.ndarray]) -> None:
    """Write (classes, rows, columns, 32, 32, 3) tiles as sheets."""
    grids = {f"{split}_grid_cols_rows": [each.shape[2], each.shape[1]] for split, each in tiles.items()}
    (root / "labels.json").write_text(json.dumps({"fine_names": names, **grids}))
    for split, each in tiles.items():
        (root / split).mkdir()
        for name, grid in zip(names, each, strict=True):
            pixels = grid.transpose(0, 2, 1, 3, 4).reshape(grid.shape[0] * 32, grid.shape[1] * 32, 3)
            Image.fromarray(pixels).save(root / split / f"{name}.webp", lossless=True)


def test_sheets_are_cut_into_images_row_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles = {
        "train": rng.integers(0, 256, (2, 2, 3, 32, 32, 3), np.uint8),
        "test": rng.integers(0, 256, (2, 1, 2, 32, 32, 3), np.uint8),
    }
    sheets(tmp_path, ["apple", "baby"], tiles)
    data = cifar100(tmp_path)
    assert data.class_names == ("apple", "baby")
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(data.train_images[4].transpose(1, 2, 0), tiles["train"][0, 1, 1])
    np.testing.assert_array_equal(data.test_images[3].transpose(1, 2, 0), tiles["test"][1, 0, 1])


def test_a_sheet_of_another_size_than_its_grid_is_refused(tmp_path: Path) -> None:
    tiles = np.zeros((1, 1, 2, 32, 32, 3), np.uint8)
    sheets(tmp_path, ["apple"], {"train": tiles, "test": tiles})
    (tmp_path / "labels.json").write_text(
        json.dumps({"fine_names": ["apple"], "train_grid_cols_rows": [3, 1], "test_grid_cols_rows": [2, 1]})
    )
    with pytest.raises(ValueError, match="not 3 x 1 tiles"):
        cifar100(tmp_path)


def test_a_folder_without_the_data_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no labels\.json"):
        cifar100(tmp_path)


@pytest.mark.slow
@needs(IMAGES)
def test_the_real_cifar100_has_its_published_numbers() -> None:
    data = cifar100(IMAGES)
    assert np.bincount(data.train_labels).tolist() == [500] * 100
    assert np.bincount(data.test_labels).tolist() == [100] * 100
    means = [float(data.train_images[:, channel].mean()) / 255 for channel in range(3)]
    assert means == pytest.approx([0.5071, 0.4865, 0.4409], abs=1e-4)


def test_bytes_become_floats_between_zero_and_one() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(as_floats(images).flatten(), torch.tensor([0, 0.2, 1]))


def test_a_read_only_array_becomes_a_tensor_without_a_warning() -> None:
    values = np.arange(3.0)
    values.flags.writeable = False
    assert as_tensor(values).tolist() == [0, 1, 2]
