"""What surrounds the code agrees with the code: folders, dependencies, make, CI, containers."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DESIGN_FOLDERS = ("service", "workers", "models", "gallery", "forwardfill", "migrations", "tests", "docs", "benchmarks")
MAKE_TARGETS = {"demo", "test", "serve", "check", "bench", "migrate", "clean", "help"}
#: which extra a place may import from, besides the plain dependencies; the images have none of these
EXTRA_OF_PLACE = {"models/data.py": "train", "forwardfill/demo": "train", "benchmarks": "bench", "tests": "dev"}


@cache
def tracked_files() -> tuple[Path, ...]:
    """What git holds or would add, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    names = listing.stdout.decode().split("\0")
    return tuple(Path(name) for name in names if name and (ROOT / name).is_file())


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


# --- folders and packages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", DESIGN_FOLDERS)
def test_each_folder_of_the_design_exists(folder: str) -> None:
    assert (ROOT / folder).is_dir()


def test_the_installed_packages_are_the_packages_on_disk() -> None:
    tops = [folder for folder in DESIGN_FOLDERS if folder not in {"tests", "docs", "benchmarks"}]
    on_disk = {
        ".".join(file.parent.parts) for file in tracked_files() if file.name == "__init__.py" and file.parts[0] in tops
    }
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == on_disk


def test_every_file_a_package_holds_besides_python_is_installed_with_it() -> None:
    package_data: dict[str, list[str]] = pyproject()["tool"]["setuptools"]["package-data"]
    packages = set(pyproject()["tool"]["setuptools"]["packages"])
    tops = {package.partition(".")[0] for package in packages}
    for file in tracked_files():
        if file.parts[0] in tops and file.suffix != ".py":
            owner = next(parent for parent in file.parents if ".".join(parent.parts) in packages)
            patterns = package_data.get(".".join(owner.parts), [])
            inside = file.relative_to(owner).as_posix()
            assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), f"{file} would not be installed"


def test_the_source_distribution_is_the_repository(tmp_path: Path) -> None:
    for file in tracked_files():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as packed:
        names = {Path(*Path(name).parts[1:]) for name in packed.getnames()}
    assert set(tracked_files()) <= names


def test_no_tracked_file_holds_a_path_of_one_machine() -> None:
    one_machine = re.compile(r"(?<![\w.~}-])/(?:work|root|farm|Users|home/\w+)/")
    for file in tracked_files():
        text = (ROOT / file).read_text(errors="replace")
        assert not one_machine.search(text), f"{file}: {one_machine.search(text)}"


def test_no_weights_and_no_data_are_tracked() -> None:
    kept_elsewhere = {".npy", ".npz", ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".h5", ".pkl", ".faiss"}
    for file in tracked_files():
        assert file.suffix not in kept_elsewhere, file
        assert ".sqlite" not in file.name, file
        assert (ROOT / file).stat().st_size < 1_000_000, f"{file} is too large for the repository"


def test_the_licence_is_the_declared_one() -> None:
    assert pyproject()["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- dependencies -----------------------------------------------------------------------------------------------------


def requirements(*extras: str) -> Iterator[Requirement]:
    """The plain dependencies and those of some extras, with extras that name other extras resolved."""
    project = pyproject()["project"]
    texts: list[str] = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    for text in texts:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from requirements(*sorted(requirement.extras))
        else:
            yield requirement


def constraints() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", [folder for folder in DESIGN_FOLDERS if folder != "docs"])
def test_every_import_is_a_declared_dependency(folder: str) -> None:
    providers = metadata.packages_distributions()
    ours = {*DESIGN_FOLDERS, *sys.stdlib_module_names}
    for file in tracked_files():
        if file.parts[0] != folder or file.suffix != ".py":
            continue
        extras = [extra for place, extra in EXTRA_OF_PLACE.items() if file.is_relative_to(place)]
        declared = {canonicalize_name(each.name) for each in requirements(*extras)}
        for module in set(imported_modules(file)) - ours:
            owners = {canonicalize_name(name) for name in providers.get(module, [])}
            assert owners & declared, f"{file} imports {module}, which no dependency that it may use provides"


@pytest.mark.parametrize("extra", [None, *sorted(pyproject()["project"]["optional-dependencies"])])
def test_the_constraints_pin_every_dependency_within_its_range(extra: str | None) -> None:
    pinned = constraints()
    for requirement in requirements(*([extra] if extra else [])):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} refuses the pinned {pinned[name]}"


