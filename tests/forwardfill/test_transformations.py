"""`forwardfill transformations`: a fit from files on a running service, watched to its verdict."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from forwardfill.cli import app
from forwardfill.pairs import from_files, stream
from tests.service.world import GALLERY, NEW, OLD, World, opened
from workers.settings import WorkerSettings
from workers.tasks import Worker

ROWS = 40


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A service with a gallery; ids and new embeddings of its items as files beside it."""
    with opened(tmp_path) as opened_world:
        opened_world.model("old", OLD)
        opened_world.model("new", NEW)
        opened_world.post("/galleries", {"name": GALLERY, "model": "old"})
        vectors = np.random.default_rng(0).normal(size=(ROWS, OLD))
        ids = [f"item-{at}" for at in range(ROWS)]
        opened_world.upsert(*({"id": i, "embedding": row.tolist()} for i, row in zip(ids, vectors, strict=True)))
        (tmp_path / "ids.txt").write_text("\n".join(ids))
        np.save(tmp_path / "new.npy", np.pad(vectors, ((0, 0), (0, NEW - OLD))))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("FORWARDFILL_URL", str(opened_world.client.base_url))
        monkeypatch.delenv("COLUMNS", raising=False)
        yield opened_world


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["transformations", *arguments])


def fit(*more: str) -> Any:
    files = ("--ids", "ids.txt", "--embeddings", "new.npy")
    return run("fit", GALLERY, "--name", "fitted", "--target", "new", "--method", "affine", *files, *more)


def test_a_fit_is_started_from_files_listed_shown_and_cancelled(world: World) -> None:
    started = fit("--no-watch")
    assert started.exit_code == 0, started.output
    fit_id = started.output.split()[-1]
    assert fit_id in run("fits").output
    assert '"state": "pending"' in run("show-fit", fit_id).output
    assert "is cancelled" in run("cancel-fit", fit_id).output
    refused = run("show-fit", "none")
    assert refused.exit_code == 1
    assert "fit_not_found" in refused.output


def test_a_fit_is_watched_to_its_verdict(world: World) -> None:
    worker = Worker(world.store, WorkerSettings())
    world.app.state.process.nudge = lambda: threading.Thread(target=worker.work).start()
    watched = fit()
    assert watched.exit_code == 0, watched.output
    assert "fitted (affine): " in watched.output
    assert "fitted" in run("list").output


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--embeddings", b"", "is not an .npy file of numbers"),
        ("--embeddings", b"PK\x03\x04", "is not an .npy file of numbers"),
        ("--embeddings", b"\x93NUMPY\x01\x00\x14\x00{'desc\x84': '<f4', (    ", "is not an .npy file of numbers"),
        ("--embeddings", None, "No such file or directory"),
        ("--ids", b"caf\xe9\n", "is not text in UTF-8"),
        ("--ids", None, "No such file or directory"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named_and_nothing_is_sent(
    world: World, tmp_path: Path, option: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "wrong").write_bytes(content)
    refused = fit(option, "wrong")
    assert refused.exit_code == 2, refused.output
    assert refused.stderr.startswith("wrong")
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert world.get("/transformations/fits")["fits"] == []


def test_files_that_do_not_belong_together_are_refused_before_anything_is_sent(world: World, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("item-0")
    refused = fit()
    assert refused.exit_code == 2
    assert f"{ROWS} embeddings, but 1 ids" in refused.output
    assert world.get("/transformations/fits")["fits"] == []
    with pytest.raises(ValueError, match="vectors have shape"):
        stream(["a"], np.zeros(3))


def test_a_byte_order_mark_is_no_part_of_the_first_pair(tmp_path: Path) -> None:
    np.save(tmp_path / "new.npy", np.eye(2))
    for name in ("ids", "labels"):
        (tmp_path / name).write_text(f"{name}-0\n{name}-1\n", encoding="utf-8-sig")
    content = from_files(tmp_path / "ids", tmp_path / "new.npy", tmp_path / "labels")
    found = pa.ipc.open_stream(content).read_all().to_pydict()
    assert (found["id"], found["label"]) == (["ids-0", "ids-1"], ["labels-0", "labels-1"])
