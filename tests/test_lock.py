"""The lock agrees with pyproject.toml and constraints.txt, and set-up with it holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
PYTHONS = ["3.11", "3.12", "3.13"]


def read_requirements(file: Path) -> list[Requirement]:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def list_direct_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


def test_the_lock_takes_its_versions_from_the_constraints() -> None:
    constraints = {canonicalize_name(pin.name): str(pin.specifier) for pin in read_requirements(ROOT / "constraints.txt")}
    lock = read_requirements(ROOT / "requirements.lock")
    assert not [str(pin) for pin in lock if constraints.get(canonicalize_name(pin.name)) != str(pin.specifier)]
    assert len(lock) == len({pin.name for pin in lock})
    assert not [pin.name for pin in lock if pin.name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
def test_the_lock_meets_the_projects_requirements(system: str, machine: str, python: str) -> None:
    environment = {
        "sys_platform": system,
        "platform_machine": machine,
        "platform_system": system.capitalize(),
        "python_version": python,
        "python_full_version": f"{python}.1",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "extra": "",
    }
    pins = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in read_requirements(ROOT / "requirements.lock")
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    for requirement in list_direct_requirements():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_lock_names_everything_that_is_required_here() -> None:
    """From the metadata of what is installed; torch's CUDA libraries excepted, which the lock leaves out."""
    pins = {canonicalize_name(pin.name) for pin in read_requirements(ROOT / "requirements.lock")}
    pending, visited = list_direct_requirements(), set()
    while pending:
        requirement = pending.pop()
        if str(requirement) in visited or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        visited.add(str(requirement))
        name = canonicalize_name(requirement.name)
        if name.startswith(("nvidia-", "cuda-")):
            continue
        assert name in pins, requirement
        for dependency in map(Requirement, metadata.distribution(name).requires or ()):
            if dependency.marker is None or any(dependency.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                dependency.marker = None
                pending.append(dependency)


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    information = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{information}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{information}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with two packages on disk, and an environment that sees this one's build tools."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    packages = next((tmp_path / ".venv/lib").glob("python*")) / "site-packages"
    (packages / "build_tools.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "zz_upper", "1.0", "zz-lower>=1")
    write_wheel(tmp_path / "wheels", "zz_lower", "1.0")
    write_wheel(tmp_path / "wheels", "zz_lower", "2.0")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/install_environment.py", tmp_path / "tools")
    (tmp_path / "zz_project").mkdir()
    (tmp_path / "zz_project/__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "zz-project"\nversion = "1"\ndependencies = ["zz-upper"]\n[project.optional-dependencies]\ndev = []\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["zz_project"]\n'
    )
    (tmp_path / "constraints.txt").write_text("zz-upper==1.0\nzz-lower==1.0\n")
    return tmp_path


def install(project: Path, *lines: str) -> tuple[str, dict[str, str]]:
    """Set-up with this lock: its output, and the versions that are installed then."""
    (project / "requirements.lock").write_text("".join(f"{line}\n" for line in lines))
    command = [str(project / ".venv/bin/python"), "tools/install_environment.py"]
    # The build tools of the environment above stand in for a download.
    arguments = ["--no-index", f"--find-links={project / 'wheels'}", "--no-build-isolation"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(project), "PIP_CONFIG_FILE": "/dev/null"}
    done = subprocess.run([*command, *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    versions = {}
    for folder in (project / ".venv/lib").glob("python*/site-packages/zz_*.dist-info"):
        name, version = re.fullmatch(r"(\w+)-(.+)\.dist-info", folder.name).groups()  # type: ignore[union-attr]
        versions[name] = version
    return done.stdout, versions


EVERYTHING = {"zz_upper": "1.0", "zz_lower": "1.0", "zz_project": "1"}


def test_a_complete_lock_is_installed_as_it_is_and_again_after_a_change(project: Path) -> None:
    output, versions = install(project, "zz-upper==1.0", "zz-lower==2.0")  # not the constraints' version: nothing was resolved
    assert (output, versions) == ("", {**EVERYTHING, "zz_lower": "2.0"})
    assert install(project, "zz-upper==1.0", "zz-lower==2.0") == (output, versions)
    assert install(project, "zz-upper==1.0", "zz-lower==1.0") == ("", EVERYTHING)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["zz-upper==1.0"], "missing: zz-lower"),
        (["zz-upper==1.0 ; sys_platform == 'other'", "zz-lower==1.0 ; sys_platform == 'other'"], "missing: zz-upper"),
        (["zz-upper==1.0", "zz-lower==9.0"], "zz-lower==9.0"),
    ],
)
def test_a_lock_that_does_not_fit_is_resolved_with_the_constraints(project: Path, lines: list[str], reason: str) -> None:
    output, versions = install(project, *lines)
    assert re.fullmatch(r"==> requirements\.lock is not enough here \(.*\): resolving with constraints\.txt\n", output)
    assert reason in output
    assert versions == EVERYTHING
