import hashlib
import io
import json
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.artifacts import FORMAT, UnsafeArtifact, check, load, read_architecture, save
from models.transformations import Architecture, Fct, Linear, Transformation, build, optional_tensors
from tests.models.test_transformations import ARCHITECTURES

LINEAR = {"kind": "linear", "source_dimension": 3, "target_dimension": 2}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def header(**changes: Any) -> dict[str, Any]:
    """The header of a good file: a linear transformation, 24 bytes of data."""
    return {
        "__metadata__": {"format": FORMAT, "architecture": json.dumps(LINEAR)},
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        **changes,
    }


def randomised(architecture: Architecture, *, everything: bool = False) -> Transformation:
    module = build(architecture, optional=optional_tensors(architecture) if everything else ())
    module.load_state_dict({name: torch.rand_like(value) for name, value in module.state_dict().items()})
    return module.eval()


@pytest.mark.parametrize("everything", [False, True], ids=["required tensors", "all tensors"])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_saved_transformation_loads_as_itself(tmp_path: Path, architecture: Architecture, everything: bool) -> None:
    module = randomised(architecture, everything=everything)
    digest = save(tmp_path / "a.safetensors", module)
    loaded = load(tmp_path / "a.safetensors")
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert loaded.architecture == read_architecture(tmp_path / "a.safetensors") == architecture
    assert not loaded.training
    assert loaded.state_dict().keys() == module.state_dict().keys()
    x, s = torch.rand(5, architecture.source_dimension), torch.rand(5, 3)
    torch.testing.assert_close(loaded(x, s), module(x, s), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_and_loads_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    module = randomised(ARCHITECTURES["fct"])
    save(tmp_path / "a", module, dtype=dtype)
    assert check(tmp_path / "a").dtype == str(dtype).removeprefix("torch.")
    for name, tensor in load(tmp_path / "a").state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, module.state_dict()[name].to(dtype).float(), rtol=0, atol=0)


def test_check_tells_what_the_file_is(tmp_path: Path) -> None:
    fct = Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=16)
    save(tmp_path / "a", randomised(fct, everything=True))
    info = check(tmp_path / "a")
    assert (info.kind, info.source_dimension, info.target_dimension, info.side_dimension) == ("fct", 6, 4, 3)
    assert info.has_uncertainty
    assert info.architecture["hidden"] == 16
    assert info.dtype == "float32"
    assert info.size == (tmp_path / "a").stat().st_size
    assert info.parameters == sum(t.numel() for t in randomised(fct, everything=True).state_dict().values())


def test_a_file_written_without_our_code_is_accepted(tmp_path: Path) -> None:
    metadata = {"format": FORMAT, "architecture": json.dumps(LINEAR), "note": "written by somebody else"}
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "a", metadata=metadata)
    assert load(tmp_path / "a")(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_the_hand_written_header_of_these_tests_is_good(tmp_path: Path) -> None:
    assert check(write(tmp_path / "a", header(), bytes(24))).kind == "linear"


def pickled() -> bytes:
    return pickle.dumps({"weight": [1.0, 2.0]})


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2, 3)}, buffer)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("weights", "1")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 8 bytes"),
        (b"\x01\x02", "at least 8 bytes"),
        (pickled(), "pickle"),
        (torch_saved(), "zip archive"),
        (zipped(), "zip archive"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "NumPy"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "the limit is"),
        ((100).to_bytes(8, "little") + b"{}", "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((4).to_bytes(8, "little") + b"\xff\xff\xff\xff", "not well-formed JSON"),
        ((3).to_bytes(8, "little") + b"{,}", "not well-formed JSON"),
        ((2).to_bytes(8, "little") + b"{}", "no metadata"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "not well-formed JSON"),
    ],
)
def test_what_is_not_a_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    for judge in (check, read_architecture, load):
        with pytest.raises(UnsafeArtifact, match=message):
            judge(tmp_path / "a")


def metadata(**changes: str) -> dict[str, Any]:
    return header(__metadata__={"format": FORMAT, "architecture": json.dumps(LINEAR), **changes})


