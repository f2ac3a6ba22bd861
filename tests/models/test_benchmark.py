from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.benchmark.benchmark import Where, benchmark, chosen
from models.benchmark.experiment import Experiment, started_from
from models.benchmark.report import markdown
from models.benchmark.runs import RUNS, Run
from models.data import Dataset
from models.encoders import Design, residual_network
from models.methods import METHODS
from models.methods.affine import Affine
from models.plan import Plan
from tests.models.small_experiment import small_experiment, small_recipe

SOME = ("FCT, SimCLR", "Procrustes", "OCA")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return small_experiment(tmp_path_factory.mktemp("stages"))


def test_every_method_is_run_except_those_for_texts() -> None:
    assert {run.method for run in RUNS} == set(METHODS) - {"xbt"}  # which has an experiment of its own
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_a_row_is_found_by_its_name_or_its_method() -> None:
    assert chosen("BCT, distillation").options == (("unseen", "distillation"),)
    assert chosen("fct") is RUNS[0]
    with pytest.raises(ValueError, match="'advbct' is not one of FCT, SimCLR"):
        chosen("advbct")


@pytest.mark.slow
def test_with_fct_the_new_model_is_exactly_the_independent_one(experiment: Experiment) -> None:
    (row,) = experiment.rows(chosen("FCT, SimCLR"))
    references = experiment.references("euclidean")
    assert row["new_new"] == references["new_new"]
    assert row["new_old"]["map"] > references["old_old"]["map"]
    assert references["naive"]["map"] < references["old_old"]["map"]
    assert row["positive_flips"] - row["negative_flips"] == pytest.approx(
        row["new_old"]["cmc1"] - references["old_old"]["cmc1"]
    )


@pytest.mark.slow
def test_what_is_done_is_not_done_again(experiment: Experiment) -> None:
    shown: list[str] = []

    @contextmanager
    def remember(title: str) -> Iterator[None]:
        shown.append(title)
        yield

    first = {name: experiment.rows(chosen(name)) for name in SOME}
    again = replace(experiment, show=remember)
    assert {name: again.rows(chosen(name)) for name in SOME} == first
    assert shown == []
    np.testing.assert_array_equal(again.trained(chosen("OCA")).new, experiment.trained(chosen("OCA")).new)


class _Changed(Affine):
    """Another code than that of its base."""


class _Slower(_Changed):
    @classmethod
    def plan(cls, rows: int) -> Plan:
        return replace(super().plan(rows), learning_rate=1e-5)


def test_a_method_whose_code_or_plan_changed_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run, experiment, keys = chosen("affine"), small_experiment(), []
    for method in (Affine, _Changed, _Slower):
        monkeypatch.setitem(METHODS, "affine", method)
        keys += [repr(experiment.depends_on(run)), repr(replace(experiment, seed=1).depends_on(run))]
    assert len(set(keys)) == 6
    monkeypatch.setitem(METHODS, "affine", Affine)
    assert repr(small_experiment().depends_on(run)) == keys[0]


def test_what_is_kept_of_other_data_or_other_old_vectors_is_not_taken() -> None:
    experiment = small_experiment()
    data = experiment.data
    others = [
        replace(experiment, data=replace(data, **{name: getattr(data, name)[::-1].copy()}))
        for name in ("train_images", "train_labels", "test_images", "test_labels")
    ]
    for name in ("Procrustes", "OCA"):
        run = chosen(name)
        keys = [repr(each.depends_on(run)) for each in (experiment, *others)]
        keys.append(repr(experiment.depends_on(replace(run, centred=True))))
        assert len(set(keys)) == len(keys)


def test_what_was_trained_on_another_kind_of_device_is_another_result() -> None:
    for name in ("FCT, SimCLR", "Procrustes", "OCA"):
        keys = [
            repr(replace(small_experiment(), device=device).depends_on(chosen(name)))
            for device in ("cpu", "cuda", "cuda:1")
        ]
        assert keys[0] != keys[1] == keys[2]


def _named(root: Path, data: Dataset, prefix: str) -> None:
    """Write the files that concepts are read from: each image of class k was searched by the prefix and k's name."""
    names = ["".join(chr(ord("a") + int(digit)) for digit in name) for name in data.class_names]
    labels = {"fine_names": names, "coarse_names": ["thing"], "coarse_of_fine": [0] * len(names)}
    (root / "labels.json").write_text(json.dumps(labels))
    splits = {"train": data.train_labels, "test": data.test_labels}
    files = {
        split: {
            name: [f"{prefix}_{name}_s_{at}.png" for at in range((values == place).sum())]
            for place, name in enumerate(names)
        }
        for split, values in splits.items()
    }
    (root / "filenames.json.gz").write_bytes(gzip.compress(json.dumps(files).encode()))


@pytest.mark.slow
def test_image_text_models_are_judged_again_where_the_captions_are_others(
    experiment: Experiment, tmp_path: Path
) -> None:
    shown: list[str] = []

    @contextmanager
    def remember(title: str) -> Iterator[None]:
        shown.append(title)
        yield

    for prefix in ("small", "small", "large"):
        _named(tmp_path, experiment.data, prefix)
        replace(experiment, show=remember).cross_modal(tmp_path)
    assert shown.count("XBT, two image-text models") == 2


@pytest.mark.slow
def test_a_row_that_was_renamed_has_its_new_name(experiment: Experiment) -> None:
    run = chosen("Procrustes")
    assert {row["name"] for row in experiment.rows(run)} == {"Procrustes"}
    assert {row["name"] for row in experiment.rows(replace(run, name="rotation"))} == {"rotation"}


