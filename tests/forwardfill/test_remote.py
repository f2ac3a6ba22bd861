"""`forwardfill upgrade` and `forwardfill galleries set-probes` against a real service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from forwardfill.answers import Contradicting, Cutover, MissingSide, Order
from forwardfill.cli import app
from forwardfill.client import Client, ForwardfillError
from forwardfill.probes import relevant
from service.api.upgrades import UpgradeBody
from tests.service.world import GALLERY, UNITS, World, opened


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A service with a gallery of four items, whose worker works whenever it is nudged; files of probes beside it."""
    with opened(tmp_path) as opened_world:
        opened_world.prepared().filled()
        opened_world.app.state.process.nudge = opened_world.work
        np.save(tmp_path / "old.npy", UNITS)
        np.save(tmp_path / "new.npy", np.pad(UNITS, ((0, 0), (1, 0))))
        (tmp_path / "relevant.jsonl").write_text("".join(f'["item-{at}"]\n' for at in range(len(UNITS))))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("FORWARDFILL_URL", str(opened_world.client.base_url))
        monkeypatch.delenv("COLUMNS", raising=False)
        yield opened_world


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def start(*options: str) -> Any:
    return run("upgrade", "start", GALLERY, "--transformation", "old-to-new", *options)


def set_probes(*more: str) -> Any:
    return run("galleries", "set-probes", GALLERY, "--vectors", "old=old.npy", "--vectors", "new=new.npy", *more)


def row(shown: Any, name: str) -> list[str]:
    """The cells of a table's row."""
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.stdout.splitlines() if "│" in line]
    return next(cells for cells in found if cells[0] == name)


