"""Installs requirements.lock and the project into the running interpreter.

The lock is installed without resolving, with uv where it is on PATH and with pip where it is not. Then the metadata of what is
installed is read. Where a requirement is not met, one line says so and the installer resolves with constraints.txt. That is so on
a platform that the lock does not cover, and with a torch that brings CUDA's libraries. Arguments go to the installer.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PROJECT = [f"--constraint={ROOT / 'constraints.txt'}", "--editable", f"{ROOT}[dev]"]
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
# pip's setting; uv's variable for it and what separates its values
SOURCES = {"index-url": ("UV_DEFAULT_INDEX", " "), "extra-index-url": ("UV_INDEX", " "), "find-links": ("UV_FIND_LINKS", ",")}


def read_lock() -> list[str]:
    """The lock's requirements, without comments."""
    return [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def list_unmet_requirements() -> list[str]:
    """The requirements of `.[dev]`, direct or not, that are not met here."""
    importlib.invalidate_caches()
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pending = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    visited: set[str] = set()
    unmet: set[str] = set()
    while pending:
        requirement = pending.pop()
        if str(requirement) in visited or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        visited.add(str(requirement))
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.add(requirement.name)
            continue
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            unmet.add(requirement.name)
        for dependency in map(Requirement, distribution.requires or ()):
            if dependency.marker is None or any(dependency.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                dependency.marker = None  # evaluated here, with the extra that asks for it
                pending.append(dependency)
    return sorted(unmet)


def read_pip_sources() -> dict[str, str]:
    """Where pip looks for packages, as uv's environment variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    sources = {}
    for name, (variable, separator) in SOURCES.items():
        settings = dict(re.findall(rf"^(global|install)\.{name}='(.*)'$", listed, flags=re.MULTILINE))
        setting = os.environ.get(f"PIP_{name.upper().replace('-', '_')}") or settings.get("install") or settings.get("global")
        if setting:
            sources[variable] = separator.join(setting.replace("\\n", " ").split())
    return sources


def run_together(commands: list[list[str]], environment: dict[str, str]) -> str:
    """Runs the commands at once; the first error's line, or nothing."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")) for _ in commands]
        processes = [
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            for command, output in zip(commands, outputs, strict=True)
        ]
        failures = [output for process, output in zip(processes, outputs, strict=True) if process.wait()]
        if not failures:
            return ""
        failures[0].seek(0)
        lines = [line.strip() for line in failures[0] if line.strip()]
    return next((line for line in lines if line.lower().startswith("error")), lines[-1] if lines else "no output")


def install_lock_with_pip(arguments: list[str]) -> str:
    """Installs the lock with pip; the reason where that fails."""
    if importlib.util.find_spec("pip") is None:  # an environment that uv created
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    command = [*PIP, "--no-deps", *arguments]
    lines = read_lock()
    pip = [line for line in lines if re.match(r"pip\b(?!-)", line)]
    others = [line for line in lines if line not in pip]
    # The pip that Python brings reads an index's pages at half the speed of the locked one.
    reason = run_together([[*command, line] for line in pip], dict(os.environ))
    # Two processes, since pip itself downloads and unpacks one package after the other.
    return reason or run_together([[*command, *half] for half in (others[::2], others[1::2]) if half], dict(os.environ))


def install(arguments: list[str]) -> int:
    """Installs lock and project; the exit status."""
    uv = shutil.which("uv")
    environment = dict(os.environ)
    installer = PIP
    reason = ""
    if uv:
        environment = {**read_pip_sources(), **environment}
        # As pip does, uv shall take the best version of all sources, not the first source that knows the name.
        installer = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--index-strategy", "unsafe-best-match"]
        reason = run_together([[*installer, "--no-deps", *arguments, "--requirement", str(LOCK)]], environment)
        if reason:
            print(f"==> uv cannot install requirements.lock ({reason}): going on with pip", flush=True)
            installer = PIP
    if installer is PIP:
        reason = install_lock_with_pip(arguments)
    unmet = list_unmet_requirements()
    if not reason and not unmet:
        return subprocess.run(
            [*installer, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], env=environment, check=False
        ).returncode
    names = ", ".join(unmet[:5]) + (f" and {len(unmet) - 5} more" if len(unmet) > 5 else "")
    print(f"==> requirements.lock is not enough here ({reason or 'missing: ' + names}): resolving with constraints.txt", flush=True)
    return subprocess.run([*installer, *arguments, *PROJECT], env=environment, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(install(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
