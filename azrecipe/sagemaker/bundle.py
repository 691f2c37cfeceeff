"""The files that a training job needs from this machine.

They are the package, the recipe with the paths of the container, and local data where the settings allow their upload. Nothing else is
uploaded: no .git, no caches, no run directories, no credentials. Data are uploaded as files of their own, not with the code.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import azrecipe
from azrecipe.errors import Problem, RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.extras import list_required_packages
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key
from azrecipe.runs.run_dir import locate_named_run, locate_run
from azrecipe.sagemaker.settings import SECRET_PATTERN, SageMakerSettings, find_secrets
from azrecipe.utils import shipped_files
from azrecipe.utils.atomic_files import hash_file
from azrecipe.utils.paths import DATA_SUFFIXES, LOCAL_PATH_CHECKS, is_s3

ENTRY_POINT = "sagemaker_entry.py"
JOB_FILE = "job.json"
INPUT_DATA_DIR = "/opt/ml/input/data"
CODE_SUFFIXES = (".py", ".json", ".yaml", ".html", ".css", ".js", ".svg")
MAX_CHANNELS = 15  # SageMaker allows 20; code, drivers and earlier runs need some
ENTRY_POINT_TEXT = '''"""Entry point of a training job. Arguments: none, or a recipe and what `python -m azrecipe` takes."""

import sys

from azrecipe.sagemaker.container import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


@dataclass(frozen=True)
class Upload:
    """A local file and its key below the bucket's prefix.

    The key holds a hash of the content: an object that exists already is the same.
    """

    file: Path
    key: str

    @property
    def size(self) -> int:
        return self.file.stat().st_size


class InputRun(NamedTuple):
    """A run of another recipe that comes in through a channel."""

    container_path: str  # <project>/<name> below the container's runs directory
    run_path: str  # below runs/ in the bucket; that of a cell has more parts


@dataclass
class Bundle:
    """The files of one job.

    Attributes:
        run_path: The run's path below a runs directory: <project>/<name>, or that of its cell.
        recipe: The recipe with the paths of the container.
        source_files: File contents by path below the source folder.
        data_uploads: Local data to upload.
        channels: Inputs by channel name: an S3 URI, or a key below the prefix.
        input_runs: Runs of other recipes that this one reads, by channel name.
    """

    run_path: str
    recipe: Recipe
    source_files: dict[str, bytes] = field(default_factory=dict)
    data_uploads: list[Upload] = field(default_factory=list)
    channels: dict[str, str] = field(default_factory=dict)
    input_runs: dict[str, InputRun] = field(default_factory=dict)

    @cached_property
    def archive(self) -> bytes:
        """The source files as one reproducible tar.gz."""
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in sorted(self.source_files.items()):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))
        return buffer.getvalue()

    @property
    def archive_key(self) -> str:
        """The archive's key below the prefix."""
        return f"code/{hashlib.sha256(self.archive).hexdigest()[:32]}/sourcedir.tar.gz"

    def write_source_files(self, folder: Path) -> None:
        """Write the source files into a folder."""
        _write_files(self.source_files, folder)


