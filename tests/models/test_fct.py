import numpy as np
import pytest
import torch

from models.evaluation import cross_test, fraction_closed
from models.method import Batch, Setting
from models.methods.fct import Fct
from models.plan import Plan
from models.runtime import Transform
from models.training import train_transformation
from tests.real_data import EMBEDDINGS, needs


def method(side: int | None = 3, hidden: int = 16) -> Fct:
    torch.manual_seed(0)
    return Fct(Setting(old_dimension=6, new_dimension=4, side_dimension=side), hidden=hidden)


def batch(rows: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        old=torch.rand(rows, 6, generator=generator),
        side=torch.rand(rows, 3, generator=generator),
        new=torch.rand(rows, 4, generator=generator),
    )


def block(x: np.ndarray, state: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """A linear map without bias, BatchNorm by running statistics, ReLU, in NumPy."""
    x = x @ state[f"{prefix}.weight"].T
    x = (x - state[f"{prefix}.norm.running_mean"]) / np.sqrt(state[f"{prefix}.norm.running_var"] + 1e-5)
    return np.maximum(x * state[f"{prefix}.norm.weight"] + state[f"{prefix}.norm.bias"], 0)


def formula(old: np.ndarray, side: np.ndarray, state: dict[str, np.ndarray]) -> np.ndarray:
    branches = [block(block(old, state, "old.0"), state, "old.1"), block(block(side, state, "side.0"), state, "side.1")]
    mixed = block(block(np.concatenate(branches, axis=1), state, "mixer.0"), state, "mixer.1")
    return mixed @ state["mixer.2.weight"].T + state["mixer.2.bias"]


@pytest.mark.parametrize("side", [3, None], ids=["with side-information", "without"])
def test_the_loss_is_the_mean_square_over_all_elements_of_the_papers_network(side: int | None) -> None:
    fct, rows = method(side), batch()
    for _ in range(3):
        fct.losses(rows)  # moves the running statistics away from their start
    fct.eval()
    state = {name: t.double().numpy() for name, t in fct.transformation.state_dict().items()}
    assert rows.old is not None
    assert rows.new is not None
    assert rows.side is not None
    old, new = rows.old.double().numpy(), rows.new.double().numpy()
    predicted = formula(old, old if side is None else rows.side.double().numpy(), state)
    expected = sum((p - n) ** 2 for p, n in zip(predicted.ravel(), new.ravel(), strict=True)) / (20 * 4)
    assert fct.losses(rows)["alignment"].item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_does_not_depend_on_the_order_of_rows() -> None:
    fct, rows = method(), batch()
    shuffled = rows.take(torch.randperm(20, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(fct.losses(shuffled)["alignment"], fct.losses(rows)["alignment"])


def test_an_error_twice_as_large_costs_four_times_as_much() -> None:
    fct, rows = method().eval(), batch()
    assert rows.old is not None
    predicted = fct.transformation(rows.old, rows.side).detach()
    once = fct.losses(Batch(old=rows.old, side=rows.side, new=predicted + 0.5))["alignment"]
    twice = fct.losses(Batch(old=rows.old, side=rows.side, new=predicted + 1.0))["alignment"]
    torch.testing.assert_close(twice, 4 * once)


def test_the_new_model_is_left_alone() -> None:
    features = torch.randn(5, 4)
    assert method().embed(features) is features
    assert method().transformations().backward is None


def test_the_second_half_of_training_is_in_eval_mode_and_still_trains() -> None:
    fct = method()
    modes = []
    for epoch in range(5):
        fct.start_epoch(epoch, 5)
        modes.append(fct.transformation.training)
    assert modes == [True, True, True, False, False]
    before = fct.transformation.state_dict()["old.0.norm.running_mean"].clone()
    fct.losses(batch())["alignment"].backward()
    torch.testing.assert_close(fct.transformation.state_dict()["old.0.norm.running_mean"], before)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fct.transformation.parameters())


def test_a_batch_without_what_it_needs_is_refused() -> None:
    rows = batch()
    with pytest.raises(ValueError, match="needs `new`"):
        method().losses(Batch(old=rows.old, side=rows.side))
    with pytest.raises(ValueError, match="needs `side`"):
        method().losses(Batch(old=rows.old, new=rows.new))


@pytest.mark.slow
@needs(EMBEDDINGS)
def test_a_short_training_on_real_embeddings_closes_most_of_the_distance() -> None:
    with np.load(EMBEDDINGS) as files:
        train = {role: files[f"{role}_train"][::8].astype(np.float32) for role in ("old", "side", "new")}
        old, side, new = (files[f"{role}_test"][::4].astype(np.float32) for role in ("old", "side", "new"))
        labels = files["labels_test"][::4]
    torch.manual_seed(0)
    fct = Fct(Setting(old_dimension=128, new_dimension=128, side_dimension=128), hidden=256)
    plan = Plan(epochs=12, batch=128, learning_rate=1e-3, optimizer="adam", schedule="epoch")
    train_transformation(fct, **train, plan=plan)
    forward = fct.transformations().forward
    assert forward is not None
    upgraded = cross_test(new, Transform(forward)(old, side), labels)
    before, best = cross_test(old, old, labels), cross_test(new, new, labels)
    assert fraction_closed(before.cmc1, upgraded.cmc1, best.cmc1) > 0.6
    assert fraction_closed(before.map, upgraded.map, best.map) > 0.6
