import numpy as np
import pytest
import torch

from models.encoders import Classifier, embed, residual_network


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
@pytest.mark.parametrize(("widths", "blocks"), [((16, 32, 128), 1), ((32, 64, 128), 2)])
def test_it_embeds_digits_and_cifar_without_negative_numbers(
    channels: int, size: int, widths: tuple[int, ...], blocks: int
) -> None:
    encoder = residual_network(channels=channels, widths=widths, blocks=blocks)
    vectors = embed(encoder, torch.rand(4, channels, size, size))
    assert vectors.shape == (4, encoder.dimension) == (4, 128)
    assert vectors.dtype == np.float32
    assert (vectors >= 0).all()
    assert (vectors > 0).any()


def test_batches_change_nothing() -> None:
    encoder = residual_network(channels=1, widths=(4, 8))
    images = torch.rand(10, 1, 8, 8)
    np.testing.assert_allclose(embed(encoder, images, batch=3), embed(encoder, images), rtol=1e-4, atol=1e-6)


def test_bytes_and_floats_of_the_same_images_embed_alike() -> None:
    encoder = residual_network(channels=3, widths=(4, 8))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    np.testing.assert_allclose(embed(encoder, images.numpy()), embed(encoder, images.float() / 255), rtol=1e-5)


def test_no_images_give_no_rows_of_the_right_width() -> None:
    assert embed(residual_network(channels=1, widths=(4, 8)), torch.rand(0, 1, 8, 8)).shape == (0, 8)


def test_a_second_block_adds_depth_at_the_same_resolution() -> None:
    def convolutions(blocks: int) -> int:
        network = residual_network(channels=1, widths=(4, 8), blocks=blocks)
        return sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())

    assert convolutions(1) == 1 + 2 * 2 + 1  # stem, two per stage, one skip where the width changes
    assert convolutions(2) == 1 + 4 * 2 + 1


def test_the_head_is_linear_without_a_bias() -> None:
    model = Classifier(residual_network(channels=1, widths=(4, 8)), 3).eval()
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(model(images), model.encoder(images) @ model.head.weight.T)


def test_a_network_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="a stage and a block"):
        residual_network(channels=1, widths=())