@pytest.mark.slow
def test_re_embedding_starts_at_the_derived_gallery_and_an_oracle_beats_chance(experiment: Experiment) -> None:
    curves = experiment.curves(chosen("FCT, SimCLR"))
    assert curves.keys() == {"random", "distance (an oracle)", "distance to class mean"}
    assert curves["distance (an oracle)"]["map"] > curves["random"]["map"]


@pytest.mark.slow
def test_processes_of_their_own_find_what_one_process_finds(tmp_path: Path) -> None:
    told: list[str] = []
    where = Where(recipe=small_recipe(), root=None, folder=tmp_path / "two", only=("Procrustes",))
    start = time.perf_counter()
    two = benchmark(where, jobs=2, tell=told.append)
    assert 0 < two["seconds_of_this_run"] <= time.perf_counter() - start
    one = benchmark(replace(where, folder=tmp_path / "one"))
    assert [line.partition(":")[0] for line in told].count("Procrustes") == 1
    for found in (one, two):
        for row in found["methods"]:
            row.pop("seconds")
    assert two["methods"] == one["methods"]
    assert json.loads((tmp_path / "two/results.json").read_text())["references"] == one["references"]
    assert "| Procrustes (backward) |" in (tmp_path / "two/results.md").read_text()


def test_the_table_puts_published_figures_beside_ours() -> None:
    found = {"cmc1": 0.5, "cmc5": 0.75, "map": 0.3}
    references = {
        "old_old": {**found, "cmc1": 0.3},
        "naive": {**found, "cmc1": 0.01},
        "new_new": {**found, "cmc1": 0.6},
    }
    row = {
        "name": "FCT, SimCLR",
        "direction": "forward",
        "metric": "euclidean",
        "old_old": references["old_old"],
        "new_old": found,
        "new_new": references["new_new"],
        "negative_flips": 0.05,
        "seconds": 12.3,
    }
    table = markdown({"references": {"euclidean": references}, "methods": [row]}).splitlines()
    assert "| new/old, the naive swap | euclidean | 1.0 | 75.0 | 30.0 |" in table[3]
    assert (
        table[-1] == "| FCT, SimCLR (forward) | euclidean | 50.0 | 75.0 | 30.0 | 67% | 5.0 | 60.0 | 30.0 | 12 "
        "| 50.2 73.7 32.2 (old/old 34.2 60.6 16.5) | 56.5 77.0 36.3 |"
    )
    assert len({line.count("|") for line in table}) == 1


def test_a_row_of_unknown_name_and_no_distance_to_close_is_laid_out() -> None:
    found = {"cmc1": 0.5, "cmc5": 0.75, "map": 0.3}
    references = {"old_old": found, "naive": found, "new_new": found}
    row = {"name": "renamed", "direction": "forward", "metric": "cosine", "negative_flips": 0.0, "seconds": 0.0}
    row |= {"old_old": found, "new_old": found, "new_new": found}
    table = markdown({"references": {"cosine": references}, "methods": [row]}).splitlines()
    assert table[-1] == "| renamed (forward) | cosine | 50.0 | 75.0 | 30.0 |  | 0.0 | 50.0 | 30.0 | 0 | | |"
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_a_map_on_pairs_with_side_information_and_a_size_of_its_own_is_run(experiment: Experiment) -> None:
    assert experiment.rows(Run(name="small", method="fct", options=(("hidden", 8),)))
    two_views = replace(experiment, recipe=replace(small_recipe(), views=2, pair_epochs=1))
    assert two_views.rows(Run(name="with side-information", method="affine", side="autoencoder"))


def test_a_backbone_starts_from_the_independent_model_wherever_the_shapes_agree() -> None:
    design = Design(widths=(4, 8), blocks=2)
    new = residual_network(design, channels=1)
    wider = residual_network(design, channels=1, dimension=11)
    fresh = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    started_from(wider, new)
    kept = 0
    for name, tensor in wider.state_dict().items():
        known = new.state_dict().get(name)
        same = known is not None and known.shape == tensor.shape
        kept += same
        np.testing.assert_array_equal(tensor.numpy(), (known if same else fresh[name]).numpy())
    assert 0 < kept < len(fresh)


#: says which process it gave a task to, which then takes long
POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from models.benchmark.benchmark import _end_with_parent

with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
"""


@pytest.mark.timeout(120)
def test_no_stage_goes_on_without_the_process_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert child.exists()
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while child.exists() and ") Z " not in child.read_text():
        assert time.monotonic() < end, "the stage goes on"
        time.sleep(0.02)


STAGES = """
import signal
import sys
from pathlib import Path
from models.benchmark.benchmark import Where, benchmark
from models.recipes import DIGITS

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs the tests in the background has ignored
    benchmark(Where(recipe=DIGITS, root=None, folder=Path(sys.argv[1]), only=("Procrustes",)), jobs=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("whom", [os.kill, os.killpg], ids=["the parent", "the group, as a terminal does"])
def test_stages_in_processes_end_with_an_interrupt_and_none_is_begun_after_it(
    whom: Callable[[int, int], None], tmp_path: Path
) -> None:
    (tmp_path / "stages.py").write_text(STAGES)
    command = [sys.executable, tmp_path / "stages.py", tmp_path]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as parent:
        while not any(tmp_path.glob("stages/*.checkpoint")):
            assert parent.poll() is None
            time.sleep(0.02)
        whom(parent.pid, signal.SIGINT)
        said, _ = parent.communicate()
    assert said.count(b"Traceback") == 1  # of the one process that was asked, not of its children
    assert said.rstrip().endswith(b"KeyboardInterrupt")
    assert not any(tmp_path.glob("stages/*.safetensors"))