def build_bundle(recipe: Recipe, settings: SageMakerSettings) -> Bundle:
    """Collect the files of a recipe's job.

    Raises RecipeError for local data without upload_data, for secrets, and for a recipe that the container could not read.
    """
    problems = [
        Problem(
            recipe.locate(*keys),
            f"{format_key_path(keys)} looks like a secret, which everyone who may read the bucket would see: remove it",
        )
        for keys in find_secrets(recipe.data)
    ]
    bundle = Bundle(_run_path(recipe), recipe)
    rewriter = _PathRewriter(recipe, settings, bundle)
    # The keys of the recipe without defaults: some defaults are allowed with some keys only.
    explicit = {key: value for key, value in recipe.tree.to_plain().items() if key not in ("extends", "fragment", "variables")}
    data = rewriter.rewrite(explicit, schema.load_schema(recipe.stage), ())
    trackers = recipe.data.get("training", {}).get("report_to")
    if trackers is not None and "tensorboard" not in trackers:
        data["training"] = {**data.get("training", {}), "report_to": [*trackers, "tensorboard"]}  # SageMaker shows it
    bundle.recipe = replace(recipe, data=data)
    problems += rewriter.problems
    if problems:
        raise RecipeError(problems)
    bundle.source_files.update(_read_package())
    bundle.source_files[f"job/{recipe.name}.yaml"] = to_yaml(data).encode()
    for name in rewriter.upstream:  # a recipe names other recipes by file; only their runs are read, so an empty recipe is enough
        bundle.source_files.setdefault(
            f"job/{name}.yaml", f"# Stands for a recipe whose run comes in.\nstage: tokenizer\nproject: {recipe.project}\n".encode()
        )
    bundle.source_files[ENTRY_POINT] = ENTRY_POINT_TEXT.encode()
    shipped = shipped_files.locate_root() / "sagemaker"
    extra_requirements = "".join(f"{line}\n" for line in list_required_packages(recipe))
    bundle.source_files["requirements.txt"] = (shipped / "requirements.txt").read_bytes() + extra_requirements.encode()
    bundle.source_files["constraints.txt"] = (shipped / "constraints.txt").read_bytes()
    job = {
        "recipe": f"job/{recipe.name}.yaml",
        "run": f"{recipe.project}/{recipe.name}",
        "runs": {channel: run.container_path for channel, run in bundle.input_runs.items()},
        "accelerate_config": settings.accelerate_config,
        "hub_token_secret": settings.hub_token_secret,
    }
    bundle.source_files[JOB_FILE] = (json.dumps(job, indent=2) + "\n").encode()
    _check_readable(bundle, recipe)
    return bundle


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _check_readable(bundle: Bundle, recipe: Recipe) -> None:
    """Load the recipe of a bundle, as the container will. Raises RecipeError."""
    with tempfile.TemporaryDirectory() as folder:
        _write_files({name: data for name, data in bundle.source_files.items() if name.startswith("job/")}, Path(folder))
        load_recipe(Path(folder) / "job" / f"{recipe.name}.yaml")


def _run_path(recipe: Recipe) -> str:
    """Return the path of a recipe's run below a runs directory."""
    return locate_run(recipe, Path()).path.as_posix()


@cache
def _read_package() -> tuple[tuple[str, bytes], ...]:
    """Read the installed package and its shipped files, once.

    Returns:
        Paths in the source folder, with contents.
    """
    return tuple(_iterate_package_files())


def _iterate_package_files() -> Iterator[tuple[str, bytes]]:
    package = Path(azrecipe.__file__).resolve().parent
    for file in sorted(package.rglob("*")):
        relative = file.relative_to(package)
        if _is_source_file(relative) and relative.parts[0] != "_shipped" and file.is_file():
            yield f"azrecipe/{relative.as_posix()}", file.read_bytes()
    for top in shipped_files.SHIPPED_FOLDERS:
        for file in sorted((shipped_files.locate_root() / top).rglob("*")):
            relative = file.relative_to(shipped_files.locate_root())
            if (_is_source_file(relative) or relative.suffix in (".jinja", ".txt")) and "data" not in relative.parts and file.is_file():
                yield f"azrecipe/_shipped/{relative.as_posix()}", file.read_bytes()


def _is_source_file(relative: Path) -> bool:
    return relative.suffix in CODE_SUFFIXES and not any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


