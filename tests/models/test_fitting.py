import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from models import fitting
from models.artifacts import save
from models.checkpoints import OfAnotherTraining
from models.evaluation import Metric
from models.fitting import Fitted, Options, assess, fit, trainable
from models.inputs import Pairs, check_pairs, split
from models.method import Batch, Setting
from models.methods import METHODS
from models.methods.l2 import L2
from models.training import Step
from models.verdict import Direction
from tests.models.known_pairs import WIDTH, views
from tests.real_data import EMBEDDINGS, needs


class Worded(L2):
    def __init__(self, setting: Setting, *, pull: Literal["even", "strong"] = "even") -> None:
        super().__init__(setting, weight=1.0 if pull == "even" else 10.0)


SMALL = {name: {"hidden": 16} for name in ("fct", "fastfill")}


def quick(method: str = "fct", **given: object) -> Options:
    return Options(method=method, epochs=3, hyperparameters=SMALL, **given)  # type: ignore[arg-type]


def small_pairs(rows: int = 240, *, labelled: bool = True) -> Pairs:
    labels, (old, new, side) = views(rows, (1.0, 0.4, 0.8))
    return Pairs(source=old, target=new[:, :5], side=side[:, :3], labels=labels if labelled else None)


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return dict(fitted.transformation.state_dict())


