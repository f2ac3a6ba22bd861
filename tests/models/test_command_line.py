"""`python -m models`, in the process of the tests: what is printed, what is written, and what is refused."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from models.__main__ import app
from models.artifacts import check
from models.runtime import load_transform

ROWS = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a poor old model, a good new one, side-information and labels."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = rng.permutation(np.arange(ROWS) % 5)
    hidden = 2 * rng.normal(size=(5, 8))[labels] + 0.5 * rng.normal(size=(ROWS, 8))
    np.save(folder / "old.npy", (hidden[:, :6] + 5 * rng.normal(size=(ROWS, 6))).astype(np.float32))
    np.save(folder / "new.npy", (hidden @ rng.normal(size=(8, 8))).astype(np.float16))
    np.save(folder / "side.npy", hidden[:, 2:8])
    np.save(folder / "labels.npy", labels)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)


def pairs(data: Path, *, metric: str = "cosine") -> list[object]:
    """The flags that every command on pairs needs."""
    flags = {"source": "old", "target": "new", "side": "side", "labels": "labels"}
    named = [part for flag, name in flags.items() for part in (f"--{flag}", data / f"{name}.npy")]
    return [*named, "--metric", metric]


QUICK = ["--method", "fct", "--option", "hidden=32", "--epochs", 150]


@pytest.fixture(scope="module")
def fitted(data: Path) -> Path:
    """A folder with what a fit wrote."""
    out = data / "out"
    result = run(
        "fit",
        *pairs(data),
        *QUICK,
        *("--output", out / "map.safetensors", "--report", out / "report.json", "--log", out / "loss.csv"),
        *("--checkpoint", out / "state"),
    )
    assert result.exit_code == 0, result.output
    (out / "printed").write_text(result.stdout)
    return out


def refused(result: Result) -> str:
    """What a refusal says: one sentence on the error stream, no traceback."""
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


class TestFit:
    def test_the_artifact_maps_the_old_space_to_the_new(self, data: Path, fitted: Path) -> None:
        transform = load_transform(fitted / "map.safetensors")
        assert transform(np.load(data / "old.npy"), np.load(data / "side.npy")).shape == (ROWS, 8)

    def test_it_prints_every_way_to_search_and_the_verdict_with_its_numbers(self, fitted: Path) -> None:
        printed = (fitted / "printed").read_text()
        for name in ("stay:", "naive:", "upgrade:", "ceiling:", "CMC-1", "mAP", "Verdict: upgrade. Upgrading gains"):
            assert name in printed
        assert json.loads((fitted / "report.json").read_text())["sha256"] in printed

    def test_the_report_holds_what_was_asked_and_what_was_found(self, fitted: Path) -> None:
        report = json.loads((fitted / "report.json").read_text())
        assert report["options"]["hyperparameters"] == {"fct": {"hidden": 32}}
        assert report["parts"] == {"train": 200, "validation": 100, "test": 100}
        assert report["verdict"]["decision"] == "upgrade"
        assert report["evaluation"]["mean_cosine"] > 0.5

    def test_losses_are_logged_and_no_checkpoint_is_left(self, fitted: Path) -> None:
        with (fitted / "loss.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(150)]
        assert not (fitted / "state").exists()

    def test_auto_prints_a_table_of_all_methods(self, data: Path, tmp_path: Path) -> None:
        options = ["--option", "fct.hidden=16", "--option", "fastfill.hidden=16", "--epochs", 2]
        result = run("fit", *pairs(data, metric="euclidean"), *options, "--output", tmp_path / "map")
        assert result.exit_code == 0, result.output
        assert "Upgrading, on the validation part" in result.stdout
        assert "fastfill" in result.stdout
        assert result.stdout.count("chosen") == 1

    def test_two_files_of_vectors_are_enough(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = run("fit", "--source", data / "old.npy", "--target", data / "new.npy", "--method", "procrustes")
        assert result.exit_code == 0, result.output
        assert (
            "transformation.safetensors holds the transformation of procrustes, trained for and judged by cosine"
            in result.stdout
        )
        assert load_transform(tmp_path / "transformation.safetensors")(np.load(data / "old.npy"), None).shape == (
            ROWS,
            8,
        )

    def test_without_labels_it_says_what_it_assumes(self, data: Path, tmp_path: Path) -> None:
        flags = pairs(data)[:6]
        result = run("fit", *flags, "--metric", "cosine", *QUICK, "--output", tmp_path / "map")
        assert result.exit_code == 0, result.output
        assert "recall@10" in result.stdout
        assert "this assumes that it is better" in result.stdout


class TestConfiguration:
    def test_a_file_gives_the_flags_that_are_not_given(self, data: Path, tmp_path: Path) -> None:
        flags = dict(zip(*[iter(pairs(data))] * 2, strict=True))
        lines = [f"{str(flag).removeprefix('--')} = {json.dumps(str(value))}" for flag, value in flags.items()]
        lines += ["epochs = 3", "held-out = 0.4", "method = 'fct'", "option = ['hidden=16']"]
        (tmp_path / "fit.toml").write_text("\n".join(lines))
        result = run(
            "fit",
            *("--config", tmp_path / "fit.toml", "--epochs", 2, "--output", tmp_path / "map"),
            *("--log", tmp_path / "loss.csv", "--report", tmp_path / "report.json"),
        )
        assert result.exit_code == 0, result.output
        assert len((tmp_path / "loss.csv").read_text().splitlines()) == 3  # the flag won: two epochs and the heading
        assert json.loads((tmp_path / "report.json").read_text())["parts"]["test"] == 80

    def test_keys_that_are_no_flag_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "fit.toml").write_text("epoch = 3\nlearning-rate = 0.1\n")
        message = refused(run("fit", "--config", tmp_path / "fit.toml"))
        assert "has epoch, learning-rate, but `fit` takes checkpoint, device" in message

    def test_one_value_where_a_list_belongs_is_refused_with_the_list(self, tmp_path: Path) -> None:
        (tmp_path / "fit.toml").write_text('option = "fct.hidden=16"\n')
        message = refused(run("fit", "--config", tmp_path / "fit.toml"))
        assert "fit.toml has option = 'fct.hidden=16', which is a list: ['fct.hidden=16']" in message

    def test_what_is_no_toml_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "fit.toml").write_text("epochs 3")
        assert "is not TOML" in refused(run("fit", "--config", tmp_path / "fit.toml"))
        assert "No such file" in refused(run("fit", "--config", tmp_path / "absent.toml"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--method", "magic"], "the method 'magic' is not one of "),
            (["--metric", "manhattan"], "the metric 'manhattan' is not one of euclidean"),
            (["--device", "cuda:99"], "the device cuda:99 is not here"),
            (["--device", "abacus"], "there is no device 'abacus'"),
            (["--device", "mps"], "the device mps is not one of cpu, cuda"),
            (["--held-out", "1.5"], "the share held out must be above 0"),
            (["--held-out", "1"], "holding out 400 of 400 different pairs leaves 0 to train on: hold out less"),
            (["--option", "hidden"], "the option 'hidden' is not of the form method.name=value"),
            (["--option", "hidden=wide"], "is not a number, true, false or a quoted string"),
            (["--option", "width=3"], "the hyperparameter of fct 'width' is not one of hidden"),
            (["--option", "hidden='wide'"], "the hyperparameter hidden of fct is int, not 'wide'"),
            (["--option", "hidden=true"], "the hyperparameter hidden of fct is int, not True"),
            (["--option", "affine.ridge=1"], "the option 'affine.ridge=1' is not of fct"),
            (
                ["--method", "lambda_orthogonality", "--option", "threshold=inf"],
                "the hyperparameter threshold of lambda_orthogonality is a finite number, not inf",
            ),
            (["--method", "fastfill", "--option", "temperature=0"], "temperature must be positive, not 0"),
            (
                ["--method", "lambda_orthogonality", "--option", "temperature=-0.5"],
                "temperature must be positive, not -0.5",
            ),
            (["--output", "."], ". is a folder: name the file to write"),
            (["--source", "[absent].npy"], "No such file or directory: '[absent].npy'"),
        ],
    )
    def test_a_flag_that_cannot_be_followed(self, data: Path, tmp_path: Path, flags: list[str], message: str) -> None:
        result = run("fit", *pairs(data), *QUICK, "--output", tmp_path / "map", *flags)
        assert message in refused(result)
        assert not (tmp_path / "map").exists()

    @pytest.mark.parametrize(
        ("method", "option", "message"),
        [
            ("low_rank", "rank=0", "rank must be at least 1, not 0"),
            ("residual_mlp", "hidden=0", "hidden must be from 1 to 65536, not 0"),
            ("xbt", "expansion=0", "expansion must be from 1 to 8192, not 0"),
            ("l2", "weight=-1", "weight must be at least 0, not -1"),
            ("fastfill", "similarity=-1.0", "similarity must be at least 0, not -1.0"),
            ("fastfill", "smoothing=1.5", "smoothing must be from 0 to 1, not 1.5"),
            ("lambda_orthogonality", "backward_weight=-1", "backward_weight must be at least 0, not -1"),
        ],
    )
    def test_a_hyperparameter_out_of_its_range_is_named(
        self, data: Path, tmp_path: Path, method: str, option: str, message: str
    ) -> None:
        flags = ["--method", method, "--option", option, "--output", tmp_path / "map"]
        assert message in refused(run("fit", *pairs(data), *flags))

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("--output", "--checkpoint"),
            ("--output", "--report"),
            ("--checkpoint", "--log"),
            ("--source", "--output"),
            ("--labels", "--report"),
        ],
    )
    def test_a_file_that_two_flags_name_is_not_written_over(
        self, data: Path, tmp_path: Path, first: str, second: str
    ) -> None:
        place, same = tmp_path / "file", tmp_path / "folder" / ".." / "file"
        place.write_bytes((data / "labels.npy").read_bytes())
        (tmp_path / "folder").mkdir()
        flags = [first, place, second, same]
        result = run(
            "fit", *pairs(data), *QUICK, *(["--output", tmp_path / "map"] if "--output" not in flags else []), *flags
        )
        assert f"{first} and {second} are the same file" in refused(result)
        assert place.read_bytes() == (data / "labels.npy").read_bytes()

    def test_a_report_is_not_written_over_the_artifact_that_is_judged(self, data: Path, fitted: Path) -> None:
        artifact = fitted / "map.safetensors"
        result = run("evaluate", *pairs(data), "--artifact", artifact, "--report", artifact)
        assert "--artifact and --report are the same file" in refused(result)
        assert check(artifact).kind == "fct"

    @pytest.mark.parametrize("flag", ["--output", "--checkpoint", "--log", "--report"])
    def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_trained(
        self, data: Path, tmp_path: Path, flag: str
    ) -> None:
        result = run("fit", *pairs(data), *QUICK, "--output", tmp_path / "map", flag, tmp_path)
        assert f"{tmp_path} is a folder: name the file to write" in refused(result)
        assert not list(tmp_path.iterdir())

    def test_an_output_that_cannot_be_written_is_refused_before_anything_is_trained(
        self, data: Path, tmp_path: Path
    ) -> None:
        flags = ["--output", tmp_path / ("x" * 254), "--log", tmp_path / "loss.csv"]
        assert "File name too long" in refused(run("fit", *pairs(data), *QUICK, *flags))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("flag", ["--checkpoint", "--log", "--report"])
    def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_trained(
        self, data: Path, tmp_path: Path, flag: str
    ) -> None:
        flags = ["--output", tmp_path / "map", flag, "/proc/forwardfill"]  # nobody may make a file there
        assert "/proc/forwardfill" in refused(run("fit", *pairs(data), *QUICK, *flags))
        assert not list(tmp_path.iterdir())

    def test_a_file_that_is_named_as_a_state_and_not_needed_is_left_alone(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("precious")
        flags = ["--method", "procrustes", "--output", tmp_path / "map", "--checkpoint", tmp_path / "precious"]
        assert run("fit", *pairs(data), *flags).exit_code == 0
        assert (tmp_path / "precious").read_text() == "precious"

    def test_a_method_that_compares_otherwise(self, data: Path, tmp_path: Path) -> None:
        result = run("fit", *pairs(data, metric="euclidean"), "--method", "xbt", "--output", tmp_path / "map")
        assert "xbt makes vectors that are compared by cosine, not by euclidean" in refused(result)

    def test_what_the_benchmark_cannot_train_without_captions(self, tmp_path: Path) -> None:
        flags = ["--data", "digits", "--output", tmp_path / "out"]
        for root in ([], ["--root", tmp_path]):
            assert "name their folder (--root)" in refused(run("benchmark", "--only", "XBT", *flags, *root))
        assert "XBT is trained by `benchmark` alone" in refused(
            run("train", "--method", "XBT", "--data", "digits", "--output", tmp_path, "--stages", tmp_path / "stages")
        )
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["train", "benchmark"])
    @pytest.mark.parametrize(
        ("device", "message"),
        [("cuda:99", "the device cuda:99 is not here"), ("bogus", "there is no device 'bogus'")],
    )
    def test_a_device_that_is_not_here_trains_nothing(
        self, tmp_path: Path, command: str, device: str, message: str
    ) -> None:
        method = ["--method", "procrustes", "--stages", tmp_path / "stages"] if command == "train" else []
        result = run(command, *method, "--data", "digits", "--output", tmp_path / "out", "--device", device)
        assert message in refused(result)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("command", "flag"), [("train", "--output"), ("train", "--stages"), ("benchmark", "--output")]
    )
    def test_a_file_in_place_of_a_folder_is_refused_before_anything_is_trained(
        self, tmp_path: Path, command: str, flag: str
    ) -> None:
        (tmp_path / "file").write_text("precious")
        needed = ["--method", "procrustes", "--output", tmp_path / "out", "--stages", tmp_path / "stages"]
        result = run(command, *(needed if command == "train" else []), "--data", "digits", flag, tmp_path / "file")
        assert f"{tmp_path}/file is a file: name a folder to write into" in refused(result)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
    def test_a_seed_out_of_range_is_refused_with_the_range(self, data: Path, tmp_path: Path, seed: int) -> None:
        message = f"the seed is from 0 to 9223372036854775807, not {seed}"
        assert message in refused(run("fit", *pairs(data), "--output", tmp_path / "map", "--seed", seed))
        assert message in refused(run("benchmark", "--data", "digits", "--output", tmp_path / "out", "--seed", seed))

    def test_a_bad_file_is_named(self, data: Path, tmp_path: Path) -> None:
        bad = np.load(data / "new.npy")
        bad[7, 0] = np.nan
        np.save(tmp_path / "bad.npy", bad)
        result = run("fit", *pairs(data), *QUICK, "--target", tmp_path / "bad.npy", "--output", tmp_path / "map")
        assert f"{tmp_path}/bad.npy has 1 rows with a NaN or an infinity, the first is row 7: drop" in refused(result)

    def test_vectors_whose_scores_would_overflow_are_refused_by_file_and_row(self, data: Path, tmp_path: Path) -> None:
        long = np.load(data / "new.npy").astype(np.float32)
        long[7] *= 1e19
        np.save(tmp_path / "long.npy", long)
        result = run("fit", *pairs(data), *QUICK, "--target", tmp_path / "long.npy", "--output", tmp_path / "map")
        assert f"{tmp_path}/long.npy has 1 rows longer than 9e+18, the first is row 7" in refused(result)
        assert not (tmp_path / "map").exists()


class TestEvaluate:
    def test_an_artifact_is_judged_in_the_same_way(self, data: Path, fitted: Path, tmp_path: Path) -> None:
        artifact = ("--artifact", fitted / "map.safetensors")
        result = run("evaluate", *pairs(data), *artifact, "--report", tmp_path / "report.json")
        assert result.exit_code == 0, result.output
        assert "Verdict: upgrade" in result.stdout
        found, before = (
            json.loads(path.read_text())["verdict"] for path in (tmp_path / "report.json", fitted / "report.json")
        )
        assert found.keys() == before.keys()
        assert found["queries"] == ROWS // 2

    def test_what_is_no_artifact_is_refused(self, data: Path) -> None:
        message = refused(run("evaluate", *pairs(data), "--artifact", data / "old.npy"))
        assert "this is a NumPy file, not a safetensors file" in message

    def test_the_wrong_direction_is_refused(self, data: Path, fitted: Path) -> None:
        flags = ("--artifact", fitted / "map.safetensors", "--direction", "backward")
        assert "look at the direction" in refused(run("evaluate", *pairs(data), *flags))


class TestExport:
    def test_half_the_bytes_for_a_small_error(self, fitted: Path, tmp_path: Path) -> None:
        result = run("export", "--artifact", fitted / "map.safetensors", "--output", tmp_path / "half.safetensors")
        assert result.exit_code == 0, result.output
        info, before = check(tmp_path / "half.safetensors"), check(fitted / "map.safetensors")
        assert info.dtype == "float16"
        assert info.architecture == before.architecture
        assert info.size < 0.7 * before.size
        error = float(result.stdout.split("differs by ")[1].split()[0])
        assert 0 < error < 0.01

    def test_the_same_type_changes_nothing(self, fitted: Path, tmp_path: Path) -> None:
        flags = ("--artifact", fitted / "map.safetensors", "--output", tmp_path / "same", "--dtype", "float32")
        result = run("export", *flags)
        # Where numbers lie in memory can change the last bit of a product, even of equal weights.
        (differs,) = re.findall(r"differs by (\S+)", result.stdout)
        assert float(differs) < 1e-6
        assert (tmp_path / "same").read_bytes() == (fitted / "map.safetensors").read_bytes()

    def test_what_is_read_is_not_written_over_with_fewer_digits(self, fitted: Path) -> None:
        artifact = fitted / "map.safetensors"
        result = run("export", "--artifact", artifact, "--output", artifact)
        assert "--artifact and --output are the same file" in refused(result)
        assert check(artifact).dtype == "float32"

    def test_an_unknown_type_is_refused(self, fitted: Path, tmp_path: Path) -> None:
        flags = ("--artifact", fitted / "map.safetensors", "--output", tmp_path / "map", "--dtype", "int4")
        assert "the type 'int4' is not one of float32" in refused(run("export", *flags))


def test_the_package_runs_and_its_help_does_not_wait_for_pytorch() -> None:
    code = "import sys, runpy; sys.argv = ['models', '--help']\ntry: runpy.run_module('models', run_name='__main__')\n"
    code += "except SystemExit as end: sys.exit(end.code or ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("fit", "evaluate", "export"):
        assert command in done.stdout
