"""The one training loop, and what it is used for here: classify, contrast, transform, train a compatible backbone."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from models.arithmetic import has_bfloat16
from models.augmentation import Augmentation
from models.checkpoints import Checkpoints, OfAnotherTraining, identity_of
from models.data import Images, as_floats, as_tensor
from models.encoders import Classifier, Encoder
from models.method import Batch, Method, Task, needed
from models.plan import Plan, rate_factor
from models.side_information import Autoencoder, SimClr


@dataclass(frozen=True, slots=True)
class Step:
    """Where a training stands, told after each step."""

    done: int
    total: int
    losses: dict[str, float]


OnStep = Callable[[Step], None]

_FIRST_COLUMN = "epoch"  # of a log
_LONGEST_HEADER = 1 << 12


class How(TypedDict, total=False):
    """How a training is carried out, apart from what is trained and by which plan: see `train`."""

    seed: int
    device: str | torch.device
    on_step: OnStep | None
    checkpoint: Path | None
    log: Path | None


@dataclass(frozen=True, slots=True)
class History:
    """The mean of each named loss, and of their sum `total`, epoch by epoch."""

    epochs: tuple[dict[str, float], ...]


def train(
    task: Task,
    rows: Batch,
    plan: Plan,
    *,
    seed: int = 0,
    augment: Callable[[Batch, torch.Generator], Batch] | None = None,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
    checkpoint: Path | None = None,
    log: Path | None = None,
) -> History:
    """Train a task in place: shuffled batches, warm-up, cosine to zero.

    The last, incomplete batch of an epoch is left out, as in the authors' code: its BatchNorm statistics are poor. A task
    without a parameter to train is a closed form: `prepare` solved it, and the history is one evaluation of its losses.

    Args:
        task: what to train; it is in eval mode afterwards.
        rows: the whole training set, in memory.
        plan: how.
        seed: decides the order of rows, the augmentation and what the task draws. The caller draws the fresh weights.
        augment: applied to each batch, on the device; the generator is on the CPU.
        device: where to compute.
        on_step: told after each step.
        checkpoint: a file that keeps the state after each epoch; where it exists already, the training goes on from it,
            and ends as if it had never been interrupted. The caller removes it, unless the training diverged. A closed form
            does not touch it.
        log: a CSV file that gets a line per epoch: the losses, the learning rate and the seconds. Where it exists already,
            lines are appended.

    Returns:
        The losses, epoch by epoch.

    Raises:
        ValueError: fewer than two rows, or rows that the task cannot be trained on.
        OfAnotherTraining: the checkpoint is not this training's, or the log has other columns.
        FloatingPointError: a loss stopped being finite.
    """
    _check_rows(rows)
    rows = rows if rows.index is not None else replace(rows, index=torch.arange(len(rows)))
    device = torch.device(device)
    task.prepare(rows)
    task.to(device)
    if not is_trained(task):
        return _solved(task, rows.to(device), on_step)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        optimizer = _optimizer(task, plan)
        kept = None if checkpoint is None else Checkpoints(checkpoint, identity_of(task, rows, plan, seed))
        history = [] if kept is None else kept.resume(task, optimizer, generator)
        begun = None if log is None else _columns_of(log)
        if begun is not None and not begun.startswith(f"{_FIRST_COLUMN},"):
            raise _not_its(log)  # its other columns are checked after the first epoch
        for epoch in range(len(history), plan.epochs):
            start = time.perf_counter()
            try:
                history.append(_epoch(epoch, task, rows, plan, optimizer, generator, augment, device, on_step))
            except FloatingPointError:
                if kept is not None:
                    kept.forget()  # to go on from it would only diverge again
                raise
            if kept is not None:
                kept.save(task, optimizer, generator, history)
            if log is not None:
                rate = float(optimizer.param_groups[0]["lr"])
                _write(log, {_FIRST_COLUMN: epoch, **history[-1], "rate": rate, "seconds": time.perf_counter() - start})
    task.eval()
    return History(tuple(history))


def is_trained(task: Task) -> bool:
    """Say whether a task has a parameter to train; one without is a closed form, and leaves no state."""
    return any(parameter.requires_grad for parameter in task.parameters())


def _check_rows(rows: Batch) -> None:
    tensors = rows.tensors()
    length = max(map(len, tensors.values()))
    if length < 2:
        raise ValueError(f"training needs at least two rows, not {length}")
    for name, tensor in tensors.items():
        if len(tensor) != length:
            raise ValueError(
                f"`{name}` has {len(tensor)} rows, others have {length}: row i must be the same item in all"
            )
        if name in ("old", "new", "side") and not tensor.isfinite().all():
            row = int((~tensor.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"`{name}` holds a NaN or an infinity, first in row {row}: drop such rows from all")


def _epoch(
    epoch: int,
    task: Task,
    rows: Batch,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    augment: Callable[[Batch, torch.Generator], Batch] | None,
    device: torch.device,
    on_step: OnStep | None,
) -> dict[str, float]:
    """Train on each row once; returns the mean of each loss."""
    task.start_epoch(epoch, plan.epochs)
    order = torch.randperm(len(rows), generator=generator)
    batch = min(plan.batch, len(rows))
    steps = len(rows) // batch
    sums: dict[str, float] = {}
    for step in range(steps):
        _set_rate(optimizer, plan, epoch, step, steps)
        part = rows.take(order[step * batch : (step + 1) * batch])
        part = part.to(device)
        part = part if augment is None else augment(part, generator)
        losses = _step(task, part, optimizer, plan, device)
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
        if on_step is not None:
            on_step(Step(epoch * steps + step + 1, plan.epochs * steps, losses))
    return {name: value / steps for name, value in sums.items()}


def _solved(task: Task, rows: Batch, on_step: OnStep | None) -> History:
    task.eval()
    with torch.inference_mode():
        losses = {name: value.item() for name, value in task.losses(rows).items()}
    losses["total"] = sum(losses.values())
    if on_step is not None:
        on_step(Step(1, 1, losses))
    return History((losses,))


def _write(log: Path, line: dict[str, float]) -> None:
    """Append a line to a log, or begin one. A file that is another training's log, or no log at all, stays as it is."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = _columns_of(log)
    if begun is not None and begun != ",".join(line):
        raise _not_its(log)
    if begun is not None:
        _cut(log)
    with log.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, line)
        if begun is None or not file.tell():
            writer.writeheader()
        writer.writerow(line)


