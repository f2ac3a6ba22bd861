import numpy as np
import pytest
import torch

from models.encoders import Classifier, Design, embed, residual_network


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
@pytest.mark.parametrize(("widths", "blocks"), [((16, 32, 128), 1), ((32, 64, 128), 2)])
def test_it_embeds_digits_and_cifar_without_negative_numbers(
    channels: int, size: int, widths: tuple[int, ...], blocks: int
) -> None:
    encoder = residual_network(Design(widths=widths, blocks=blocks), channels=channels)
    vectors = embed(encoder, torch.rand(4, channels, size, size))
    assert vectors.shape == (4, encoder.dimension) == (4, 128)
    assert vectors.dtype == np.float32
    assert (vectors >= 0).all()
    assert (vectors > 0).any()


def test_batches_change_nothing() -> None:
    encoder = residual_network(Design(widths=(4, 8)), channels=1)
    images = torch.rand(10, 1, 8, 8)
    np.testing.assert_allclose(embed(encoder, images, batch=3), embed(encoder, images), rtol=1e-4, atol=1e-6)


def test_bytes_and_floats_of_the_same_images_embed_alike() -> None:
    encoder = residual_network(Design(widths=(4, 8)), channels=3)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    np.testing.assert_allclose(embed(encoder, images.numpy()), embed(encoder, images.float() / 255), rtol=1e-5)


def test_no_images_give_no_rows_of_the_right_width() -> None:
    assert embed(residual_network(Design(widths=(4, 8)), channels=1), torch.rand(0, 1, 8, 8)).shape == (0, 8)


def test_a_second_block_adds_depth_at_the_same_resolution() -> None:
    def convolutions(blocks: int) -> int:
        network = residual_network(Design(widths=(4, 8), blocks=blocks), channels=1)
        return sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())

    assert convolutions(1) == 1 + 2 * 2 + 1  # stem, two per stage, one skip where the width changes
    assert convolutions(2) == 1 + 4 * 2 + 1


def test_the_head_is_linear_without_a_bias() -> None:
    model = Classifier(residual_network(Design(widths=(4, 8)), channels=1), 3).eval()
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(model(images), model.encoder(images) @ model.head.weight.T)


def test_a_network_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="a stage, a block and a patch"):
        Design(widths=())


def test_patches_halve_the_resolution_before_the_first_stage() -> None:
    images = torch.rand(2, 3, 16, 16)
    whole, cut = (residual_network(Design(widths=(4, 8), patch=patch), channels=3) for patch in (1, 2))
    assert cut.stem[0].in_channels == 12
    assert embed(cut, images).shape == embed(whole, images).shape == (2, 8)


def test_the_embeddings_width_can_differ_from_the_last_stages() -> None:
    design = Design(widths=(4, 16), blocks=2, dimension=6)
    assert embed(residual_network(design, channels=1), torch.rand(3, 1, 8, 8)).shape == (3, 6)
    assert embed(residual_network(design, channels=1, dimension=5), torch.rand(3, 1, 8, 8)).shape == (3, 5)


def test_without_the_last_relu_embeddings_have_both_signs() -> None:
    torch.manual_seed(0)
    vectors = embed(residual_network(Design(widths=(4, 8)), channels=1, ends_in_relu=False), torch.rand(9, 1, 8, 8))
    assert (vectors < 0).any()
    assert (vectors > 0).any()
