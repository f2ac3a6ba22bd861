from math import erf

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.captions import Vocabulary, caption_each
from models.dual_encoders import DualEncoder
from models.method import Batch, Setting
from models.methods.xbt import Xbt, XbtTuning
from models.plan import Plan
from models.training import train
from models.transformations import Transformation
from tests.models.test_dual_encoders import CONCEPTS, info_nce

OLD, NEW, FEATURES = 5, 7, 6
Arrays = dict[str, np.ndarray]


def method(old: int = OLD, **options: float) -> Xbt:
    torch.manual_seed(0)
    return Xbt(Setting(old_dimension=old, new_dimension=NEW), **options)  # type: ignore[arg-type]


def texts(rows: int = 20) -> Batch:
    """Vectors of the same texts by both models."""
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(rows, NEW, generator=generator)
    return Batch(new=new, old=torch.tanh(new @ torch.randn(NEW, OLD, generator=generator)))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def project(vectors: np.ndarray, state: Arrays) -> np.ndarray:
    """A unit vector through d_new -> 4 d_new -> d_old with GELU, beside a linear skip; a unit vector again."""
    vectors = unit(vectors)
    hidden = vectors @ state["layers.0.weight"].T + state["layers.0.bias"]
    hidden *= (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2
    skipped = vectors @ state["skip.weight"].T + state["skip.bias"]
    return unit(hidden @ state["layers.1.weight"].T + state["layers.1.bias"] + skipped)


def exported(xbt: Xbt) -> Transformation:
    projector = xbt.transformations().backward
    assert projector is not None
    return projector


def arrays(module: torch.nn.Module) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


def test_without_noise_the_losses_are_the_cosine_and_the_contrast_of_the_papers_projector() -> None:
    xbt, rows = method(noise=0.0, temperature=0.2).train(), texts()
    assert rows.new is not None
    assert rows.old is not None
    predicted, old = project(rows.new.double().numpy(), arrays(xbt.projector)), unit(rows.old.double().numpy())
    losses = xbt.losses(rows)
    assert losses["alignment"].item() == pytest.approx(float((1 - (predicted * old).sum(axis=1)).mean()), rel=1e-4)
    assert losses["contrast"].item() == pytest.approx(info_nce(predicted, old, 1 / 0.2), rel=1e-4)


def test_noise_is_added_to_the_unit_vector_while_training_and_never_after() -> None:
    xbt, rows = method(noise=0.3), texts()
    assert rows.new is not None
    torch.manual_seed(5)
    noisy = xbt.train().losses(rows)
    torch.manual_seed(5)
    moved = F.normalize(rows.new, dim=1) + 0.3 * torch.randn(20, NEW)
    quiet = xbt.eval().losses(Batch(new=moved, old=rows.old))
    for name, loss in noisy.items():
        torch.testing.assert_close(quiet[name], loss)
    assert (quiet["alignment"] - xbt.losses(rows)["alignment"]).abs() > 1e-3


def test_noise_is_drawn_on_the_cpu_wherever_it_is_added_since_a_checkpoint_keeps_that_state_alone() -> None:
    with torch.device("meta"):  # another device, which is everywhere
        method = Xbt(Setting(old_dimension=4, new_dimension=6)).train()
        batch = Batch(old=torch.rand(3, 4), new=torch.rand(3, 6))
    before = torch.get_rng_state()
    method.losses(batch)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_losses_do_not_see_how_long_vectors_are() -> None:
    xbt, rows = method(noise=0.0), texts()
    assert rows.new is not None
    assert rows.old is not None
    scaled = xbt.losses(Batch(new=3 * rows.new, old=rows.old / 2))
    for name, loss in xbt.losses(rows).items():
        torch.testing.assert_close(scaled[name], loss)


@pytest.mark.parametrize("old", [OLD, NEW], ids=["narrower", "as wide"])
def test_the_projector_is_four_times_as_wide_inside_and_has_a_linear_skip(old: int) -> None:
    projector = exported(method(old))
    assert {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()} == {
        "layers.0.weight": (4 * NEW, NEW),
        "layers.0.bias": (4 * NEW,),
        "layers.1.weight": (old, 4 * NEW),
        "layers.1.bias": (old,),
        "skip.weight": (old, NEW),
        "skip.bias": (old,),
    }
    assert projector(torch.randn(3, NEW)).norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_the_projector_is_the_way_back_and_the_new_model_is_left_alone() -> None:
    xbt, features = method(), torch.randn(4, NEW)
    assert xbt.transformations().forward is None
    assert xbt.embed(features) is features


@pytest.mark.parametrize("options", [{"noise": -0.1}, {"temperature": 0.0}])
def test_impossible_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="noise is at least 0 and temperature positive"):
        method(**options)


