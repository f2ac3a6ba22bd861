"""The one training loop, and the three tasks it is used for here: classify, contrast, transform."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from models.augmentation import Augmentation
from models.data import Images, as_floats, as_tensor
from models.encoders import Classifier, Encoder
from models.method import Batch, Method, Task, needed
from models.side_information import SimClr

WEIGHT_DECAY = 2.0**-15  # methods.md 3.1, on every parameter, BatchNorm's too


@dataclass(frozen=True, slots=True)
class Step:
    """Where a training stands, told after each step."""

    done: int
    total: int
    losses: dict[str, float]


OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train."""

    epochs: int
    batch: int
    learning_rate: float
    optimizer: Literal["adam", "sgd"]
    weight_decay: float = WEIGHT_DECAY
    momentum: float = 0.9
    #: epochs, at most; a short training warms up over a fifth of its epochs
    warmup: int = 5
    #: the schedule moves each epoch as in FCT's code, or smoothly with each step, which a dozen epochs need
    schedule: Literal["epoch", "step"] = "step"
    #: multiply in bfloat16 where the device does so natively, which is several times faster there
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise ValueError(f"training needs an epoch and batches of at least 2, not {self.epochs} and {self.batch}")


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
) -> History:
    """Train a task in place: shuffled batches, warm-up, cosine to zero.

    The last, incomplete batch of an epoch is left out, as in the authors' code: its BatchNorm statistics are poor.

    Args:
        task: what to train; it is in eval mode afterwards.
        rows: the whole training set, in memory.
        plan: how.
        seed: of the order of rows and of the augmentation; fresh weights are the caller's own draw.
        augment: applied to each batch on the CPU.
        device: where to compute.
        on_step: told after each step.

    Returns:
        The losses, epoch by epoch.

    Raises:
        ValueError: fewer than two rows.
        FloatingPointError: a loss stopped being finite.
    """
    if len(rows) < 2:
        raise ValueError(f"training needs at least two rows, not {len(rows)}")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    task.to(device)
    optimizer = _optimizer(task, plan)
    batch = min(plan.batch, len(rows))
    steps = len(rows) // batch
    history = []
    for epoch in range(plan.epochs):
        task.start_epoch(epoch, plan.epochs)
        order = torch.randperm(len(rows), generator=generator)
        sums: dict[str, float] = {}
        for step in range(steps):
            _set_rate(optimizer, plan, epoch, step, steps)
            part = rows.take(order[step * batch : (step + 1) * batch])
            part = part if augment is None else augment(part, generator)
            losses = _step(task, part.to(device), optimizer, plan, device)
            sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
            if on_step is not None:
                on_step(Step(epoch * steps + step + 1, plan.epochs * steps, losses))
        history.append({name: value / steps for name, value in sums.items()})
    task.eval()
    return History(tuple(history))


@cache
def native_bfloat16(device: str) -> bool:
    """Say whether a kind of device multiplies in bfloat16 itself; where it is emulated it is slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch before 2.9 does not say: float32 then
    return device == "cpu" and bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def rate_factor(unit: int, units: int, warmup: int) -> float:
    """Return the learning rate's factor: (unit + 1) / warmup, then half a cosine to zero (methods.md 3.1)."""
    if unit < warmup:
        return (unit + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (unit - warmup) / max(1, units - warmup)))


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
            progress.update(bar, completed=1, total=1, note="kept from an earlier run")


class Classification(Task):
    """Cross-entropy with label smoothing: 0.9 NLL + 0.1 mean over classes of -log p."""

    def __init__(self, classifier: Classifier, *, smoothing: float = 0.1) -> None:
        super().__init__()
        self.classifier = classifier
        self.smoothing = smoothing

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return `cross_entropy` over `batch.images` and `batch.labels`."""
        logits = self.classifier(needed(batch.images, "images")).float()
        return {
            "cross_entropy": F.cross_entropy(logits, needed(batch.labels, "labels"), label_smoothing=self.smoothing)
        }


def train_classifier(
    encoder: Encoder,
    images: Images,
    labels: Images,
    plan: Plan,
    *,
    classes: int,
    augmentation: Augmentation,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> Classifier:
    """Train an encoder as a classifier, untouched by any compatibility term; returns it with its head, in eval mode."""
    classifier = Classifier(encoder, classes)
    rows = Batch(images=as_tensor(images), labels=as_tensor(labels))

    def view(batch: Batch, generator: torch.Generator) -> Batch:
        shown = augmentation(as_floats(needed(batch.images, "images")), generator)
        return Batch(images=shown, labels=batch.labels)

    train(Classification(classifier), rows, plan, seed=seed, augment=view, device=device, on_step=on_step)
    return classifier


def train_simclr(
    encoder: Encoder,
    images: Images,
    plan: Plan,
    *,
    augmentation: Augmentation,
    temperature: float = 0.2,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> Encoder:
    """Train an encoder without labels by SimCLR on two strong views of each image; returns it in eval mode."""

    def views(batch: Batch, generator: torch.Generator) -> Batch:
        shown = as_floats(needed(batch.images, "images"))
        return Batch(images=augmentation(shown, generator), views=augmentation(shown, generator))

    task = SimClr(encoder, temperature=temperature)
    train(task, Batch(images=as_tensor(images)), plan, seed=seed, augment=views, device=device, on_step=on_step)
    return encoder


def transformation_plan(rows: int, *, epochs: int = 80) -> Plan:
    """Return FCT's plan (methods.md 3.1), with batches small enough that few rows still make several steps an epoch."""
    batch = min(1024, max(64, rows // 8))
    return Plan(epochs=epochs, batch=batch, learning_rate=5e-4, optimizer="adam", schedule="epoch")


def train_transformation(
    method: Method,
    *,
    old: Images,
    new: Images,
    side: Images | None = None,
    labels: Images | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> History:
    """Train a method on cached embeddings of the same (augmented) images by the frozen models.

    Args:
        method: what to train, in place.
        old: (n, d_old), new: (n, d_new), side: (n, d_side), labels: (n,).
        plan: FCT's own unless given.

    Raises:
        ValueError: lengths differ, or a value is not finite.
    """
    given = {"old": old, "new": new, "side": side, "labels": labels}
    tensors = {name: as_tensor(values) for name, values in given.items() if values is not None}
    for name, tensor in tensors.items():
        if len(tensor) != len(old):
            raise ValueError(f"{name} has {len(tensor)} rows, old has {len(old)}: row i must be the same image in all")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds a NaN or an infinity: drop those rows from all")
    rows = Batch(**{name: tensor if name == "labels" else tensor.float() for name, tensor in tensors.items()})
    plan = plan or transformation_plan(len(rows))
    return train(method, rows, plan, seed=seed, device=device, on_step=on_step)


def _step(
    task: Task, batch: Batch, optimizer: torch.optim.Optimizer, plan: Plan, device: torch.device
) -> dict[str, float]:
    low = plan.bfloat16 and native_bfloat16(device.type)
    precision: AbstractContextManager[object] = torch.autocast(device.type, torch.bfloat16) if low else nullcontext()
    with precision:
        losses = task.losses(batch)
    total = torch.stack(list(losses.values())).sum()
    if not total.isfinite():
        raise FloatingPointError(f"the loss is {total.item()}: lower the learning rate, or look for bad rows")
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(total)
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
