import pytest
import torch

from models.augmentation import Augmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=generator(1))


STRONG = Augmentation(
    min_scale=0.4,
    max_scale=1.0,
    shift=0.1,
    rotation=20,
    stretch=0.3,
    shear=0.2,
    flip=True,
    light=0.4,
    grey=0.2,
    noise=0.1,
)


def test_nothing_asked_for_leaves_images_as_they_are() -> None:
    torch.testing.assert_close(Augmentation()(images(), generator()), images(), rtol=1e-4, atol=1e-5)


def test_a_view_has_the_shape_and_range_of_its_image() -> None:
    views = STRONG(images(), generator())
    assert views.shape == images().shape
    assert views.min() >= 0
    assert views.max() <= 1


def test_the_generator_decides_everything() -> None:
    torch.testing.assert_close(STRONG(images(), generator(3)), STRONG(images(), generator(3)), rtol=0, atol=0)
    assert not torch.equal(STRONG(images(), generator(3)), STRONG(images(), generator(4)))


def test_each_image_of_a_batch_gets_its_own_view() -> None:
    same = images(1).expand(6, -1, -1, -1)
    views = STRONG(same, generator())
    assert all(not torch.equal(views[i], views[j]) for i in range(6) for j in range(i))


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    given = images(200)
    views = Augmentation(flip=True)(given, generator())
    mirrored = (views - given.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    untouched = (views - given).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert bool((mirrored | untouched).all())
    assert 70 < int(mirrored.sum()) < 130


def test_a_grey_image_has_one_colour() -> None:
    views = Augmentation(grey=1.0)(images(), generator())
    torch.testing.assert_close(views[:, 0], views[:, 2])


def test_zooming_in_stays_inside_the_image() -> None:
    views = Augmentation(min_scale=0.5, max_scale=0.6)(torch.ones(50, 1, 16, 16), generator())
    inside = views[:, :, 1:-1, 1:-1]  # at the border, half a pixel is interpolated with what lies beyond
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_and_colour_images_are_both_taken(channels: int) -> None:
    assert STRONG(images(channels=channels), generator()).shape[1] == channels
