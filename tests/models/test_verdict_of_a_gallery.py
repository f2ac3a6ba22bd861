"""A verdict without labels is for a gallery of more items than judge: here the whole of it is there to look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.fitting import Options, assess, fit
from models.inputs import Pairs
from models.runtime import Transform
from models.transformations import Linear, LinearTransformation, Transformation
from models.verdict import Metrics, Sample, carried, give_verdict, judge_of
from tests.real_data import EMBEDDINGS, needs

COARSE, FINE = 4, 12


def world(rows: int, *, noise: float, fine: float) -> Pairs:
    """An old model that sees coarse differences through noise and fine ones well; what it hides of the coarse ones is exact."""
    rng = np.random.default_rng(0)
    coarse, small = 3 * rng.normal(size=(rows, COARSE)), fine * rng.normal(size=(rows, FINE))
    blurred = coarse + noise * rng.normal(size=coarse.shape)
    source = np.concatenate([blurred, small, 0.001 * coarse], axis=1)
    return Pairs(source=source.astype(np.float32), target=np.concatenate([coarse, small], axis=1).astype(np.float32))


def only_coarse() -> Transformation:
    """The map that reads what is hidden, and loses what is fine."""
    module = LinearTransformation(Linear(source_dimension=2 * COARSE + FINE, target_dimension=COARSE + FINE))
    with torch.no_grad():
        module.weight.zero_()
        module.weight[:COARSE, -COARSE:] = 1000 * torch.eye(COARSE)
    return module


def gain(pairs: Pairs, module: Transformation, metric: str, queries: int = 1_000) -> float:
    """Search among all these pairs: what upgrading changes."""
    sample = Sample(pairs=pairs, queries=queries)
    judge = judge_of(sample, metric=metric)  # type: ignore[arg-type]
    by = Metrics(metric, metric)  # type: ignore[arg-type]
    verdict = give_verdict(sample, Transform(module), judge, direction="forward", metrics=by, weight=1.0)
    return verdict.differences["upgrade - stay"]["recall"].difference


class TestCarried:
    @pytest.mark.parametrize("depth", [0.1, 0.7, 3.0, 9.0])
    def test_what_follows_the_line_is_told_exactly(self, depth: float) -> None:
        rng = np.random.default_rng(0)

        def on_line(at: np.ndarray | float) -> np.ndarray:
            return 1 / (1 + np.exp(-(0.3 * np.log(at) - 0.5)))

        means = on_line(np.arange(1.0, 11))
        noise = rng.normal(scale=0.1, size=(4_000, 10))
        told = carried(means + noise - noise.mean(axis=0), depth)
        assert told.mean() == pytest.approx(float(on_line(depth)), abs=1e-4)

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_what_is_the_same_at_each_depth_stays(self, share: float) -> None:
        seen = np.repeat(np.arange(100)[:, None] < 100 * share, 10, axis=1).astype(np.float64)
        assert carried(seen, 0.2).mean() == pytest.approx(share, abs=1e-9)

    def test_where_nothing_is_finer_it_is_recall_itself(self) -> None:
        seen = np.random.default_rng(0).random((50, 10))
        np.testing.assert_array_equal(carried(seen, 10), seen[:, -1])

    def test_its_spread_is_that_of_samples_drawn_again(self) -> None:
        rng = np.random.default_rng(0)
        found = (rng.random((400, 10)) < rng.beta(2, 3, size=(400, 1))).astype(np.float64)
        seen = found.cumsum(axis=1) / np.arange(1, 11)
        drawn = [carried(seen[rng.integers(0, 400, 400)], 0.3).mean() for _ in range(400)]
        assert carried(seen, 0.3).std() / np.sqrt(400) == pytest.approx(np.std(drawn), rel=0.15)


class TestVerdictOfAGallery:
    @pytest.mark.parametrize(("noise", "fine"), [(1.0, 0.7), (1.5, 0.5), (0.8, 0.8)])
    def test_the_interval_holds_what_searching_the_whole_gallery_finds(self, noise: float, fine: float) -> None:
        pairs, module = world(10_000, noise=noise, fine=fine), only_coarse()
        few = pairs.take(np.arange(400))
        truth, among_few = (gain(each, module, "euclidean", queries=400) for each in (pairs, few))
        verdict = assess(module, few, Options(metric="euclidean", gallery=10_000)).verdict
        told = verdict.differences["upgrade - stay"]["recall"]
        assert among_few > told.high
        assert told.low < truth < told.high
        assert verdict.upgrade_gains == (told.low > 0)
        assert "in a gallery of 10,000, as far as 400 items show it" in verdict.reason

    def test_a_gain_among_few_that_the_gallery_does_not_keep_is_not_promised(self) -> None:
        pairs, module = world(10_000, noise=0.8, fine=0.8), only_coarse()
        few = pairs.take(np.arange(400))
        assert gain(few, module, "euclidean", queries=400) > 0.05
        assert gain(pairs, module, "euclidean") < -0.03
        verdict = assess(module, few, Options(metric="euclidean", gallery=10_000)).verdict
        assert verdict.decision == "stay"
        assert not verdict.upgrade_gains
        assert verdict.reason.startswith("these pairs cannot tell whether upgrading gains")

    @pytest.mark.parametrize(("gallery", "silent"), [(40_001, True), (39_000, False)])
    def test_of_a_gallery_that_is_far_larger_nothing_is_told(self, gallery: int, silent: bool) -> None:
        few, module = world(400, noise=1.5, fine=0.2), only_coarse()
        verdict = assess(module, few, Options(metric="euclidean", gallery=gallery)).verdict
        said = "400 items without labels cannot tell what is found in a gallery of 40,001: 401 that are held out could"
        assert (said in verdict.reason) is silent
        assert verdict.upgrade_gains is not silent
        assert verdict.decision == ("stay" if silent else "upgrade")

    def test_a_search_that_finds_next_to_nothing_has_no_recall_below_nothing(self) -> None:
        sample = Sample(pairs=world(400, noise=1.5, fine=0.2), queries=200)
        judge = judge_of(sample, metric="euclidean", gallery=10_000)
        for queries in range(20, 200):  # rounding goes either way
            seen = np.zeros((queries, 10))
            seen[0, 8:] = 1 / 9, 1 / 10
            assert judge.means(judge.settled(seen))["recall"] >= 0

    def test_labels_need_no_gallery(self) -> None:
        few, module = world(400, noise=1.5, fine=0.2), only_coarse()
        labels = (few.target[:, 0] > 0).astype(np.int64)
        labelled = Pairs(source=few.source, target=few.target, labels=labels)
        one, other = (
            assess(module, labelled, Options(metric="euclidean", gallery=gallery)).verdict
            for gallery in (None, 1_000_000)
        )
        assert one == other

    def test_a_gallery_without_items_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a gallery has an item at least, not 0"):
            Options(gallery=0)


@pytest.mark.slow
@needs(EMBEDDINGS)
@pytest.mark.parametrize("old", ["old", "side"])
def test_of_real_embeddings_it_tells_what_ten_thousand_images_show(old: str) -> None:
    """Among 200 of them alone recall@10 gains 17 points of a hundred; among all, 10 and 5."""
    with np.load(EMBEDDINGS) as data:
        source, target = (data[f"{name}_test"].astype(np.float32) for name in (old, "new"))
    pairs = Pairs(source=source, target=target)
    rows = np.random.default_rng(0).permutation(len(pairs))[:2_000]
    fitted = fit(pairs.take(rows), Options(method="affine", gallery=len(pairs)))
    told = fitted.assessment.verdict.differences["upgrade - stay"]["recall"]
    truth = gain(pairs.take(np.random.default_rng(1).permutation(len(pairs))), fitted.transformation, "cosine")
    assert told.low < truth < told.high