class _PathRewriter:
    """Rewrites a recipe's paths for the container, and collects their files."""

    def __init__(self, recipe: Recipe, settings: SageMakerSettings, bundle: Bundle) -> None:
        self.recipe, self.settings, self.bundle = recipe, settings, bundle
        self.problems: list[Problem] = []
        self.upstream: dict[str, None] = {}
        self.container_paths: dict[str, str] = {}
        self.rewriters: dict[str, Callable[[str, tuple[Key, ...]], str]] = {
            "recipe": self._rewrite_recipe, "data": self._rewrite_data, "model": self._rewrite_data, "template": self._rewrite_file, "task": self._rewrite_file,
        }  # fmt: skip

    def rewrite(self, value: Any, definition: schema.Schema, keys: tuple[Key, ...]) -> Any:
        """Copy recipe data, with paths as they are in the container.

        Args:
            value: A part of the recipe.
            definition: The schema of that part.
            keys: The keys that lead to it.
        """
        definition = schema.resolve_ref(definition)
        if isinstance(value, Mapping):
            return {key: self.rewrite(inner, schema.subschema(definition, key) or {}, (*keys, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.rewrite(inner, schema.subschema(definition, i) or {}, (*keys, i)) for i, inner in enumerate(value)]
        kind = definition.get("x-path")
        if kind is None or not isinstance(value, str) or not (LOCAL_PATH_CHECKS[kind](value) or is_s3(value)):
            return value
        return self.rewriters[kind](value, keys)

    def _rewrite_recipe(self, value: str, _keys: tuple[Key, ...]) -> str:
        name = Path(value).stem
        if name not in self.upstream:
            self.upstream[name] = None
            run_path = locate_named_run(self.recipe, Path(), name).path.as_posix()
            self.bundle.input_runs[f"run{len(self.bundle.input_runs)}"] = InputRun(f"{self.recipe.project}/{name}", run_path)
        return f"./{name}.yaml"

    def _rewrite_file(self, value: str, keys: tuple[Key, ...]) -> str:
        """Add a small file of the recipe: a chat template, a task."""
        name = f"files/{len(self.bundle.source_files)}/{Path(value).name}"
        try:
            data = Path(value).read_bytes()
        except OSError as error:
            self.problems.append(Problem(self.recipe.locate(*keys), f"{value}: cannot be read: {error.strerror}"))
            return value
        if SECRET_PATTERN.search(data.decode("utf-8", "replace")):
            self.problems.append(
                Problem(
                    self.recipe.locate(*keys),
                    f"{value} holds what looks like a secret, which everyone who may read the bucket would see: remove it",
                )
            )
        self.bundle.source_files[f"job/{name}"] = data
        return f"./{name}"

    def _rewrite_data(self, value: str, keys: tuple[Key, ...]) -> str:
        """Add data or a model: a channel from S3, or an upload."""
        if value in self.container_paths:
            return self.container_paths[value]
        if is_s3(value):
            if any(c in value for c in "*?[") or len(self.bundle.channels) >= MAX_CHANNELS:
                return value  # the run reads it from S3
            is_file = value.endswith(DATA_SUFFIXES)  # a folder gets a slash: without it the prefix would match other folders too
            return self._add_channel(value, value if is_file else f"{value.rstrip('/')}/", PurePosixPath(value).name if is_file else "")
        files = _list_local_files(value)
        if len(self.bundle.channels) >= MAX_CHANNELS:
            message = f"{value}: a job can read data from at most {MAX_CHANNELS} places: put several into one folder, or use a glob on S3"
            self.problems.append(Problem(self.recipe.locate(*keys), message))
        if not files:
            self.problems.append(Problem(self.recipe.locate(*keys), f"{value}: there is nothing"))
            return value
        if not self.settings.upload_data:
            size = sum(file.stat().st_size for file in files.values())
            problem = f"{value} is on this machine ({len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:,.1f} MB)"
            remedy = "use a path on S3 (s3://bucket/…), or set upload_data: true in the settings (--upload-data)"
            self.problems.append(Problem(self.recipe.locate(*keys), f"{problem}, which the job cannot read: {remedy}"))
            return value
        listing = "\n".join(f"{name} {hash_file(file)}" for name, file in sorted(files.items()))
        folder = f"data/{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
        self.bundle.data_uploads += [Upload(file, f"{folder}/{name}") for name, file in sorted(files.items())]
        is_file = len(files) == 1 and Path(value).is_file()
        return self._add_channel(value, f"{folder}/", next(iter(files)) if is_file else "")

    def _add_channel(self, value: str, source: str, file_name: str) -> str:
        name = f"data{sum(channel.startswith('data') for channel in self.bundle.channels)}"
        self.bundle.channels[name] = source
        self.container_paths[value] = f"{INPUT_DATA_DIR}/{name}/{file_name}".rstrip("/")
        return self.container_paths[value]


def _list_local_files(value: str) -> dict[str, Path]:
    """List the files of a path, folder or glob.

    Returns:
        Files by their path below the folder that all have in common.
    """
    path = Path(value).expanduser()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        base, files = path, [file for file in path.rglob("*") if file.is_file()]
    else:
        fixed = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), len(path.parts))
        base = Path(*path.parts[:fixed])
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(base).parts)]
    return {file.relative_to(base).as_posix(): file for file in visible}
