"""The command line of the methods: `python -m models`. Commands import PyTorch when they run, so that `--help` is quick.

A mistake of the user ends a command with one sentence on the error stream and exit code 2.
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from models.benchmark.benchmark import Where
    from models.benchmark.experiment import Show
    from models.fitting import Assessment, Fitted, OnFit, Options
    from models.training import Step

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Fit a transformation between two embedding models, and see what it is worth.",
)
console, errors = Console(), Console(stderr=True)

MAX_SEED = 2**63 - 1  # of torch and NumPy alike


def _version(asked: bool) -> None:
    if asked:
        console.print(f"forwardfill {version('forwardfill')}", highlight=False)
        raise typer.Exit


@app.callback()
def _before_any_command(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version, and exit.")
    ] = False,
) -> None:
    """Nothing; what stands before the name of a command is an option of the whole."""


def _configured(context: typer.Context, path: Path | None) -> Path | None:
    """Take options from a TOML file as defaults: a flag on the command line wins."""
    if path is None:
        return None
    with _refusals():
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        known = {parameter.name for parameter in context.command.params} - {"config"}
        values = {key.replace("-", "_"): value for key, value in given.items()}
        unknown = [key for key in given if key.replace("-", "_") not in known]
        if unknown:
            options = ", ".join(sorted(str(name).replace("_", "-") for name in known))
            raise ValueError(f"{path} has {', '.join(unknown)}, but `{context.info_name}` takes {options}")
        for parameter in context.command.params:
            several, value = getattr(parameter, "multiple", False), values.get(str(parameter.name))
            if several and not isinstance(value, list | None):
                raise ValueError(f"{path} has {parameter.name} = {value!r}, which is a list: [{value!r}]")
    context.default_map = {**(context.default_map or {}), **values}
    return path


Source = Annotated[Path, typer.Option(help="The old model's vectors, .npy of shape (n, d_old).")]
Target = Annotated[Path, typer.Option(help="The new model's vectors of the same items, .npy of shape (n, d_new).")]
Side = Annotated[Path | None, typer.Option(help="Side-information stored beside the old vectors, .npy (n, d_side).")]
Labels = Annotated[Path | None, typer.Option(help="Labels, .npy (n,): items of one label are relevant to each other.")]
Metric = Annotated[str, typer.Option(help="euclidean, cosine or inner_product: how vectors are compared in search.")]
Direction = Annotated[str, typer.Option(help="forward (the gallery, old to new) or backward (queries, new to old).")]
Seed = Annotated[int, typer.Option(help="Seed of the split, of the weights and of the bootstrap.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Data = Annotated[str, typer.Option(help="digits, which is bundled, or cifar100.")]
Root = Annotated[Path | None, typer.Option(help="The folder of CIFAR-100's sheets.")]
Gallery = Annotated[
    int | None, typer.Option(help="Items in the gallery that the verdict is for (as many as the pairs).")
]
Report = Annotated[Path | None, typer.Option(help="Write everything that was found as JSON.")]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file with these options; flags win.", is_eager=True, callback=_configured),
]


@app.command()
def fit(
    *,
    source: Source,
    target: Target,
    metric: Metric = "cosine",
    output: Annotated[Path, typer.Option(help="The artifact to write.")] = Path("transformation.safetensors"),
    side: Side = None,
    labels: Labels = None,
    method: Annotated[str, typer.Option(help="A method, or auto: whichever is best on the validation part.")] = "auto",
    direction: Direction = "forward",
    held_out: Annotated[
        float | None, typer.Option(help="Share not trained on, half to choose by, half to judge by (a fifth).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training (as the method says).")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A hyperparameter: fct.hidden=512.")] = None,
    gallery: Gallery = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the training's state: the same command goes on.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="CSV of the losses, a line per epoch.")] = None,
    report: Report = None,
    config: Config = None,
) -> None:
    """Fit a transformation to pairs of vectors, judge it on held-out items, and say whether to upgrade."""
    with _refusals():
        _check_places(
            {"source": source, "target": target, "side": side, "labels": labels, "config": config},
            {"output": output, "checkpoint": checkpoint, "log": log, "report": report},
        )
        from models.artifacts import save
        from models.fitting import fit as fit_pairs
        from models.inputs import read_pairs

        pairs = read_pairs(source, target, side=side, labels=labels)
        options = _options(
            method=method,
            metric=metric,
            direction=direction,
            held_out=held_out,
            epochs=epochs,
            gallery=gallery,
            seed=seed,
            device=device,
            hyperparameters=_hyperparameters(option or [], method),
        )
        with _progress() as on_step:
            fitted = fit_pairs(pairs, options, on_step=on_step, checkpoint=checkpoint, log=log)
        digest = save(output, fitted.transformation)
        for place in fitted.checkpoints:
            place.unlink(missing_ok=True)
        _show_candidates(fitted)
        _show(fitted.assessment)
        if fitted.options.metric != metric:
            _say(
                "Note: all vectors have unit length, so they are compared by cosine, and what is mapped gets unit length."
            )
        _say(
            f"{output} holds the transformation of {fitted.method}, trained for and judged by {fitted.options.metric}, "
            f"SHA-256 {digest}"
        )
        _write(report, {"artifact": str(output), "sha256": digest, **fitted.report()})


@app.command()
def evaluate(
    *,
    source: Source,
    target: Target,
    metric: Metric,
    artifact: Annotated[Path, typer.Option(help="The transformation's artifact.")],
    side: Side = None,
    labels: Labels = None,
    direction: Direction = "forward",
    gallery: Gallery = None,
    seed: Seed = 0,
    device: Device = "cpu",
    report: Report = None,
    config: Config = None,
) -> None:
    """Judge a transformation that is there already, on items that it was not trained on."""
    with _refusals():
        _check_places(
            {
                "source": source,
                "target": target,
                "side": side,
                "labels": labels,
                "artifact": artifact,
                "config": config,
            },
            {"report": report},
        )
        from dataclasses import asdict

        from models.artifacts import load
        from models.fitting import assess
        from models.inputs import read_pairs

        pairs = read_pairs(source, target, side=side, labels=labels)
        options = _options(metric=metric, direction=direction, gallery=gallery, seed=seed, device=device)
        assessment = assess(load(artifact), pairs, options)
        _show(assessment)
        _write(report, {"artifact": str(artifact), **asdict(assessment)})


@app.command()
def export(
    artifact: Annotated[Path, typer.Option(help="The artifact to read.")],
    output: Annotated[Path, typer.Option(help="The artifact to write.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
) -> None:
    """Store a transformation in another number type, and say how far that moves what it gives."""
    with _refusals():
        _check_places({"artifact": artifact}, {"output": output})
        from models.artifacts import check
        from models.exporting import resave

        digest, error = resave(artifact, output, dtype=dtype)
        info = check(output)
        _say(
            f"{output}: {info.kind} from {info.source_dimension} to {info.target_dimension} dimensions, {info.dtype}, "
            f"{info.size:,} bytes, SHA-256 {digest}"
        )
        _say(f"What it makes of random rows differs by {error:.1e} of its length on average.")


@app.command()
def train(
    *,
    method: Annotated[str, typer.Option(help="A method, or a row of the benchmark's table by its name.")],
    output: Annotated[Path, typer.Option(help="A folder for the artifacts.")],
    data: Data = "digits",
    root: Root = None,
    stages: Annotated[Path | None, typer.Option(help="Keeps finished stages (build/methods/DATA).")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    config: Config = None,
) -> None:
    """Train an old and a new model on images and one method between them, and write its transformations as artifacts."""
    del config
    with _refusals():
        from models.artifacts import save
        from models.benchmark.benchmark import chosen

        _check_folder(output)
        experiment = _where(data, root, stages, seed, device).experiment(_bars())
        run = chosen(method)
        maps = experiment.trained(run).method.transformations()
        for direction, module in (("forward", maps.forward), ("backward", maps.backward)):
            if module is not None:
                place = output / f"{run.method}-{direction}.safetensors"
                _say(f"{place} holds the {direction} transformation of {run.name}, SHA-256 {save(place, module)}")
        for row in experiment.rows(run):
            shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["new_old"].items())
            _say(f"new/old, {row['direction']}, {row['metric']}: {shown}")


@app.command()
def benchmark(
    *,
    data: Data = "cifar100",
    root: Root = None,
    output: Annotated[Path | None, typer.Option(help="Keeps finished stages and results (build/methods/DATA).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A row of the table, by name; may be given again.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Stages at once, one thread each (as many as cores).", min=1)] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    config: Config = None,
) -> None:
    """Train and evaluate every method, beside the published figures; a killed run goes on where it was."""
    del config
    with _refusals():
        import os

        from models.benchmark.benchmark import benchmark as run

        where = _where(data, root, output, seed, device, only=tuple(only or ()))
        run(where, jobs=jobs or (1 if device != "cpu" else os.cpu_count() or 1), show=_bars(), tell=_say)
        _say((where.folder / "results.md").read_text(encoding="utf-8"))


def _where(
    data: str, root: Path | None, folder: Path | None, seed: int, device: str, only: tuple[str, ...] = ()
) -> Where:
    from models.benchmark.benchmark import Where
    from models.recipes import RECIPES, recipe_name

    _check_seed(seed)
    _check_device(device)
    _check_folder(folder)
    recipe = recipe_name(data, device)
    return Where(
        recipe=RECIPES[recipe],
        root=root,
        folder=folder or Path("build") / "methods" / recipe,
        seed=seed,
        device=device,
        only=only,
    )


def _bars() -> Show:
    from models.training import progress_bar

    return progress_bar


def _check_places(read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    """Before anything is trained, refuse outputs that cannot be written, or whose file is also an input or another output."""
    flags = {path.resolve(): flag for flag, path in read.items() if path is not None}
    places = {flag: path for flag, path in written.items() if path is not None}
    for flag, path in places.items():
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the file to write")
        other = flags.setdefault(path.resolve(), flag)
        if other != flag:
            raise ValueError(f"--{other} and --{flag} are the same file, {path}: name another place for --{flag}")
    for flag, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if flag != "output" and path.exists():  # it may be a pipe, which is opened once
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} may not be written: name another place for --{flag}")
            continue
        # An artifact is first written beside its place. It replaces what is there only at the very end.
        tried = path.with_name(f".{path.name}.{secrets.token_hex(8)}") if flag == "output" else path
        tried.touch(exist_ok=False)
        tried.unlink()


def _check_folder(path: Path | None) -> None:
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder to write into")


def _options(**values: Any) -> Options:
    from models.fitting import Options

    _check_seed(values["seed"])
    _check_device(values["device"])
    return Options(**values)


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed is from 0 to {MAX_SEED}, not {seed}")


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}: cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the device {device} is not one of cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {device} is not here: PyTorch sees {torch.cuda.device_count()} CUDA devices")


def _hyperparameters(given: list[str], method: str) -> dict[str, dict[str, object]]:
    """Read `fct.hidden=512`; the method may be left out where only one is asked for."""
    read: dict[str, dict[str, object]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        owner, dot, key = name.rpartition(".")
        if not equals or not key or (not dot and method == "auto"):
            raise ValueError(f"the option {text!r} is not of the form method.name=value")
        if dot and method not in ("auto", owner):
            raise ValueError(f"the option {text!r} is not of {method}, which is what is trained")
        try:
            read.setdefault(owner or method, {})[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"the value of {text!r} is not a number, true, false or a quoted string") from error
    return read


def _show_candidates(fitted: Fitted) -> None:
    if len(fitted.candidates) < 2:
        return
    from models.verdict import NAMES, overall

    measures = next(list(each.validation) for each in fitted.candidates if each.validation)
    table = Table(
        "method", *(NAMES[name] for name in measures), "seconds", "", title="Upgrading, on the validation part"
    )
    for each in sorted(fitted.candidates, key=lambda each: -overall(each.validation) if each.validation else 1.0):
        values = [f"{100 * each.validation[name]:.1f}" if each.validation else "" for name in measures]
        note = each.skipped or ("chosen" if each.method == fitted.method else "")
        table.add_row(each.method, *values, f"{each.seconds:.1f}" if each.validation else "", note)
    console.print(table)


def _show(assessment: Assessment) -> None:
    from models.verdict import NAMES

    verdict = assessment.verdict
    titles = {
        "stay": "stay: old queries, old vectors",
        "naive": "naive: new queries, old vectors",
        "upgrade": "upgrade: through the transformation",
        "fuse": f"fuse: {verdict.weight} upgraded + {1 - verdict.weight:.1f} old",
        "ceiling": "ceiling: new queries, new vectors",
    }
    measures = list(verdict.searches["stay"])
    title = f"{verdict.queries:,} queries over {verdict.gallery:,} items that nothing was trained on"
    table = Table("search", *(NAMES[name] for name in measures), title=title)
    for name, measured in verdict.searches.items():
        table.add_row(titles[name], *(f"{100 * measured[measure]:.1f}" for measure in measures))
    console.print(table)
    for warning in (*assessment.warnings, *([verdict.assumption] if verdict.assumption else [])):
        _say(f"Note: {warning}.")
    _say(f"Verdict: {verdict.decision}. {verdict.reason[0].upper()}{verdict.reason[1:]}.")


def _say(text: str) -> None:
    """Print a sentence on one line, whatever characters a path in it has."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write(report: Path | None, found: dict[str, Any]) -> None:
    if report is not None:
        report.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def _progress() -> Iterator[OnFit]:
    """Show a bar for each training on the error stream."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[tuple[str, int], TaskID] = {}
    with Progress(*columns, console=errors) as progress:

        def show(name: str, step: Step) -> None:
            # A method that is trained again, on more rows, has another number of steps.
            if (name, step.total) not in bars:
                bars[name, step.total] = progress.add_task(name, total=step.total)
            progress.update(bars[name, step.total], completed=step.done)

        yield show


@contextmanager
def _refusals() -> Iterator[None]:
    """Say what is wrong in a sentence, without a traceback: the user can mend it, and no code of ours is to blame."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        _refuse(str(error), error)
    except ModuleNotFoundError as error:
        if error.name not in ("sklearn", "PIL"):
            raise
        _refuse(f"{error.name} is not installed: pip install 'forwardfill[train]'", error)


def _refuse(said: str, error: Exception) -> NoReturn:
    errors.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2) from error


if __name__ == "__main__":
    app(prog_name="python -m models")