@pytest.mark.parametrize("name", ["", "a/b", "\udcff"])
@pytest.mark.parametrize(
    "command", ["galleries show", "galleries compact", "upgrade show", "upgrade pause", "transformations show-fit"]
)
def test_a_name_that_nothing_can_have_is_refused_by_the_rule_of_names_and_nothing_is_asked(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDFILL_URL", "http://127.0.0.1:1")  # where nothing answers
    refused = run(*command.split(), name)
    assert refused.exit_code == 2, refused.exception
    assert (
        refused.stderr == f"{name!r} cannot be a name or an id: these are made of letters, digits, '.', '_' and '-'\n"
    )


def test_an_items_id_may_have_a_slash_and_its_gallerys_name_may_not(world: World) -> None:
    with Client(str(world.client.base_url)) as client:
        client.upsert(GALLERY, "old", ids=["shoes/left"], embeddings=UNITS[:1])
        assert client.item(GALLERY, "shoes/left")["id"] == "shoes/left"
        with pytest.raises(ValueError, match="'a/items' cannot be a name"):
            client.item("a/items", "left")


def test_a_dry_run_tells_each_check_and_what_the_upgrade_takes(world: World) -> None:
    assert set_probes("--relevant", "relevant.jsonl").exit_code == 0
    before = world.get(f"/galleries/{GALLERY}")
    shown = start("--dry-run", "--score-threshold", "0.5")
    assert shown.exit_code == 0, shown.output
    assert row(shown, "disk")[1] == "yes"
    assert "bytes; " in row(shown, "disk")[2]
    assert row(shown, "items") == ["items", "4"]
    assert row(shown, "estimated seconds")
    assert row(shown, "expected_after")[1] == "1.0"
    assert row(shown, "0.5")
    assert "the upgrade would start; nothing was changed" in shown.stdout
    assert world.get(f"/galleries/{GALLERY}") == before


def test_in_the_list_a_dry_run_is_told_from_an_upgrade(world: World) -> None:
    dry, real = world.upgraded(dry_run=True), world.upgraded()
    shown = run("upgrade", "list")
    assert [row(shown, each)[4:6] for each in (dry, real)] == [["completed", "True"], ["completed", "False"]]


def test_the_list_of_models_says_how_wide_their_side_information_is(world: World) -> None:
    body = {"name": "sided", "dimension": 8, "metric": "cosine", "side_information": {"dimension": 3}}
    world.post("/models", body)
    shown = run("models", "list")
    assert row(shown, "sided") == ["sided", "8", "cosine", "False", "3"]
    assert row(shown, "old")[-1] == ""


def test_a_dry_run_that_finds_a_reason_not_to_start_exits_with_1(world: World) -> None:
    refused = start("--dry-run", "--gate", "min_cmc1=0.5")
    assert refused.exit_code == 1, refused.output
    assert row(refused, "gate")[1] == "no"
    assert "there are no probes" in row(refused, "gate")[2]
    assert "the upgrade would not start: 1 of " in refused.stdout


def test_a_dry_run_of_an_empty_gallery_is_told_like_any_other(world: World) -> None:
    world.post("/galleries", {"name": "empty", "model": "old"})
    shown = run("upgrade", "start", "empty", "--target", "new", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert row(shown, "items") == ["items", "0"]
    assert "empty: the upgrade would start; nothing was changed" in shown.stdout


def test_what_an_upgrade_is_told_reaches_the_service(world: World) -> None:
    world.app.state.process.nudge = lambda: None
    options = {
        "--cutover": "manual",
        "--order": "most_searched",
        "--on-missing-side-information": "skip",
        "--on-contradicting-items": "ignore",
    }
    limits = ("--gate", "min_cmc1=0.9", "--gate", "max_negative_flips=3", "--duty-cycle", "0.5")
    started = start("--no-watch", *limits, *(word for pair in options.items() for word in pair))
    assert started.exit_code == 0, started.output
    upgrade = world.upgrade(started.stdout.split()[-1])
    assert {name: upgrade[name[2:].replace("-", "_")] for name in options} == options
    assert upgrade["gate"] == {"min_cmc1": 0.9, "max_negative_flips": 3}
    assert upgrade["throttle"] == {"duty_cycle": 0.5}


@pytest.mark.parametrize(
    "options", [[], ["--items-per-second", "nan"], ["--duty-cycle", "inf"], ["--max-search-p99-ms", "-inf"]]
)
def test_a_throttle_that_says_nothing_is_refused_and_takes_no_limit_away(world: World, options: list[str]) -> None:
    world.app.state.process.nudge = lambda: None
    upgrade = start("--no-watch", "--items-per-second", "10").stdout.split()[-1]
    refused = run("upgrade", "throttle", upgrade, *options)
    assert refused.exit_code == 2
    assert world.upgrade(upgrade)["throttle"] == {"items_per_second": 10}
    assert start("--no-watch", *(options or ["--duty-cycle", "nan"])).exit_code == 2


@pytest.mark.parametrize("limit", ["min_cmc1", "min_cmc1=", "min_cmc1=nan", "min_cmc=0.9"])
def test_a_limit_that_is_none_is_refused_before_anything_starts(world: World, limit: str) -> None:
    refused = start("--gate", limit)
    assert refused.exit_code == 2
    assert "NAME=NUMBER" in refused.stderr
    assert world.get("/admin/upgrades")["upgrades"] == []


def test_the_choices_are_those_of_the_service() -> None:
    body = UpgradeBody.model_json_schema()["properties"]
    taken = {
        "cutover": Cutover,
        "order": Order,
        "on_missing_side_information": MissingSide,
        "on_contradicting_items": Contradicting,
    }
    for name, choices in taken.items():
        assert list(get_args(choices)) == body[name]["enum"]
        refused = start(f"--{name.replace('_', '-')}", "nope")
        assert refused.exit_code == 2
        assert all(f"'{choice}'" in refused.stderr for choice in get_args(choices))


def test_an_upgrade_below_its_gate_serves_once_that_is_accepted(world: World) -> None:
    set_probes("--relevant", "relevant.jsonl")
    upgrade = world.start(cutover="manual", gate={"min_cmc1": 0.9})
    assert world.upgrade(upgrade)["state"] == "awaiting_cutover"
    (world.folder / "relevant.jsonl").write_text('["nothing"]\n' * len(UNITS))
    set_probes("--relevant", "relevant.jsonl")
    refused = run("upgrade", "cutover", upgrade)
    assert refused.exit_code == 1, refused.output
    assert "gate_closed (409)" in refused.stderr
    done = run("upgrade", "cutover", upgrade, "--accept-below-gate")
    assert done.exit_code == 0, done.output
    assert "completed" in done.stdout


def test_probes_that_do_not_belong_together_are_refused_by_file(world: World, tmp_path: Path) -> None:
    np.save(tmp_path / "new.npy", np.zeros((3, 5)))
    np.save(tmp_path / "flat.npy", UNITS[0])
    np.save(tmp_path / "complex.npy", UNITS * 1j)
    (tmp_path / "empty.npy").write_bytes(b"")
    for options, told in {
        (): "old.npy has 4, new.npy has 3",
        ("--vectors", "other=flat.npy"): "flat.npy: vectors have shape (n, d), not (4,)",
        ("--vectors", "other=complex.npy"): "complex.npy: vectors are real numbers, not complex64",
        ("--vectors", "other=empty.npy"): "empty.npy is not an .npy file",
        ("--vectors", "other=nowhere.npy"): "nowhere.npy: No such file",
        ("--vectors", "old=other.npy"): "each MODEL once",
    }.items():
        refused = set_probes(*options)
        assert refused.exit_code == 2, refused.output
        assert told in refused.stderr


def test_a_query_to_explain_that_is_not_real_is_refused(world: World, tmp_path: Path) -> None:
    np.save(tmp_path / "query.npy", UNITS[0] * 1j)
    refused = run("galleries", "explain", GALLERY, "--model", "old", "--vector", "query.npy")
    assert refused.exit_code == 2, refused.output
    assert "real numbers, not complex64" in " ".join(refused.stderr.replace("│", "").split())


def test_a_file_of_many_vectors_is_no_query_to_explain(world: World, tmp_path: Path) -> None:
    np.save(tmp_path / "queries.npy", np.ones((3, 4), np.float32))
    refused = run("galleries", "explain", GALLERY, "--model", "old", "--vector", "queries.npy")
    assert refused.exit_code == 2
    assert "queries.npy has 3 vectors" in refused.output


def test_an_empty_file_of_a_query_to_explain_is_refused_by_its_name(world: World, tmp_path: Path) -> None:
    (tmp_path / "query.npy").write_bytes(b"")
    refused = run("galleries", "explain", GALLERY, "--model", "old", "--vector", "query.npy")
    assert refused.exit_code == 2, refused.output
    assert "query.npy is not an .npy file" in refused.stderr


@pytest.mark.parametrize("options", [(), ("--target", "new", "--transformation", "old-to-new")])
def test_an_upgrade_by_nothing_or_by_two_things_is_refused_by_the_names_of_the_options(
    world: World, options: tuple[str, ...]
) -> None:
    refused = run("upgrade", "start", GALLERY, *options)
    assert refused.exit_code == 2, refused.output
    assert "name either --transformation or --target" in refused.stderr


def test_a_search_is_explained_where_fewer_hits_are_allowed_than_are_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "query.npy", UNITS[0])
    with opened(tmp_path, gallery={"max_k": 3}) as world:
        world.prepared().filled()
        monkeypatch.setenv("FORWARDFILL_URL", str(world.client.base_url))
        command = ("galleries", "explain", GALLERY, "--model", "old", "--vector", str(tmp_path / "query.npy"))
        usual, fewer = run(*command), run(*command, "--k", "2")
    assert usual.exit_code == 0, usual.output
    assert row(usual, "all") == ["all", "3", "3", "1.0"]
    assert row(fewer, "all") == ["all", "2", "2", "1.0"]


def test_a_plan_names_the_kind_of_an_index_and_leaves_its_parameters_to_the_service(
    world: World, tmp_path: Path
) -> None:
    np.save(tmp_path / "query.npy", UNITS[0])
    told = run("galleries", "explain", GALLERY, "--model", "old", "--vector", "query.npy")
    assert told.exit_code == 0, told.output
    assert " flat " in told.output
    assert "'kind'" not in told.output


@pytest.mark.parametrize(
    ("lines", "told"), [(["[]"] * 3, "has 3 lines for 4 queries"), (["[]", "[1]", "[]", "[]"], "line 2: should be")]
)
def test_relevant_ids_that_are_none_are_refused_by_line(world: World, lines: list[str], told: str) -> None:
    (world.folder / "relevant.jsonl").write_text("\n".join(lines))
    refused = set_probes("--relevant", "relevant.jsonl")
    assert refused.exit_code == 2
    assert told in refused.stderr


def test_relevant_ids_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "relevant.jsonl").write_text('["a"]\n[]\n', encoding="utf-8-sig")
    assert relevant(tmp_path / "relevant.jsonl", 2) == [["a"], []]


