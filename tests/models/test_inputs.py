from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import inputs
from models.fitting import Options, assess
from models.inputs import Pairs, read_pairs, split, warnings_about
from tests.models.known_pairs import different, extracted, hiding, judged


class TestSplit:
    @given(st.integers(20, 400), st.floats(0.05, 0.9), st.integers(0, 5), st.integers(1, 60) | st.none())
    def test_each_row_is_in_one_part(self, rows: int, share: float, seed: int, classes: int | None) -> None:
        labels = None if classes is None else np.random.default_rng(seed).integers(0, classes, rows)
        pairs = different(rows, labels=labels)
        try:
            parts = split(pairs, held_out=share, seed=seed)
        except ValueError as error:
            assert "hold out more" in str(error)  # noqa: PT017 - a share that leaves nothing to judge by
            return
        together = np.concatenate([parts.train, parts.validation, parts.test])
        np.testing.assert_array_equal(np.sort(together), np.arange(rows))

    def test_a_seed_decides(self) -> None:
        pairs = hiding(1, 1)
        first, again, other = (split(pairs, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first.test, again.test)
        assert set(first.test) != set(other.test)

    def test_each_label_gives_its_share_and_is_held_out_in_twos(self) -> None:
        labels = np.repeat(np.arange(100), 10)
        pairs = different(1000, labels=labels)
        parts = split(pairs)
        assert (len(parts.train), len(parts.validation), len(parts.test)) == (800, 100, 100)
        np.testing.assert_array_equal(np.bincount(labels[parts.train]), np.full(100, 8))
        for part in (parts.validation, parts.test):
            assert set(np.bincount(labels[part], minlength=100)) == {0, 2}

    def test_frequent_labels_are_in_every_part_alike(self) -> None:
        labels = np.repeat(np.arange(4), 500)
        parts = split(different(2000, labels=labels))
        for part, expected in ((parts.train, 400), (parts.validation, 50), (parts.test, 50)):
            assert np.abs(np.bincount(labels[part]) - expected).max() <= 4

    @pytest.mark.parametrize(("rows", "expected"), [(20, 5), (500, 100), (5_000, 500), (300_000, 20_000)])
    def test_few_pairs_hold_out_more_and_many_no_more_than_judging_needs(self, rows: int, expected: int) -> None:
        parts = split(different(rows))
        assert len(parts.validation) == len(parts.test) == expected
        assert len(parts.train) == rows - 2 * expected

    def test_labels_that_stand_alone_are_not_judged_by(self) -> None:
        pairs = different(900, width=2, labels=np.arange(900))
        parts = split(pairs)
        assert not parts.labelled
        assert any("stand alone" in warning for warning in warnings_about(pairs, parts))

    @pytest.mark.parametrize("others", [0, 1, 3])
    def test_one_label_for_all_rows_that_are_held_out_is_as_good_as_none(self, others: int) -> None:
        """Whatever is found has it: every search would be perfect, and none better than another."""
        pairs = hiding(2.0, 0.3)
        alike = replace(pairs, labels=np.maximum(0, np.arange(len(pairs)) - len(pairs) + others + 1))
        assert not split(alike).labelled
        assessment = assess(extracted(), alike, Options())
        assert assessment.verdict == judged(replace(pairs, labels=None), extracted())
        assert any("all the same" in warning for warning in assessment.warnings)

    @pytest.mark.parametrize("labelled", [True, False])
    @pytest.mark.parametrize("times", [2, 6])
    def test_no_pair_is_judged_by_that_is_trained_on_or_judged_by_already(self, labelled: bool, times: int) -> None:
        once = different(300, labels=np.arange(300) % 7 if labelled else None)
        several = once.take(np.tile(np.arange(300), times))
        parts, alone = split(several), split(once)
        for name in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(alone, name))
        assert any(
            f"{300 * (times - 1):,} of {300 * times:,} pairs are copies" in w for w in warnings_about(several, parts)
        )
        assert alone.copies == 0
        assert not any("copies" in warning for warning in warnings_about(once, alone))

    def test_a_pair_is_a_copy_where_both_vectors_are_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inputs, "CHECKED_ROWS", 16)
        source, target = np.arange(40.0)[:, None], np.arange(40.0)[:, None]
        source[30], target[31], source[32], target[32] = source[3], target[4], source[5], target[5]
        parts = split(Pairs(source=source, target=target))
        assert set(range(40)) - {*parts.train, *parts.validation, *parts.test} == {32}

    @pytest.mark.parametrize("error", [1e-7, 1e-6])
    def test_the_same_thing_embedded_again_is_a_copy_though_its_last_digits_differ(self, error: float) -> None:
        """As a model gives them where it stands in another batch: what is trained on would be judged by."""
        rng = np.random.default_rng(0)
        once = Pairs(source=rng.normal(size=(500, 64)), target=rng.normal(size=(500, 32)) + 3)

        def again(vectors: np.ndarray) -> np.ndarray:
            return np.concatenate([vectors, vectors * (1 + error * rng.normal(size=vectors.shape))]).astype(np.float32)

        parts = split(Pairs(source=again(once.source), target=again(once.target)))
        assert 490 <= parts.copies <= 500  # few lie at the edge of a cell

    def test_too_few_different_pairs_are_counted_without_their_copies(self) -> None:
        with pytest.raises(ValueError, match=r"of 3 different pairs leaves nothing to judge by"):
            split(different(3).take(np.tile(np.arange(3), 50)))

    def test_warnings_name_the_number_that_would_do(self) -> None:
        def about(rows: int) -> list[str]:
            pairs = different(rows, width=128)
            return warnings_about(pairs, split(pairs, held_out=0.2))

        assert "320 pairs in all would do" in about(200)[0]
        assert "1,000 pairs in all would do" in about(200)[1]
        assert not about(1000)