def _cut(log: Path) -> None:
    """Remove a last line that a full disk or a power cut left unfinished: else the next one would be joined to it."""
    content = log.read_bytes()
    torn = content.rpartition(b"\n")[2]
    if torn:
        os.truncate(log, len(content) - len(torn))


def _columns_of(log: Path) -> str | None:
    """Return the first line of a log; None if no log has begun, or if it is no file to read from, such as a pipe."""
    if not log.is_file():
        return None
    with log.open(newline="", encoding="utf-8", errors="replace") as file:
        return file.readline(_LONGEST_HEADER).rstrip("\r\n") if log.stat().st_size else None


def _not_its(log: Path | None) -> OfAnotherTraining:
    return OfAnotherTraining(f"{log} is not the log of this training: remove it, or name another place")


@contextmanager
def progress_bar(title: str) -> Iterator[OnStep]:
    """Show a progress bar on the terminal while the body runs; yields what `train` takes as `on_step`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(title, total=None, note="")
        yield lambda step: progress.update(
            bar, completed=step.done, total=step.total, note=f"loss {step.losses['total']:.3f}"
        )
        if progress.tasks[0].total is None:
            progress.update(bar, completed=1, total=1, note="done")


class Classification(Task):
    """Cross-entropy with label smoothing: 0.9 NLL + 0.1 mean over classes of -log p."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `cross_entropy` over `batch.images` and `batch.labels`."""
        logits = self.classifier(needed(batch.images, "images")).float()
        return {"cross_entropy": F.cross_entropy(logits, needed(batch.labels, "labels"), label_smoothing=0.1)}


def train_classifier(
    classifier: Classifier,
    images: Images,
    labels: Images,
    plan: Plan,
    *,
    augmentation: Augmentation,
    **how: Unpack[How],
) -> Classifier:
    """Train a classifier, untouched by any compatibility term; returns it in eval mode."""
    rows = Batch(images=as_tensor(images), labels=as_tensor(labels).long())

    def view(batch: Batch, generator: torch.Generator) -> Batch:
        shown = augmentation(as_floats(needed(batch.images, "images")), generator)
        return Batch(images=shown, labels=batch.labels)

    train(Classification(classifier), rows, plan, augment=view, **how)
    return classifier


def train_autoencoder(
    encoder: Encoder,
    images: Images,
    plan: Plan,
    *,
    augmentation: Augmentation,
    **how: Unpack[How],
) -> Encoder:
    """Train an encoder without labels to keep what a decoder needs to draw the image again; returns it in eval mode."""

    def view(batch: Batch, generator: torch.Generator) -> Batch:
        return Batch(images=augmentation(as_floats(needed(batch.images, "images")), generator))

    pixels = as_tensor(images)
    train(
        Autoencoder(encoder, channels=pixels.shape[1], size=pixels.shape[2]),
        Batch(images=pixels),
        plan,
        augment=view,
        **how,
    )
    return encoder


