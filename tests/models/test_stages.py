"""Finished stages of an experiment, kept as files."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from models.folding import folded
from models.methods import affine
from models.stages import Places, Stages, code_of


@pytest.mark.parametrize("kept", ["module", "arrays"])
def test_a_stage_that_cannot_be_written_fails_with_the_systems_own_error(kept: str, tmp_path: Path) -> None:
    def keep() -> None:
        if kept == "module":
            Stages(tmp_path).trained("stage", 0, lambda: nn.Linear(2, 2), lambda *_: None)
        else:
            Stages(tmp_path).arrays("stage", 0, lambda: {"values": np.zeros(3)})

    keep()
    (place,) = tmp_path.iterdir()
    place.unlink()
    place.with_name(f"{place.name}.unfinished").mkdir()  # in the way, as a full disk would be
    with pytest.raises(IsADirectoryError):
        keep()


def test_a_stage_whose_log_was_torn_by_a_power_cut_goes_on(tmp_path: Path) -> None:
    def killed(module: nn.Module, places: Places) -> None:
        places["checkpoint"].touch()
        places["log"].write_text("epoch,total,seconds\n0,1.5,2.0\n1,1.25,2.0\n2,1.1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).trained("stage", 0, lambda: nn.Linear(2, 2), killed)
    _, seconds = Stages(tmp_path).trained("stage", 0, lambda: nn.Linear(2, 2), lambda *_: None)
    assert 4 <= seconds < 5


def test_a_methods_code_is_also_that_of_the_functions_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_of(affine.Affine)
    monkeypatch.setattr(affine, "folded", folded, raising=False)
    assert code_of(affine.Affine) != before
