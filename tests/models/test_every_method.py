"""What is registered is checked: a new line in METHODS is tested here without another line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifacts import save
from models.method import Method
from models.methods import METHODS
from models.runtime import load_transform
from models.training import Plan, train_transformation

WIDTHS = {"source_dimension": 6, "target_dimension": 4, "side_dimension": 3}
PLAN = Plan(epochs=30, batch=32, learning_rate=5e-3, optimizer="adam", schedule="epoch")


def made(method: type[Method]) -> Method:
    torch.manual_seed(0)
    return method(**WIDTHS)


def pairs(rows: int = 128) -> dict[str, np.ndarray]:
    """A new space that is a smooth function of the old one and the side-information."""
    rng = np.random.default_rng(0)
    old, side = rng.normal(size=(rows, 6)), rng.normal(size=(rows, 3))
    new = np.tanh(old @ rng.normal(size=(6, 4))) + 0.5 * side @ rng.normal(size=(3, 4))
    given = {"old": old, "side": side, "new": new}
    return {name: values.astype(np.float32) for name, values in given.items()} | {"labels": rng.integers(0, 5, rows)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
class TestEveryMethod:
    def test_its_name_is_its_key(self, method: type[Method]) -> None:
        assert METHODS[method.name] is method

    def test_training_lowers_its_finite_losses(self, method: type[Method]) -> None:
        history = train_transformation(made(method), **pairs(), plan=PLAN)
        assert all(np.isfinite(value) for epoch in history.epochs for value in epoch.values())
        assert history.epochs[-1]["total"] < 0.5 * history.epochs[0]["total"]

    def test_the_same_seed_gives_the_same_weights(self, method: type[Method]) -> None:
        first, second = made(method), made(method)
        for each in (first, second):
            train_transformation(each, **pairs(), plan=PLAN, seed=3)
        for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_its_transformations_have_the_right_widths_and_survive_a_round_trip(
        self, method: type[Method], tmp_path: Path
    ) -> None:
        trained = made(method)
        train_transformation(trained, **pairs(), plan=PLAN)
        given = pairs()
        offered = trained.transformations()
        directions = [(offered.forward, given["old"], 4), (offered.backward, given["new"], 6)]
        assert any(module is not None for module, _, _ in directions)
        for module, vectors, width in directions:
            if module is not None:
                save(tmp_path / "artifact", module)
                output = load_transform(tmp_path / "artifact")(vectors, given["side"])
                assert output.shape == (128, width)
                with torch.no_grad():
                    expected = module.eval()(torch.from_numpy(vectors), torch.from_numpy(given["side"]))
                np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)

    def test_it_refuses_bad_rows(self, method: type[Method]) -> None:
        given = pairs()
        given["old"][3, 1] = np.nan
        with pytest.raises(ValueError, match="old holds a NaN"):
            train_transformation(made(method), **given)
        with pytest.raises(ValueError, match="new has 100 rows, old has 128"):
            train_transformation(made(method), **{**pairs(), "new": given["new"][:100]})
        with pytest.raises(ValueError, match="at least two rows"):
            train_transformation(made(method), **{name: values[:1] for name, values in pairs().items()})
