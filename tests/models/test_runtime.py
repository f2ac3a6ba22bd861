import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.arithmetic import Rule, error
from models.artifacts import UnsafeArtifact, load, save
from models.runtime import Transform, few_counts, load_transform
from models.transformations import Fct, Linear, build

UNCERTAINTY = ("uncertainty.weight", "uncertainty.bias")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = build(Fct(source_dimension=6, target_dimension=4, side_dimension=3, hidden=16), optional=UNCERTAINTY)
    for _ in range(5):  # running statistics that are not the initial ones
        module(torch.rand(32, 6), torch.rand(32, 3))
    save(tmp_path / "fct.safetensors", module)
    return tmp_path / "fct.safetensors"


def pair(rows: int, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    return rng.random((rows, 6)).astype(dtype), rng.random((rows, 3)).astype(dtype)


def test_it_states_its_dimensions(artifact: Path) -> None:
    transform = load_transform(artifact)
    assert (transform.source_dimension, transform.target_dimension, transform.side_dimension) == (6, 4, 3)
    without = Transform(build(Linear(source_dimension=6, target_dimension=4)))
    assert without.side_dimension is None


def test_it_computes_what_the_module_computes(artifact: Path) -> None:
    transform = load_transform(artifact)
    embeddings, side = pair(10)
    output = transform(embeddings, side)
    assert output.dtype == np.float32
    assert output.shape == (10, 4)
    expected = transform._module(torch.from_numpy(embeddings), torch.from_numpy(side))
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_the_rows_beside_it(artifact: Path) -> None:
    embeddings, side = pair(23)
    whole = load_transform(artifact)(embeddings, side)
    in_blocks = load_transform(artifact, block=5)(embeddings, side)
    one_by_one = np.concatenate([load_transform(artifact)(embeddings[i : i + 1], side[i : i + 1]) for i in range(23)])
    np.testing.assert_allclose(in_blocks, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_read_only_mapped_column_is_transformed_without_a_warning(
    artifact: Path, tmp_path: Path, dtype: type
) -> None:
    embeddings, side = pair(12, dtype)
    np.save(tmp_path / "e.npy", embeddings)
    np.save(tmp_path / "s.npy", side)
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r"), np.load(tmp_path / "s.npy", mmap_mode="r")
    transform = load_transform(artifact)
    np.testing.assert_array_equal(transform(*mapped), transform(embeddings, side))


def test_columns_that_are_not_contiguous_are_transformed(artifact: Path) -> None:
    embeddings, side = pair(12)
    transform = load_transform(artifact)
    np.testing.assert_array_equal(
        transform(embeddings[::2], side[::2]), transform(embeddings[::2].copy(), side[::2].copy())
    )


def test_no_rows_give_no_rows(artifact: Path) -> None:
    transform = load_transform(artifact)
    assert transform(*pair(0)).shape == (0, 4)
    uncertainty = transform.uncertainty(*pair(0))
    assert uncertainty is not None
    assert uncertainty.shape == (0,)


def test_blocks_that_are_handed_in_give_what_calls_give(artifact: Path) -> None:
    transform = load_transform(artifact)
    pairs = [pair(rows) for rows in (7, 7, 3, 0)]
    for made, each in zip(transform.each(pairs), pairs, strict=True):
        np.testing.assert_array_equal(made, transform(*each))


def test_what_is_asked_for_in_bfloat16_is_so_within_the_stated_error(artifact: Path) -> None:
    exact = load_transform(artifact, rule=Rule("bfloat16", largest_error=0.05))
    embeddings, side = pair(500)
    quick = exact.quickest(embeddings, side)
    assert quick is not None
    assert (exact.computed_in, quick.computed_in) == ("float32", "bfloat16")
    made, expected = quick(embeddings, side), exact(embeddings, side)
    assert made.dtype == np.float32
    assert 0 < error(expected, made) < 0.05
    assert exact.computed_in == "float32", "what is given out does not change"
    np.testing.assert_array_equal(exact(embeddings, side), expected)


def test_any_numbers_of_rows_are_computed_as_few(artifact: Path) -> None:
    """A kernel is compiled and kept for each number of rows that bfloat16 is computed with."""
    embeddings, side = pair(500)
    quick = load_transform(artifact, rule=Rule("bfloat16", largest_error=0.05)).quickest(embeddings, side)
    assert quick is not None
    met = set[int]()
    for layer in quick._module.modules():
        layer.register_forward_hook(lambda module, taken, made: met.add(len(made)))
    whole = quick(embeddings, side)
    for rows in range(1, 501, 7):
        made = quick(embeddings[:rows], side[:rows])
        assert made.shape == (rows, 4)
        np.testing.assert_allclose(made, whole[:rows], atol=0.05)
    uncertain = quick.uncertainty(embeddings[:77], side[:77])
    assert uncertain is not None
    assert uncertain.shape == (77,)
    assert 0 < len(met) <= 8


@given(st.integers(0, 10_000))
def test_few_counts_are_at_most_half_as_many_more(rows: int) -> None:
    assert rows <= few_counts(rows) <= max(rows * 3 / 2, rows + 31)
    assert few_counts(few_counts(rows)) == few_counts(rows)


def test_bfloat16_is_refused_where_vectors_lie_so_far_from_zero_that_nothing_of_them_would_be_left() -> None:
    """Only the vectors themselves tell: of those around zero the same map is near enough."""
    module = build(Linear(source_dimension=6, target_dimension=6), optional=("source_mean",))
    with torch.no_grad():
        module.weight.copy_(torch.eye(6))
        module.source_mean.fill_(1000)
    transform = Transform(module, rule=Rule("bfloat16", largest_error=0.01))
    around = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    quick = transform.quickest(around)
    assert quick is not None
    assert quick.computed_in == "bfloat16"
    assert transform.quickest(around + 1000) is transform


def test_what_computes_in_bfloat16_is_tried_no_more_and_no_module_is_changed_by_it(artifact: Path) -> None:
    module = load(artifact)
    before = copy.deepcopy(module.state_dict())
    quick = Transform(module, rule=Rule("bfloat16", largest_error=0.05), computed_in="bfloat16")
    assert quick.quickest(*pair(500)) is quick
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_too_few_rows_are_no_sample(artifact: Path) -> None:
    assert load_transform(artifact, rule=Rule("bfloat16")).quickest(*pair(10)) is None


def test_float32_is_computed_where_nothing_else_is_asked_for(artifact: Path) -> None:
    transform = load_transform(artifact)
    assert transform.quickest(*pair(500)) is transform


def test_uncertainty_is_the_head_on_the_output(artifact: Path) -> None:
    transform = load_transform(artifact, block=4)
    embeddings, side = pair(10)
    state = transform._module.state_dict()
    output = torch.from_numpy(transform(embeddings, side))
    expected = output @ state["uncertainty.weight"][0] + state["uncertainty.bias"]
    np.testing.assert_allclose(transform.uncertainty(embeddings, side), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_without_a_head_there_is_no_uncertainty() -> None:
    transform = Transform(build(Linear(source_dimension=6, target_dimension=4)))
    assert transform.uncertainty(pair(3)[0]) is None


def test_side_information_is_ignored_where_none_is_needed() -> None:
    transform = Transform(build(Linear(source_dimension=6, target_dimension=4)))
    embeddings, side = pair(3)
    np.testing.assert_array_equal(transform(embeddings, side), transform(embeddings))


def test_many_threads_get_what_one_gets(artifact: Path) -> None:
    transform = load_transform(artifact, block=7)
    pairs = [pair(rows) for rows in range(1, 60)]
    expected = [transform(*each) for each in pairs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda each: transform(*each), pairs), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_refused_with_the_right_ones(artifact: Path) -> None:
    transform = load_transform(artifact)
    embeddings, side = pair(5)
    with pytest.raises(ValueError, match=r"pass `side` of shape \(n, 3\)"):
        transform(embeddings)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(n, 6\), not \(5, 3\)"):
        transform(side, embeddings)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(n, 6\), not \(6,\)"):
        transform(embeddings[0], side)
    with pytest.raises(ValueError, match=r"side must have shape \(5, 3\), not \(4, 3\)"):
        transform(embeddings, side[:4])
    with pytest.raises(ValueError, match="at least 1 row"):
        load_transform(artifact, block=0)


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x80\x04not an artifact.")
    with pytest.raises(UnsafeArtifact):
        load_transform(tmp_path / "bad")


def test_import_does_not_touch_cuda() -> None:
    code = "import models.runtime, torch; raise SystemExit(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
