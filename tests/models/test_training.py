import csv
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from models.augmentation import Augmentation
from models.checkpoints import OfAnotherTraining
from models.data import digits
from models.encoders import Classifier, Design, Encoder, embed, residual_network
from models.evaluation import cross_test
from models.method import Batch, Setting, Task
from models.methods.bct import Bct
from models.methods.fastfill import FastFill
from models.plan import Plan, rate_factor, transformation_plan
from models.training import (
    CompatibleTraining,
    Step,
    progress_bar,
    train,
    train_autoencoder,
    train_backbone,
    train_classifier,
    train_simclr,
    train_transformation,
)


class Line(Task):
    """Learns y = w x from images of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))
        self.epochs: list[int] = []

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        self.epochs.append(epoch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.old is not None
        assert batch.new is not None
        return {"fit": (self.slope * batch.old - batch.new).square().mean(), "small": 1e-3 * self.slope.square().sum()}


def line(rows: int = 50) -> Batch:
    old = torch.linspace(-1, 1, rows)[:, None]
    return Batch(old=old, new=3 * old)


PLAN = Plan(epochs=20, batch=10, learning_rate=0.1, optimizer="sgd", weight_decay=0)


def test_it_minimises_the_sum_of_the_losses() -> None:
    task = Line()
    history = train(task, line(), PLAN)
    assert task.slope.item() == pytest.approx(3, abs=0.05)
    assert not task.training
    assert task.epochs == list(range(20))
    last = history.epochs[-1]
    assert last["total"] == pytest.approx(last["fit"] + last["small"], rel=1e-4)


def test_the_seed_decides_the_order_of_rows() -> None:
    slopes = []
    for seed in (1, 1, 2):
        task = Line()
        train(task, line(), Plan(epochs=1, batch=10, learning_rate=0.1, optimizer="sgd"), seed=seed)
        slopes.append(task.slope.item())
    assert slopes[0] == slopes[1] != slopes[2]


def test_every_step_is_told() -> None:
    steps: list[Step] = []
    train(Line(), line(57), PLAN, on_step=steps.append)
    assert [step.done for step in steps] == list(range(1, 101))  # 20 epochs of 5 whole batches
    assert {step.total for step in steps} == {100}
    assert steps[0].losses.keys() == {"fit", "small", "total"}


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    rows = Batch(old=torch.full((10, 1), 1e30), new=torch.ones(10, 1))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(Line(), rows, PLAN)


def test_a_log_begins_with_its_columns_and_goes_on_where_they_are_the_same(tmp_path: Path) -> None:
    for _ in range(2):
        train(Line(), line(), replace(PLAN, epochs=2), log=tmp_path / "loss.csv")
    with (tmp_path / "loss.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    "content", [b"epoch,other,total,rate,seconds\r\n0,1,1,1,1\r\n", b"\x93NUMPY\xff\x00\n\xfe", b"text"]
)
def test_lines_are_appended_to_no_file_with_other_columns(tmp_path: Path, content: bytes) -> None:
    log, state = tmp_path / "loss.csv", tmp_path / "state"
    log.write_bytes(content)
    with pytest.raises(OfAnotherTraining, match=r"loss.csv is not the log of this training: remove it"):
        train(Line(), line(), PLAN, log=log, checkpoint=state)
    assert log.read_bytes() == content
    assert state.exists() == content.startswith(b"epoch,")  # of which only the first epoch could tell, and that is kept


@pytest.mark.parametrize("torn", [1, 5, 40])
def test_a_log_whose_last_line_is_torn_goes_on_with_whole_ones(tmp_path: Path, torn: int) -> None:
    log = tmp_path / "loss.csv"
    for _ in range(2):
        train(Line(), line(), replace(PLAN, epochs=2), log=log)
        log.write_bytes(log.read_bytes()[:-torn])
    lines = log.read_text().splitlines()[:-1]  # but for the last, which nothing went on from
    assert len(lines) == 3
    assert len({each.count(",") for each in lines}) == 1


def test_a_log_may_be_a_pipe() -> None:
    reads, writes = os.pipe()
    with os.fdopen(reads) as lines:
        train(Line(), line(), replace(PLAN, epochs=2), log=Path(f"/dev/fd/{writes}"))
        os.close(writes)
        assert [text.partition(",")[0] for text in lines] == ["epoch", "0", "epoch", "1"]


def test_a_state_that_cannot_be_written_ends_a_training_with_the_systems_own_error(tmp_path: Path) -> None:
    (tmp_path / "state.unfinished").mkdir()  # in the way, as a full disk would be
    with pytest.raises(IsADirectoryError):
        train(Line(), line(), PLAN, checkpoint=tmp_path / "state")


def test_bfloat16_learns_the_same_line_where_there_is_any() -> None:
    task = Line()
    train(task, line(), replace(PLAN, bfloat16=True))
    assert task.slope.dtype == torch.float32
    assert task.slope.item() == pytest.approx(3, abs=0.1)


def test_one_row_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        train(Line(), line(1), PLAN)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch": 1}])
def test_a_plan_without_an_epoch_or_a_batch_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needs an epoch and batches of at least 2"):
        Plan(**{"epochs": 1, "batch": 2, "learning_rate": 0.1, "optimizer": "sgd", **changes})  # type: ignore[arg-type]


def test_the_rate_warms_up_for_five_epochs_and_falls_as_a_cosine() -> None:
    factors = [rate_factor(epoch, 80, 5) for epoch in range(80)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (e - 5) / 75)) for e in range(5, 80)])


def test_the_optimizer_follows_the_schedule_of_the_plan() -> None:
    moved: list[float] = []
    task = Line()
    plan = Plan(epochs=10, batch=10, learning_rate=1e-3, optimizer="adam", weight_decay=0, schedule="epoch")
    values = [0.0]

    def remember(step: Step) -> None:
        values.append(task.slope.item())
        moved.append(values[-1] - values[-2])

    train(task, line(), plan, on_step=remember)
    # Adam's step is its rate while gradients agree: 2 epochs of warm-up, then half a cosine
    per_epoch = np.array(moved).reshape(10, 5).mean(axis=1)
    expected = [1e-3 * rate_factor(epoch, 10, 2) for epoch in range(10)]
    np.testing.assert_allclose(per_epoch, expected, rtol=0.1)


def test_fcts_plan_is_the_papers_and_few_rows_still_make_steps() -> None:
    large, small = transformation_plan(50_000), transformation_plan(898)
    assert (large.epochs, large.batch, large.learning_rate, large.optimizer) == (80, 1024, 5e-4, "adam")
    assert large.weight_decay == 2**-15
    assert large.schedule == "epoch"
    assert small.batch == 112


def test_a_progress_bar_shows_the_loss_or_only_that_what_has_no_steps_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar("a line") as on_step:
        train(Line(), line(), PLAN, on_step=on_step)
    assert "loss 0." in capsys.readouterr().out
    with progress_bar("another"):
        pass
    shown = capsys.readouterr().out
    assert "done" in shown
    assert "kept" not in shown  # it may have been computed just now


VIEW = Augmentation(shift=0.1, rotation=10)


@pytest.mark.slow
def test_a_classifier_learns_digits_it_has_not_seen() -> None:
    torch.manual_seed(0)
    data = digits().of_classes(4)
    plan = Plan(epochs=6, batch=32, learning_rate=0.05, optimizer="sgd")
    model = Classifier(residual_network(Design(widths=(8, 16)), channels=1), 4)
    train_classifier(model, data.train_images, data.train_labels, plan, augmentation=VIEW)
    predicted = embed(model, data.test_images).argmax(axis=1)
    assert (predicted == data.test_labels).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_labels_may_be_integers_of_any_width(kind: type[np.integer[Any]]) -> None:
    vectors, labels = np.random.default_rng(0).random((64, 4), np.float32), np.arange(64) % 2
    images = vectors.reshape(64, 1, 2, 2)
    plan = replace(PLAN, epochs=1)

    def encoder() -> Encoder:
        return residual_network(Design(widths=(4,)), channels=1)

    def last_losses(given: npt.NDArray[Any]) -> list[dict[str, float]]:
        torch.manual_seed(0)
        setting = Setting(old_dimension=4, new_dimension=4, classes=2, new_head=torch.eye(4))
        train_classifier(Classifier(encoder(), 2), images, given, plan, augmentation=Augmentation())
        task = CompatibleTraining(encoder(), Bct(setting))
        backbone = train_backbone(task, images, given, plan, old=vectors, augmentation=Augmentation())
        pairs = train_transformation(FastFill(setting, hidden=8), old=vectors, new=vectors, labels=given, plan=plan)
        return [backbone.epochs[-1], pairs.epochs[-1]]

    assert last_losses(labels.astype(kind)) == last_losses(labels)


def test_simclr_gathers_digits_without_their_labels() -> None:
    torch.manual_seed(0)
    data = digits().of_classes(4)
    plan = Plan(epochs=15, batch=64, learning_rate=2e-3, optimizer="adam")
    encoder = residual_network(Design(widths=(8, 16)), channels=1)
    before = cross_test(*[embed(encoder, data.test_images)] * 2, data.test_labels).map
    strong = Augmentation(min_scale=0.8, max_scale=1.1, shift=0.1, rotation=15, light=0.3, noise=0.1)
    train_simclr(encoder, data.train_images, plan, augmentation=strong)
    after = cross_test(*[embed(encoder, data.test_images)] * 2, data.test_labels).map
    assert after > before + 0.05


@pytest.mark.slow
def test_an_autoencoder_learns_to_draw_digits() -> None:
    torch.manual_seed(0)
    images = digits().train_images
    encoder = residual_network(Design(widths=(8, 16)), channels=1)
    steps: list[Step] = []
    plan = Plan(epochs=20, batch=64, learning_rate=3e-3, optimizer="adam")
    train_autoencoder(encoder, images, plan, augmentation=Augmentation(), on_step=steps.append)
    assert steps[-1].losses["reconstruction"] < 0.5 * images.var()  # half of what drawing the mean image costs, or less
