"""The installed content of each wheel, and its metadata."""

import importlib.metadata
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.packages import wheels
from tests.packages.interpreters import SUPPORTED
from tests.packages.wheels import ROOT

# By package: its folder, and the destination of each folder of the repository.
CONTENTS = {
    "interplay": {"interplay": "interplay", "analysis": "interplay/_analysis"},
    "interplay-server": {name: name for name in ("analysis", "app", "migrations", "workers")},
}
PROJECTS = {"interplay": ROOT / "pyproject.toml", "interplay-server": ROOT / "server" / "pyproject.toml"}
CI = ROOT / "examples" / "ci"


def wheel_of(package: str, built: tuple[Path, Path]) -> Path:
    return built[[*PROJECTS].index(package)]


def metadata_of(package: str, built: tuple[Path, Path]) -> Any:
    (found,) = importlib.metadata.distributions(path=[str(wheel_of(package, built))])
    return found.metadata


def project(package: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(PROJECTS[package].read_text())["project"]
    return found


def files_below(folder: Path) -> list[Path]:
    """Return a package's own files, without compiled ones and without targets of links."""
    return [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.is_relative_to(folder / "_analysis")
    ]


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_holds_its_packages_and_nothing_else(package: str, built: tuple[Path, Path]) -> None:
    """Each wheel holds every file of its folders as its own file, each folder typed; interplay installs one name."""
    expected = {
        f"{place}/{file.as_posix()}" for name, place in CONTENTS[package].items() for file in files_below(ROOT / name)
    }
    with zipfile.ZipFile(wheel_of(package, built)) as archive:
        information = f"{package.replace('-', '_')}-{project(package)['version']}.dist-info/"
        found = {entry.filename for entry in archive.infolist() if not entry.filename.startswith(information)}
        assert not [entry.filename for entry in archive.infolist() if entry.external_attr >> 28 == 0o12], "links"
        assert archive.read(f"{information}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert found == expected
    assert {f"{place}/py.typed" for place in CONTENTS[package].values()} <= found
    if package == "interplay":
        assert {name.split("/")[0] for name in found} == {"interplay"}


@pytest.mark.parametrize("package", PROJECTS)
def test_sdist_builds_the_same_wheel(package: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    """The sdist builds the same wheel to the byte, without the repository around it, which the links point to."""
    project_folder = PROJECTS[package].parent
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    done = wheels.run(command, folder=project_folder)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    wheels.pip_wheel(tmp_path, sdist)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.read_bytes() == wheel_of(package, built).read_bytes()


@pytest.mark.parametrize("package", PROJECTS)
def test_metadata(package: str, built: tuple[Path, Path]) -> None:
    """The metadata name license, author and link; pip accepts exactly the Pythons that the classifiers name."""
    metadata = metadata_of(package, built)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert metadata["Project-URL"].startswith("Paper, https://")
    assert metadata["Description"].startswith("# Interplay")
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    named = [text.rpartition(" ")[2] for text in classifiers if re.search(r"Python :: 3\.\d+$", text)]
    pythons = SpecifierSet(metadata["Requires-Python"])
    assert named == [f"3.{minor}" for minor in range(20) if pythons.contains(f"3.{minor}.1")]
    assert named == [*(SUPPORTED if package == "interplay" else SUPPORTED[:-1])]


def test_one_version() -> None:
    """Both packages have one version, the server requires exactly its client, and the changelog begins with it."""
    versions = {project(package)["version"] for package in PROJECTS}
    assert len(versions) == 1
    (version,) = versions
    assert f"interplay=={version}" in project("interplay-server")["dependencies"]
    (first,) = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[:1]
    assert first == version
    action, job = CI / "github" / "action.yml", CI / "gitlab" / ".gitlab-ci.yml"
    for file in (ROOT / "README.md", ROOT / "server" / "README.md", CI / "github" / "workflow.yml", job):
        assert set(re.findall(r"interplay(?:_server)?-(\d+\.\d+\.\d+)-py3", file.read_text())) == {version}, file
    assert f'default: "{version}"' in action.read_text()
    assert f"VERSION: {version}" in job.read_text()


@pytest.mark.parametrize("package", PROJECTS)
def test_ranges_hold_what_the_lock_pins(package: str) -> None:
    """Every requirement has a lower bound and no pin, and the tests run with a version within the range."""
    lines = [*(ROOT / "requirements.lock").read_text().split(), *(ROOT / "requirements-vision.txt").read_text().split()]
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    described = project(package)
    asked = [
        *described["dependencies"],
        *(text for group in described["optional-dependencies"].values() for text in group),
    ]
    for requirement in map(Requirement, asked):
        if requirement.name.startswith("interplay"):
            continue
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, requirement
        assert operators <= {">=", "<"}, requirement
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_client_takes_the_torch_that_is_there() -> None:
    """The base requires no torch, and the extra `train` sets no upper bound for it."""
    described = project("interplay")
    assert not [text for text in described["dependencies"] if text.startswith(("torch", "numpy"))]
    (torch,) = [Requirement(text) for text in described["optional-dependencies"]["train"] if text.startswith("torch")]
    assert {specifier.operator for specifier in torch.specifier} == {">="}