# --- make and CI ------------------------------------------------------------------------------------------------------


def test_make_help_explains_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    explained = dict(re.findall(r"^ +make (\w+) +(\S.*)$", said, re.MULTILINE))
    assert set(explained) == set(phony[1].split())
    assert set(explained) >= MAKE_TARGETS


def test_the_makefile_installs_extras_that_exist() -> None:
    stamps = set(re.findall(r"\.installed-(\w+)", (ROOT / "Makefile").read_text()))
    assert stamps
    assert stamps <= set(pyproject()["project"]["optional-dependencies"])


def test_ci_runs_make_test_and_requires_real_servers() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert re.search(r"^make test\b", text, re.MULTILINE)
    assert "FORWARDFILL_REQUIRE_REAL=1" in text
    assert "FORWARDFILL_REQUIRE_REAL" in (ROOT / "tests" / "conftest.py").read_text()


# --- containers -------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One `FROM` of the Dockerfile and what follows it."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def dockerfile() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in text.replace("\\\n", " ").splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(name, base)
        elif keyword and stages:
            stage.instructions.append((keyword, rest.strip()))
    return stages


def lineage(target: str) -> list[tuple[str, str]]:
    """The instructions of a stage after those of the stages it builds upon."""
    stages = dockerfile()
    stage = stages[target]
    before = lineage(stage.base) if stage.base in stages else []
    return before + stage.instructions


def copies(instructions: list[tuple[str, str]]) -> Iterator[tuple[str | None, list[str]]]:
    """Each COPY: the stage it copies from, if any, and its sources."""
    for keyword, rest in instructions:
        if keyword == "COPY":
            words = rest.split()
            stage = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
            yield stage, [word for word in words if not word.startswith("--")][:-1]


def let_in_by_dockerignore() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "everything is kept out that is not named"
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def test_every_source_that_the_dockerfile_copies_exists_and_is_let_in() -> None:
    stages = dockerfile()
    copied = set()
    for stage in stages.values():
        for origin, sources in copies(stage.instructions):
            if origin is not None:
                assert origin in stages, f"COPY --from={origin}: no such stage"
                continue
            for source in sources:
                assert (ROOT / source).exists(), f"COPY {source}: no such file"
                copied.add(source)
    assert copied == let_in_by_dockerignore()


def test_the_images_are_built_from_every_package() -> None:
    tops = {package.partition(".")[0] for package in pyproject()["tool"]["setuptools"]["packages"]}
    copied = {source for _, sources in copies(dockerfile()["source"].instructions) for source in sources}
    assert copied >= tops


@pytest.mark.parametrize("target", ["api", "worker"])
def test_an_image_runs_as_nobody_special_and_stops_on_sigterm(target: str) -> None:
    instructions = lineage(target)
    users = [rest for keyword, rest in instructions if keyword == "USER"]
    assert users
    assert users[-1] not in {"root", "0"}
    assert ("STOPSIGNAL", "SIGTERM") in instructions
    assert any(keyword == "VOLUME" and rest == "/data" for keyword, rest in instructions)


def test_no_image_holds_a_secret() -> None:
    for stage in dockerfile().values():
        for keyword, rest in stage.instructions:
            if keyword in {"ENV", "ARG"}:
                assert not re.search(r"PASSWORD|SECRET|TOKEN|_KEY\b", rest), f"{stage.name}: {rest}"


def test_the_api_image_has_no_cuda_and_the_worker_image_has() -> None:
    def text(target: str) -> str:
        origins = [origin for origin, _ in copies(lineage(target)) if origin]
        return "\n".join(rest for origin in origins for _, rest in lineage(origin))

    assert "/whl/cpu" in text("api")
    assert "gpu" not in text("api")
    assert "/whl/cpu" not in text("worker")


def test_no_image_has_the_faiss_of_a_gpu_which_no_worker_uses() -> None:
    """Its package is compiled without AVX: it searches codes, by which indexes are measured, in eight times the time."""
    runs = [rest for stage in dockerfile().values() for keyword, rest in stage.instructions if keyword == "RUN"]
    assert any("constraints.txt" in rest for rest in runs)
    assert not any("gpu" in rest for rest in runs)


