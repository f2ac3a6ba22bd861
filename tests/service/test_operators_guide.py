"""What docs/operating.md tells an operator to ask for, and to look at, is what the service has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from gallery import folder, verify
from gallery.catalog import schema
from gallery.catalog.tables import GalleryRow, ModelRow
from gallery.catalog.transaction import Catalog
from gallery.files import Files
from tests.service.world import GALLERY, World

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/operating.md").read_text()
VERBS = "GET|PUT|POST|PATCH|DELETE"


def test_every_metric_of_the_service_is_in_the_guide_with_its_labels(world: World) -> None:
    world.old_search(0)
    world.upgraded()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(world.client.get("/metrics").text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    told = re.findall(r"`(forwardfill_\w+)(?:\{([\w, ]*)\})?`", re.sub(r"(?s)```.*?```", "", GUIDE))
    assert {name for name, _ in told} == found.keys()
    for name, labels in told:
        if labels:
            assert set(labels.split(", ")) == found[name], name


def test_every_call_that_the_guide_and_the_readme_name_is_one_of_the_service(world: World) -> None:
    paths = world.get("/openapi.json")["paths"]
    named = set(re.findall(rf"`({VERBS}) (/[\w/{{}}.-]+)", GUIDE + (ROOT / "README.md").read_text()))
    assert named
    for verb, path in named:
        assert verb.lower() in paths.get(path, {}), f"{verb} {path}"


def test_every_reason_of_the_guide_is_one_that_the_code_gives() -> None:
    code = "".join(file.read_text() for file in sorted((ROOT / "gallery" / "upgrade").glob("*.py")))
    table = GUIDE.partition("| condition: type, reason |")[2].partition("\n\n")[0]
    words = {word for row in table.splitlines() for word in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert words
    for word in words:
        assert f'"{word}"' in code, word


def test_the_events_of_the_guide_are_those_that_are_logged_and_every_error_is_among_them() -> None:
    code = "".join(
        file.read_text()
        for folder in ("gallery", "service", "workers", "forwardfill")
        for file in sorted((ROOT / folder).rglob("*.py"))
    )
    logged = set(re.findall(r'log\.(error|exception|warning)\(\s*"(\w+)"', code))
    told = set(re.findall(r"`(\w+_\w+)`", GUIDE.partition("The logs are JSON lines.")[2].partition("A request's")[0]))
    assert told <= {name for _, name in logged}
    assert {name for level, name in logged if level != "warning"} <= told


def test_a_catalog_that_is_moved_to_postgresql_as_the_guide_says_goes_on_there(
    tmp_path: Path, four_items: Path, postgres_url: str
) -> None:
    (program,) = re.findall(r"(?s)python - <<'END'\n(.*?)\nEND\n", GUIDE)
    data = tmp_path / "data"
    shutil.copytree(four_items, data)
    catalog = Catalog(postgres_url)
    schema.migrate(catalog)
    environment = {**os.environ, "FORWARDFILL_DATA": str(data), "FORWARDFILL_DATABASE_URL": postgres_url}

    def move() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    moved = move()
    assert moved.returncode == 0, moved.stderr
    folder.claim(catalog, Files(data))
    assert verify.gallery(catalog, Files(data), GALLERY).problems == []
    with catalog.transaction() as tx:  # ids go on behind those that there are
        model = tx.session.scalars(select(ModelRow)).first()
        assert model is not None
        tx.session.add(GalleryRow(name="another", model_id=model.id, index={"kind": "auto"}, storage_dtype="float32"))
    assert move().returncode != 0  # nothing is written over
    with catalog.reading() as session:
        assert session.scalars(select(GalleryRow.name).order_by(GalleryRow.id)).all() == [GALLERY, "another"]
    catalog.close()


def test_a_backup_that_is_taken_and_restored_as_the_guide_says_has_everything(tmp_path: Path, four_items: Path) -> None:
    save, restore = (
        block
        for block in re.findall(r"(?s)```bash\n(.*?)```", GUIDE.partition("## Backup and restore")[2])
        if "data.tar" in block
    )
    data = tmp_path / "forwardfill-data"
    shutil.copytree(four_items, data)
    there = {each.relative_to(data) for each in data.rglob("*") if each.is_file()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORWARDFILL_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def run(commands: str) -> str:
        ran = subprocess.run(
            ["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    run(save)
    shutil.rmtree(data)
    assert GALLERY in run(restore)
    restored = {each.relative_to(data) for each in data.rglob("*") if each.is_file()}
    assert all(each.name.startswith("catalog.sqlite3-") for each in there - restored)