def test_waiting_for_an_upgrade_that_rests_has_a_limit(world: World) -> None:
    upgrade = world.upgraded(cutover="manual")
    with (
        Client(str(world.client.base_url)) as client,
        pytest.raises(TimeoutError, match=r"is awaiting_cutover after 0\.2 s"),
    ):
        client.wait(upgrade, timeout=0.2)


def test_a_watched_upgrade_is_followed_from_the_last_event_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.app.state.process.nudge = lambda: None
    upgrade = world.start()
    followed, events = list[str | None](), Client.events

    def recorded(client: Client, upgrade_id: str, *, after: str | None = None) -> Any:
        followed.append(after)
        if len(followed) == 2:
            world.work()
        return events(client, upgrade_id, after=after)

    monkeypatch.setattr(Client, "events", recorded)
    watched = run("upgrade", "watch", upgrade)
    assert watched.exit_code == 0, watched.output
    assert "photos: completed, 100%" in watched.stdout
    first, *others = followed
    assert first is None
    assert all(others)
    assert len(set(others)) == len(others) >= 1, "no stream tells again what another told"


@pytest.mark.parametrize("away", [httpx.ConnectError("refused"), ForwardfillError(503, "unavailable", "it stops")])
def test_an_upgrade_is_watched_on_when_the_service_has_started_again(
    world: World, monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    world.app.state.process.nudge = lambda: None
    upgrade, looks, streams = world.start(), list[str](), list[str]()
    look, events = Client.upgrade, Client.events

    def looked(client: Client, upgrade_id: str) -> Any:
        looks.append(upgrade_id)
        if len(looks) == 2:
            raise away
        return look(client, upgrade_id)

    def followed(client: Client, upgrade_id: str, *, after: str | None = None) -> Any:
        streams.append(upgrade_id)
        if len(streams) == 1:
            world.work()
            raise away
        return events(client, upgrade_id, after=after)

    for name in ("remote", "patience"):
        monkeypatch.setattr(f"forwardfill.{name}.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(Client, "upgrade", looked)
    monkeypatch.setattr(Client, "events", followed)
    watched = run("upgrade", "watch", upgrade)
    assert watched.exit_code == 0, watched.output
    assert "photos: completed, 100%" in watched.stdout