def is_one_shot(service: dict[str, Any]) -> bool:
    return service.get("restart") == "no"


@pytest.mark.parametrize("name", sorted(compose()["services"]))
def test_a_service_is_watched_or_ends_by_itself(name: str) -> None:
    service = compose()["services"][name]
    healthcheck = service.get("healthcheck", {})
    if is_one_shot(service):
        assert "ports" not in service
    elif healthcheck.get("disable"):
        # Only a worker, which answers nobody while it works (docs/adr/0006).
        assert service["command"][:2] == ["forwardfill", "worker"]
        assert service["restart"] == "unless-stopped"
    else:
        assert healthcheck["test"]
        assert service["restart"] == "unless-stopped"


def test_an_image_of_several_commands_has_no_health_check_which_each_would_inherit() -> None:
    assert not any(keyword == "HEALTHCHECK" for stage in dockerfile().values() for keyword, _ in stage.instructions)


class Health(BaseHTTPRequestHandler):
    """An API that is ready, and answers 503 on any other path."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health/ready" else 503)
        self.end_headers()


@pytest.mark.parametrize(("path", "status"), [("/health/ready", 0), ("/health/unwell", 1)])
def test_the_health_check_asks_the_api_itself_whatever_proxy_is_set(path: str, status: int) -> None:
    command = compose()["services"]["api"]["healthcheck"]["test"]
    assert command[:3] == ["CMD", "python", "-c"]
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = command[3].replace(":8000/health/ready", f":{server.server_port}{path}")
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        server.shutdown()
    assert asked.returncode == status, asked.stderr.decode()


@pytest.mark.parametrize("name", sorted(compose()["services"]))
def test_a_service_waits_only_for_what_can_happen(name: str) -> None:
    services = compose()["services"]
    for other, how in services[name].get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            assert services[other]["healthcheck"]["test"]
        else:
            assert how["condition"] == "service_completed_successfully"
            assert is_one_shot(services[other])


def test_compose_builds_targets_of_the_dockerfile() -> None:
    targets = {service["build"]["target"] for service in compose()["services"].values() if "build" in service}
    assert targets == {"api", "worker"}
    assert targets <= set(dockerfile())


def builders() -> dict[str, list[str]]:
    """The services that build each image of ours."""
    found: dict[str, list[str]] = {}
    for name, service in compose()["services"].items():
        if "build" in service:
            found.setdefault(service["image"], []).append(name)
    return found


def test_an_image_is_built_by_one_service_which_all_others_of_it_wait_for_and_pull_from_nowhere() -> None:
    services = compose()["services"]
    for image, names in builders().items():
        [builder] = names
        for name, service in services.items():
            if service["image"] == image and name != builder:
                assert service["pull_policy"] == "never", name
                assert builder in service["depends_on"], name


def test_no_port_is_published_beyond_loopback() -> None:
    for name, service in compose()["services"].items():
        for port in service.get("ports", []):
            assert str(port).startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_our_containers_run_with_a_read_only_root_and_no_privileges() -> None:
    for name, service in compose()["services"].items():
        if service["image"] in builders():
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert "no-new-privileges:true" in service["security_opt"], name


def test_compose_uses_every_volume_and_network_it_declares_and_no_other() -> None:
    services = compose()["services"].values()
    volumes = {volume.partition(":")[0] for service in services for volume in service.get("volumes", [])}
    networks = {network for service in services for network in service["networks"]}
    assert volumes == set(compose()["volumes"])
    assert networks == set(compose()["networks"])


def test_every_password_in_compose_comes_from_outside() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", text)) == {"POSTGRES_PASSWORD", "REDIS_PASSWORD"}
    for name, how in re.findall(r"(?<!\$)\$\{(\w+)(.)", text):
        assert how == ":", f"{name} must be refused with a message when it is not set"
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|AUTH|SECRET|_URL$", name):
                assert "${" in value, f"{name} is written down"


def test_the_worker_asks_for_a_gpu() -> None:
    devices = compose()["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in devices] == [["gpu"]]