class TestInputs:
    def write(self, folder: Path, **columns: np.ndarray) -> dict[str, Path]:
        paths = {name: folder / f"{name}.npy" for name in columns}
        for name, values in columns.items():
            np.save(paths[name], values)
        return paths

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("target", np.ones((19, 3)), "target.npy has 19 rows, .*source.npy has 20: row i must be the same item"),
            ("target", np.ones(20), r"target.npy has shape \(20,\): vectors are rows of one matrix"),
            ("target", np.ones((20, 3), complex), "target.npy holds complex128: vectors are real numbers"),
            ("side", np.ones((20, 3), "U4"), "side.npy holds <U4: vectors are real numbers"),
            ("labels", np.ones((20, 1), int), r"labels.npy holds int64 of shape \(20, 1\): labels are one integer"),
            ("labels", np.ones(20), "labels.npy holds float64"),
            ("labels", np.ones(21, int), "labels.npy has 21 rows"),
            ("source", np.ones((9, 3)), "source.npy has 9 rows: a map needs 10 pairs"),
        ],
    )
    def test_a_bad_file_is_named_with_what_is_wrong(
        self, tmp_path: Path, column: str, values: np.ndarray, message: str
    ) -> None:
        rows = len(values) if column == "source" else 20
        good = {"source": np.ones((rows, 3)), "target": np.ones((rows, 3))}
        with pytest.raises(ValueError, match=message):
            read_pairs(**self.write(tmp_path, **(good | {column: values})))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300], ids=["NaN", "infinity", "infinity as float32"])
    def test_rows_that_are_not_finite_are_counted_and_the_first_is_named(
        self, tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inputs, "CHECKED_ROWS", 8)
        target = np.ones((40, 3))
        target[[17, 30], 1] = bad
        with pytest.raises(ValueError, match=r"target.npy has 2 rows with a NaN or an infinity, the first is row 17"):
            read_pairs(**self.write(tmp_path, source=np.ones((40, 3)), target=target))

    @pytest.mark.parametrize("column", ["source", "target"])
    def test_rows_whose_scores_would_overflow_are_counted_and_the_first_is_named(
        self, tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inputs, "CHECKED_ROWS", 8)
        long = np.ones((40, 3), np.float32)
        long[[17, 30], 1] = 1e19
        given = {"source": np.ones((40, 3)), "target": np.ones((40, 3)), "side": long} | {column: long}
        with pytest.raises(
            ValueError, match=rf"{column}.npy has 2 rows longer than 9e\+18, the first is row 17: .*divide"
        ):
            read_pairs(**self.write(tmp_path, **given))
        long[[17, 30], 1] = 9e18
        assert len(read_pairs(**self.write(tmp_path, **given))) == 40

    def test_a_file_with_a_damaged_head_is_named(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, source=np.ones((20, 3)), target=np.ones((20, 3)))
        paths["source"].write_bytes(b"\x93NUMPY\x01\x00\x14\x00{'desc\x84': '<f4', (    ")
        with pytest.raises(ValueError, match=r"source.npy is not an array that `np.save` wrote"):
            read_pairs(**paths)

    def test_pickles_are_never_loaded(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, source=np.array([{}] * 20, object), target=np.ones((20, 3)))
        with pytest.raises(ValueError, match=r"source.npy is not an array that `np.save` wrote"):
            read_pairs(**paths)

    def test_archives_and_files_that_are_cut_short_are_refused(self, tmp_path: Path) -> None:
        paths = self.write(tmp_path, source=np.ones((20, 3)), target=np.ones((20, 3)))
        paths["target"].write_bytes(paths["target"].read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"target.npy is not an array .* or is cut short"):
            read_pairs(**paths)
        np.savez(tmp_path / "target.npz", target=np.ones((20, 3)))
        with pytest.raises(ValueError, match="is an archive of arrays"):
            read_pairs(paths["source"], tmp_path / "target.npz")

    def test_files_are_mapped_and_rows_taken_as_float32(self, tmp_path: Path) -> None:
        values = np.arange(60, dtype=np.float16).reshape(20, 3)
        pairs = read_pairs(**self.write(tmp_path, source=values, target=values))
        assert isinstance(pairs.source, np.memmap)
        taken = pairs.take(np.array([3, 1]))
        assert taken.source.dtype == np.float32
        np.testing.assert_array_equal(taken.source, values[[3, 1]])