def pairs(rows: int = 48) -> tuple[DualEncoder, Batch]:
    """A new model, and image-text pairs for the second stage."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % len(CONCEPTS)
    features = rng.normal(size=(len(CONCEPTS), FEATURES))[labels] + 0.2 * rng.normal(size=(rows, FEATURES))
    captions = caption_each([CONCEPTS[label] for label in labels])
    torch.manual_seed(1)
    dual = DualEncoder(Vocabulary(captions), FEATURES, NEW, hidden=16)
    encoded = torch.from_numpy(dual.vocabulary.encode(captions))
    return dual, Batch(features=torch.from_numpy(features.astype(np.float32)), texts=encoded)


def tuning(**options: float) -> tuple[XbtTuning, Batch]:
    dual, rows = pairs()
    torch.manual_seed(2)
    return XbtTuning(dual, exported(method()), **options), rows  # type: ignore[arg-type]


def test_the_second_stage_contrasts_images_with_texts_behind_the_projector() -> None:
    task, rows = tuning(temperature=0.3)
    assert rows.features is not None
    assert rows.texts is not None
    new, projector = pairs()[0], arrays(task.projector)
    images = project(new.images(rows.features).detach().double().numpy(), projector)
    captions = project(new.texts(rows.texts).detach().double().numpy(), projector)
    assert task.losses(rows)["contrast"].item() == pytest.approx(info_nce(images, captions, 1 / 0.3), rel=1e-4)


def test_the_second_stage_trains_both_towers_low_rank_changes_and_nothing_else() -> None:
    task, rows = tuning(rank=2)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    history = train(task, rows, Plan(epochs=30, batch=24, learning_rate=2e-2, optimizer="adam"))
    assert history.epochs[-1]["contrast"] < history.epochs[0]["contrast"]
    changed = {name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"dual.{tower}.{place}.{factor}" for tower in ("image", "text") for place in (1, 3) for factor in ("a", "b")
    }


def test_the_tuned_model_is_a_plain_dual_encoder_that_embeds_alike() -> None:
    task, rows = tuning()
    train(task, rows, Plan(epochs=2, batch=24, learning_rate=1e-2, optimizer="adam"))
    assert rows.features is not None
    assert rows.texts is not None
    tuned, fresh = task.tuned(), pairs()[0]
    assert tuned.state_dict().keys() == fresh.state_dict().keys()
    torch.testing.assert_close(tuned.images(rows.features), task.dual.images(rows.features).detach())
    torch.testing.assert_close(tuned.texts(rows.texts), task.dual.texts(rows.texts).detach())
    assert not torch.allclose(tuned.images(rows.features), fresh.images(rows.features))


def test_the_callers_new_model_and_projector_stay_what_they_are() -> None:
    dual, rows = pairs()
    projector = exported(method())
    before = [tensor.clone() for module in (dual, projector) for tensor in module.state_dict().values()]
    train(XbtTuning(dual, projector), rows, Plan(epochs=2, batch=24, learning_rate=1e-2, optimizer="adam"))
    after = [tensor for module in (dual, projector) for tensor in module.state_dict().values()]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert all(parameter.requires_grad for module in (dual, projector) for parameter in module.parameters())


def test_before_training_the_second_stage_is_the_new_model() -> None:
    task, rows = tuning()
    assert rows.features is not None
    torch.testing.assert_close(task.dual.images(rows.features), pairs()[0].images(rows.features), rtol=0, atol=0)