class CompatibleTraining(Task):
    """A backbone with a method that trains it: the method sees features, the backbone sees images."""

    def __init__(self, encoder: nn.Module, method: Method) -> None:
        """Join them.

        Args:
            encoder: from images to (n, method.feature_dimension).
            method: one that `trains_backbone`.
        """
        super().__init__()
        self.encoder = encoder
        self.method = method
        self.dimension = method.dimension

    def prepare(self, rows: Batch) -> None:
        self.method.prepare(rows)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.train()
        self.method.start_epoch(epoch, epochs)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the method's losses, in float32 whatever the backbone computes in."""
        features = self.encoder(needed(batch.images, "images")).float()
        with torch.autocast(features.device.type, enabled=False):
            return self.method.losses(replace(batch, features=features))

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (n, channels, height, width) as the new model stores them: (n, dimension)."""
        return self.method.embed(self.encoder(images).float())


def train_backbone(
    task: CompatibleTraining,
    images: Images,
    labels: Images,
    plan: Plan,
    *,
    old: Images,
    new: Images | None = None,
    augmentation: Augmentation,
    **how: Unpack[How],
) -> History:
    """Train a new model in place to be compatible with an old one.

    Args:
        task: the new backbone, and a method that `trains_backbone`.
        images: (n, channels, height, width).
        labels: (n,).
        plan: how.
        old: (n, d_old), by the old model, of the images as they are.
        new: (n, d_new), by an independently trained new model, where the method wants it.
        augmentation: of the images that the backbone sees.
        how: as for `train`.
    """
    rows = Batch(
        images=as_tensor(images),
        labels=as_tensor(labels).long(),
        old=as_tensor(old).float(),
        new=None if new is None else as_tensor(new).float(),
    )

    def view(batch: Batch, generator: torch.Generator) -> Batch:
        return replace(batch, images=augmentation(as_floats(needed(batch.images, "images")), generator))

    return train(task, rows, plan, augment=view, **how)


def train_simclr(
    encoder: Encoder,
    images: Images,
    plan: Plan,
    *,
    augmentation: Augmentation,
    temperature: float = 0.2,
    **how: Unpack[How],
) -> Encoder:
    """Train an encoder without labels by SimCLR on two strong views of each image; returns it in eval mode."""

    def views(batch: Batch, generator: torch.Generator) -> Batch:
        shown = as_floats(needed(batch.images, "images"))
        return Batch(images=augmentation(shown, generator), views=augmentation(shown, generator))

    task = SimClr(encoder, temperature=temperature)
    train(task, Batch(images=as_tensor(images)), plan, augment=views, **how)
    return encoder


def train_transformation(
    method: Method,
    *,
    old: Images,
    new: Images,
    side: Images | None = None,
    labels: Images | None = None,
    plan: Plan | None = None,
    **how: Unpack[How],
) -> History:
    """Train a method on cached embeddings of the same (augmented) images by the frozen models.

    Args:
        method: what to train, in place.
        old: (n, d_old), new: (n, d_new), side: (n, d_side), labels: (n,).
        plan: the method's own unless given.
        how: as for `train`.

    Raises:
        ValueError: lengths differ, or a value is not finite.
    """
    given = {"old": old, "new": new, "side": side, "labels": labels}
    tensors = {name: as_tensor(values) for name, values in given.items() if values is not None}
    rows = Batch(**{name: tensor.long() if name == "labels" else tensor.float() for name, tensor in tensors.items()})
    plan = plan or method.plan(len(rows))
    return train(method, rows, plan, **how)


def _step(
    task: Task, batch: Batch, optimizer: torch.optim.Optimizer, plan: Plan, device: torch.device
) -> dict[str, float]:
    low = plan.bfloat16 and has_bfloat16(device)
    precision: AbstractContextManager[object] = torch.autocast(device.type, torch.bfloat16) if low else nullcontext()
    with precision:
        losses = task.losses(batch)
    total = torch.stack(list(losses.values())).sum()
    if not total.isfinite():
        raise FloatingPointError(f"the loss is {total.item()}: lower the learning rate, or look for bad rows")
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(total)
    if plan.clip is not None:
        torch.nn.utils.clip_grad_norm_(task.parameters(), plan.clip)
    optimizer.step()
    return {**{name: value.item() for name, value in losses.items()}, "total": total.item()}


def _set_rate(optimizer: torch.optim.Optimizer, plan: Plan, epoch: int, step: int, steps: int) -> None:
    warmup = min(plan.warmup, plan.epochs // 5)
    if plan.schedule == "epoch":
        factor = rate_factor(epoch, plan.epochs, warmup)
    else:
        factor = rate_factor(epoch * steps + step, plan.epochs * steps, warmup * steps)
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate * factor


def _optimizer(task: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    if plan.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=plan.learning_rate, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=True
    )