class TestFit:
    def test_items_that_are_held_out_leave_no_trace_in_the_map(self) -> None:
        pairs = small_pairs()
        parts = split(pairs)
        target = pairs.target.copy()
        target[parts.test] = 100.0
        target[parts.validation] = -100.0
        other = Pairs(source=pairs.source, target=target, side=pairs.side, labels=pairs.labels)
        first, second = fit(pairs, quick()), fit(other, quick())
        for name, tensor in weights(first).items():
            torch.testing.assert_close(weights(second)[name], tensor, rtol=0, atol=0)
        assert first.assessment.evaluation != second.assessment.evaluation

    def test_copies_of_pairs_change_neither_the_map_nor_the_verdict(self) -> None:
        pairs = small_pairs()
        several = fit(pairs.take(np.tile(np.arange(len(pairs)), 4)), quick("affine")).assessment
        once = fit(pairs, quick("affine")).assessment
        assert several.verdict == once.verdict
        assert "are copies of others" in several.warnings[0]

    def test_the_same_seed_finds_the_same(self) -> None:
        first, second, other = (fit(small_pairs(), quick(seed=seed)) for seed in (0, 0, 1))
        assert first.assessment == second.assessment
        assert first.assessment != other.assessment

    def test_the_report_is_plain_json(self) -> None:
        report = fit(small_pairs(), quick()).report()
        assert json.loads(json.dumps(report, allow_nan=False))["verdict"]["decision"] in ("stay", "upgrade", "fuse")
        assert report["parts"] == {"train": 120, "validation": 60, "test": 60}

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_every_method_that_pairs_are_enough_for_is_tried_or_says_why_not(self, direction: Direction) -> None:
        fitted = fit(small_pairs(), quick("auto", direction=direction, metric="euclidean"))
        assert [candidate.method for candidate in fitted.candidates] == list(trainable())
        assert all(bool(candidate.validation) != bool(candidate.skipped) for candidate in fitted.candidates)
        tried = {each.method: sum(each.validation.values()) for each in fitted.candidates if each.validation}
        assert tried[fitted.method] == max(tried.values())

    def test_methods_that_need_labels_are_skipped_without(self) -> None:
        candidates = fit(small_pairs(labelled=False), quick("auto")).candidates
        for candidate in candidates:
            if trainable()[candidate.method].needs_labels:
                assert candidate.skipped == f"{candidate.method} needs labels"

    def test_the_best_of_a_contest_on_few_pairs_is_trained_on_all(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(fitting, "CONTEST_PAIRS", 80)
        options, alone = quick("auto"), fit(small_pairs(), quick())
        monkeypatch.setattr(fitting, "trainable", lambda: {"fct": trainable()["fct"]})
        fitted = fit(small_pairs(), options, log=tmp_path / "loss.csv", checkpoint=tmp_path / "state")
        assert {path.name for path in tmp_path.glob("loss*")} == {"loss.fct-80.csv", "loss.fct-120.csv"}
        assert {path.name for path in fitted.checkpoints} == {"state.fct-80", "state.fct-120"}
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(weights(fitted)[name], tensor, rtol=0, atol=0)

    def test_a_fit_that_was_killed_goes_on_where_it_was(self, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def kill(name: str, step: object) -> None:
            steps.append(name)
            if len(steps) == 3:
                raise Killed

        steps: list[str] = []
        whole = fit(small_pairs(), quick())
        with pytest.raises(Killed):
            fit(small_pairs(), quick(), on_step=kill, checkpoint=tmp_path / "state")
        assert steps == ["fct"] * 3
        again = fit(small_pairs(), quick(), checkpoint=tmp_path / "state")
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(again)[name], tensor, rtol=0, atol=0)

    @pytest.mark.parametrize("what", ["rows", "width", "metric", "hyperparameter"])
    def test_the_state_of_another_fit_is_refused(self, what: str, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def kill(name: str, step: Step) -> None:
            if step.done > step.total // 2:
                raise Killed

        pairs, options = small_pairs(), Options(method="l2", metric="cosine", epochs=3)
        with pytest.raises(Killed):
            fit(pairs, options, on_step=kill, checkpoint=tmp_path / "state")
        others = {
            "rows": (replace(pairs, source=pairs.source[:, ::-1].copy()), options),
            "width": (replace(pairs, target=pairs.target[:, :4]), options),
            "metric": (pairs, replace(options, metric="inner_product")),
            "hyperparameter": (pairs, replace(options, hyperparameters={"l2": {"weight": 0.001}})),
        }
        with pytest.raises(ValueError, match="is the state of another training"):
            fit(*others[what], checkpoint=tmp_path / "state")

    def test_the_state_of_another_fit_takes_no_method_out_of_the_contest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fitting, "trainable", lambda: {name: METHODS[name] for name in ("affine", "l2")})
        fit(small_pairs(), Options(epochs=3), checkpoint=tmp_path / "state")
        assert (tmp_path / "state.l2-120").exists()
        with pytest.raises(OfAnotherTraining, match=r"state.l2-120 is the state of another training: remove it"):
            fit(small_pairs(), Options(epochs=3, seed=1), checkpoint=tmp_path / "state")

    @pytest.mark.parametrize("what", ["empty", "no state", "cut short", "an artifact", "damaged"])
    def test_a_file_that_is_no_state_is_refused_in_a_sentence(self, what: str, tmp_path: Path) -> None:
        options, state = Options(method="l2", epochs=3), tmp_path / "state"
        fitted = fit(small_pairs(), options, checkpoint=state)
        whole = state.read_bytes()
        contents = {
            "empty": b"",
            "no state": b"precious " * 9,
            "cut short": whole[:-1],
            "damaged": whole.replace(b"random.torch", b"random.torcx"),
        }
        if what == "an artifact":
            save(state, fitted.transformation)
        else:
            state.write_bytes(contents[what])
        before = state.read_bytes()
        with pytest.raises(OfAnotherTraining, match=r"state is not the state of .*: remove it, or name another place"):
            fit(small_pairs(), options, checkpoint=state)
        assert state.read_bytes() == before

    def test_a_method_that_diverges_leaves_no_state_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverging(method: L2, batch: Batch) -> dict[str, Tensor]:
            losses = real_losses(method, batch)
            return {name: loss * (torch.nan if (tmp_path / "state").exists() else 1) for name, loss in losses.items()}

        real_losses = L2.losses
        monkeypatch.setattr(L2, "losses", diverging)
        with pytest.raises(FloatingPointError):
            fit(small_pairs(), Options(method="l2", epochs=3), checkpoint=tmp_path / "state")
        assert not (tmp_path / "state").exists()

    def test_a_closed_form_does_not_name_a_file_as_its_state(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("precious")
        assert fit(small_pairs(), Options(method="affine"), checkpoint=tmp_path / "state").checkpoints == ()
        assert (tmp_path / "state").read_text() == "precious"

    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
    def test_vectors_of_every_number_type_are_fitted_and_judged(self, dtype: str) -> None:
        pairs = small_pairs()
        source, target = ((20 * each + 120).clip(0, 127).astype(dtype) for each in (pairs.source, pairs.target))
        typed = replace(pairs, source=source, target=target)
        fitted = fit(typed, Options(method="affine", metric="euclidean"))
        assert fitted.transformation.architecture.source_dimension == WIDTH
        assert assess(fitted.transformation, typed, Options(metric="euclidean")).verdict.gallery == 120

    def test_the_loss_follows_the_metric(self) -> None:
        by_cosine, by_distance = (fit(small_pairs(), quick(metric=metric)) for metric in ("cosine", "euclidean"))
        assert by_cosine.transformation.architecture.normalize_output
        assert not by_distance.transformation.architecture.normalize_output

    @pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
    def test_between_vectors_of_unit_length_what_is_mapped_has_it_too(self, metric: Metric) -> None:
        pairs = small_pairs()
        source, target = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (pairs.source, pairs.target))
        fitted = fit(replace(pairs, source=source.astype(np.float16), target=target), quick(metric=metric))
        assert fitted.options.metric == "cosine"
        assert fitted.transformation.architecture.normalize_output
        one_of_them = fit(replace(pairs, target=target), quick(metric=metric))
        assert one_of_them.options.metric == metric

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"metric": "manhattan"}, "the metric 'manhattan' is not one of euclidean"),
            ({"direction": "sideways"}, "the direction 'sideways' is not one of forward, backward"),
            ({"method": "bct"}, "the method 'bct' is not one of .*fct"),
            ({"epochs": 0}, "training needs an epoch, not 0"),
            ({"hyperparameters": {"fct": {"width": 3}}}, "the hyperparameter of fct 'width' is not one of hidden"),
        ],
    )
    def test_options_that_mean_nothing_are_refused(self, given: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Options(**given)  # type: ignore[arg-type]

    def test_a_hyperparameter_may_be_one_of_some_words_and_another_word_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(METHODS, "worded", Worded)
        fit(small_pairs(), Options(method="worded", epochs=1, hyperparameters={"worded": {"pull": "strong"}}))
        with pytest.raises(ValueError, match="the hyperparameter pull of worded 'weak' is not one of even, strong"):
            Options(method="worded", hyperparameters={"worded": {"pull": "weak"}})

    @pytest.mark.parametrize("column", ["source", "target"])
    @pytest.mark.parametrize(
        ("metric", "said"), [("cosine", "have the same direction"), ("euclidean", "are the same")], ids=str
    )
    def test_a_model_that_does_not_tell_items_apart_is_refused_and_not_upgraded_to(
        self, metric: Metric, said: str, column: str
    ) -> None:
        pairs = small_pairs()
        lengths = 1.0 if metric == "euclidean" else np.linspace(1, 2, len(pairs))[:, None]
        same = np.broadcast_to(pairs.target[0], pairs.target.shape)
        broken = replace(pairs, **{column: (lengths * same).astype(np.float32)})
        fitted = fit(pairs, quick(metric=metric))
        for refused in (
            lambda: fit(broken, quick(metric=metric)),
            lambda: assess(fitted.transformation, broken, quick(metric=metric)),
        ):
            with pytest.raises(ValueError, match=f"all rows of {column} {said}"):
                refused()

    def test_pairs_in_memory_are_checked_too(self) -> None:
        pairs = small_pairs()
        pairs.source[5, 0] = np.nan
        with pytest.raises(ValueError, match="source has 1 rows with a NaN or an infinity, the first is row 5"):
            fit(pairs, quick())
        with pytest.raises(ValueError, match="a map needs 10 pairs"):
            check_pairs(small_pairs().take(np.arange(9)))

    def test_pairs_that_are_no_numpy_arrays_are_refused_with_what_would_do(self) -> None:
        pairs = small_pairs()
        for source in (torch.from_numpy(pairs.source), pairs.source.tolist()):
            with pytest.raises(TypeError, match=r"source is of type (Tensor|list): give a NumPy array, as np.asarray"):
                fit(replace(pairs, source=source), quick())


def real(step: int, *, swapped: bool = False) -> Pairs:
    with np.load(EMBEDDINGS) as files:
        old, side, new = (files[f"{role}_train"][::step].astype(np.float32) for role in ("old", "side", "new"))
        labels = files["labels_train"][::step]
    return Pairs(source=new if swapped else old, target=old if swapped else new, side=side, labels=labels)


@pytest.mark.slow
@needs(EMBEDDINGS)
class TestRealEmbeddings:
    options = Options(method="fct", metric="cosine", epochs=15, hyperparameters={"fct": {"hidden": 256}})

    def test_upgrading_to_the_better_model_is_advised(self) -> None:
        verdict = fit(real(20), self.options).assessment.verdict
        assert verdict.decision in ("upgrade", "fuse")
        assert verdict.searches["naive"]["map"] < verdict.searches["stay"]["map"] < verdict.searches["upgrade"]["map"]

    def test_going_back_to_the_worse_model_is_not(self) -> None:
        verdict = fit(real(20, swapped=True), self.options).assessment.verdict
        assert verdict.decision == "stay"