def tensor(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return header(weight={"dtype": dtype, "shape": shape, "data_offsets": offsets})


BIAS = {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        (metadata(format="pt"), 24, "format is 'pt'"),
        (metadata(architecture="{"), 24, "the architecture is not well-formed JSON"),
        (metadata(architecture='{"kind": "linear", "kind": "mlp"}'), 24, "a key is there twice"),
        (metadata(architecture=json.dumps({**LINEAR, "source_dimension": float("nan")})), 24, "NaN is not JSON"),
        (metadata(architecture=json.dumps({**LINEAR, "kind": "pickle"})), 24, "'pickle' is not one of"),
        (metadata(architecture=json.dumps({**LINEAR, "code": "os.system"})), 24, "unknown field 'code'"),
        (header(__metadata__={"format": FORMAT}), 24, "declares no architecture"),
        (header(__metadata__={"format": 1}), 24, "no metadata of strings"),
        (header(extra=BIAS), 32, "no tensor 'extra'"),
        ({"__metadata__": header()["__metadata__"]}, 0, "needs the tensor 'weight'"),
        (tensor(shape=[3, 2]), 24, r"has shape \(3, 2\), it must be \(2, 3\)"),
        (tensor(dtype="F64", offsets=[0, 48]), 48, "only F32, F16, BF16"),
        (tensor(dtype="I32"), 24, "only F32, F16, BF16"),
        (tensor(dtype=["F32"]), 24, "only F32, F16, BF16"),
        (tensor(shape=[2, -3]), 24, "not lists of whole numbers"),
        (tensor(shape=[2.0, 3]), 24, "not lists of whole numbers"),
        (tensor(shape="23"), 24, "not lists of whole numbers"),
        (tensor(offsets=[0, 24, 48]), 24, "not lists of whole numbers"),
        (tensor(offsets=[0, 20]), 24, "do not fit its shape"),
        (tensor(offsets=[24, 0]), 24, "do not fit its shape"),
        (tensor(offsets=[8, 32]), 32, "a gap or overlap"),
        (header(bias={**BIAS, "data_offsets": [16, 24]}), 24, "a gap or overlap"),
        (header(weight={**tensor()["weight"], "name": "x"}), 24, "and nothing else"),
        (header(), 23, "truncated or too long"),
        (header(), 25, "truncated or too long"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, text: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(UnsafeArtifact, match=message):
        check(write(tmp_path / "a", text, bytes(size)))


@pytest.mark.parametrize(
    "shape", [[9] * 250_000, [10**4299] * 200], ids=["very many sizes", "sizes of thousands of digits"]
)
def test_a_shape_that_is_huge_is_refused_without_multiplying_it(tmp_path: Path, shape: list[int]) -> None:
    """It took 3 s in one call that nothing else in the process can interrupt: every search would wait for it."""
    path = write(tmp_path / "a", tensor(shape=shape), bytes(24))
    began = time.thread_time()
    with pytest.raises(UnsafeArtifact, match="not lists of whole numbers"):
        check(path)
    assert time.thread_time() - began < 1


GOOD = json.dumps(header())


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        *(GOOD.encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le")),
        GOOD.replace("[0, 24]", "[-0, 24]").encode(),
        json.dumps(metadata(note="\ud800")).encode(),
        json.dumps(metadata(**{"\udfff": "note"})).encode(),
    ],
    ids=["BOM", "UTF-16", "UTF-16 LE", "UTF-16 BE", "UTF-32", "UTF-32 LE", "-0", "lone surrogate", "as a key"],
)
def test_a_header_that_the_library_does_not_read_is_refused(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "a", text, bytes(24))
    for judge in (check, read_architecture, load):
        with pytest.raises(UnsafeArtifact, match="the header is no"):
            judge(path)


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(header())[:-1] + ', "weight": ' + json.dumps(header()["weight"]) + "}"
    with pytest.raises(UnsafeArtifact, match="a key is there twice"):
        check(write(tmp_path / "a", text.encode(), bytes(24)))


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "good", randomised(Linear(source_dimension=3, target_dimension=2)))
    content = (tmp_path / "good").read_bytes()
    for length in range(len(content)):
        (tmp_path / "a").write_bytes(content[:length])
        with pytest.raises(UnsafeArtifact):
            check(tmp_path / "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, name: str, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 3, dtype=dtype)
    weight[1, 2] = value
    data = weight.view(torch.int16 if name != "F32" else torch.int32).numpy().tobytes()
    with pytest.raises(UnsafeArtifact, match="NaN or an infinity"):
        check(write(tmp_path / "a", tensor(dtype=name, offsets=[0, len(data)]), data))


def test_the_largest_bfloat16_is_finite(tmp_path: Path) -> None:
    data = np.full(6, 0x7F7F, "<u2").tobytes()
    assert check(write(tmp_path / "a", tensor(dtype="BF16", offsets=[0, 12]), data)).dtype == "bfloat16"


def test_a_negative_running_variance_is_refused(tmp_path: Path) -> None:
    module = randomised(ARCHITECTURES["fct"])
    module.state_dict()["old.0.norm.running_var"][0] = -1.0
    with pytest.raises(UnsafeArtifact, match=r"'old.0.norm.running_var' holds a negative variance"):
        save(tmp_path / "a", module)


def test_what_would_not_load_is_never_written(tmp_path: Path) -> None:
    module = randomised(Linear(source_dimension=3, target_dimension=2))
    module.state_dict()["weight"][0, 0] = 1e30
    save(tmp_path / "a", module)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(UnsafeArtifact, match="infinity"):
        save(tmp_path / "a", module, dtype=torch.float16)
    assert (tmp_path / "a").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_other_types_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        save(tmp_path / "a", build(Linear(source_dimension=3, target_dimension=2)), dtype=torch.float64)


def test_equal_weights_make_equal_files_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from models.artifacts import save; from models.transformations import Linear, build\n"
        "torch.manual_seed(0); print(save(sys.argv[1], build(Linear(source_dimension=3, target_dimension=2))))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / str(turn)], capture_output=True, text=True, check=True
        ).stdout
        for turn in range(3)
    }
    assert len(digests) == 1
