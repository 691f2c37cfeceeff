"""The files that a training job needs from this machine.

They are the package, the recipe with the paths of the container, and local data where the settings allow their upload. Nothing else is
uploaded: no .git, no caches, no run directories, nothing that lies beside the recipe. Data are uploaded as files of their own.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import azrecipe
from azrecipe.errors import Problem, RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.extras import list_required_packages
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.task_files import read_task_files
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key
from azrecipe.runs.run_dir import locate_named_run, locate_run
from azrecipe.sagemaker import local_files
from azrecipe.sagemaker.settings import SageMakerSettings
from azrecipe.utils import shipped_files
from azrecipe.utils.atomic_files import hash_file
from azrecipe.utils.paths import DATA_SUFFIXES, LOCAL_PATH_CHECKS, is_s3

ENTRY_POINT = "sagemaker_entry.py"
JOB_FILE = "job.json"
INPUT_DATA_DIR = "/opt/ml/input/data"
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
        local_sources: The user's files among them, by the same path.
        data_uploads: Local data to upload.
        unsearched: What of it is not searched for secrets.
        channels: Inputs by channel name: an S3 URI, or a key below the prefix.
        input_runs: Runs of other recipes that this one reads, by channel name.
    """

    run_path: str
    recipe: Recipe
    source_files: dict[str, bytes] = field(default_factory=dict)
    local_sources: dict[str, str] = field(default_factory=dict)
    data_uploads: list[Upload] = field(default_factory=list)
    unsearched: list[str] = field(default_factory=list)
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

    Raises RecipeError for local data without upload_data, for secrets in files, for links out of the tree, and for a recipe that the
    container could not read.
    """
    bundle = Bundle(_run_path(recipe), recipe)
    rewriter = _PathRewriter(recipe, settings, bundle)
    # The keys of the recipe without defaults: some defaults are allowed with some keys only.
    explicit = {key: value for key, value in recipe.tree.to_plain().items() if key not in ("extends", "fragment", "variables")}
    data = rewriter.rewrite(explicit, schema.load_schema(recipe.stage), ())
    trackers = recipe.data.get("training", {}).get("report_to")
    if trackers is not None and "tensorboard" not in trackers:
        data["training"] = {**data.get("training", {}), "report_to": [*trackers, "tensorboard"]}  # SageMaker shows it
    bundle.recipe = replace(recipe, data=data)
    if rewriter.problems:
        raise RecipeError(rewriter.problems)
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
    bundle.source_files["constraints.txt"] = (shipped / "constraints.txt").read_bytes() + f"{settings.torch_pin}\n".encode()
    job = {
        "recipe": f"job/{recipe.name}.yaml",
        "run": f"{recipe.project}/{recipe.name}",
        "runs": {channel: run.container_path for channel, run in bundle.input_runs.items()},
        "accelerate_config": settings.accelerate_config,
        "hub_token_secret": settings.hub_token_secret,
        "allow_code": settings.allow_code,
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
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        if relative.parts[0] != "_shipped" and not any(part.startswith(".") for part in relative.parts) and file.is_file():
            yield f"azrecipe/{relative.as_posix()}", file.read_bytes()
    for name in shipped_files.RUNTIME_FILES:
        yield f"azrecipe/_shipped/{name}", (shipped_files.locate_root() / name).read_bytes()


class _PathRewriter:
    """Rewrites a recipe's paths for the container, and collects their files."""

    def __init__(self, recipe: Recipe, settings: SageMakerSettings, bundle: Bundle) -> None:
        self.recipe, self.settings, self.bundle = recipe, settings, bundle
        self.folders = (Path.cwd(), recipe.path.absolute().parent)
        self.problems: list[Problem] = []
        self.upstream: dict[str, None] = {}
        self.container_paths: dict[str, str] = {}
        self.rewriters: dict[str, Callable[[str, tuple[Key, ...]], str]] = {
            "recipe": self._rewrite_recipe, "data": self._rewrite_data, "model": self._rewrite_model, "template": self._rewrite_template, "task": self._rewrite_task,
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

    def _rewrite_template(self, value: str, keys: tuple[Key, ...]) -> str:
        return self._add_files(value, [Path(value)], keys)

    def _rewrite_task(self, value: str, keys: tuple[Key, ...]) -> str:
        """Add a task file, what it includes and its data."""
        task = read_task_files(Path(value))
        self.problems += task.problems if self.settings.allow_code else [*task.problems, *task.functions]
        if task.data_files and not self.settings.upload_data:
            names = ", ".join(file.name for file in task.data_files)
            self._report(
                keys, f"{value} names data on this machine ({names}), which the job cannot read: set upload_data: true (--upload-data)"
            )
            return value
        modules = task.modules if self.settings.allow_code else []
        return self._add_files(value, [*task.files, *task.data_files, *modules], keys)

    def _add_files(self, value: str, files: Sequence[Path], keys: tuple[Key, ...]) -> str:
        """Add small files beside the recipe, in folders as they are here.

        Args:
            value: The first file, as the recipe names it.
            files: The files.
            keys: The keys that lead to the value.

        Returns:
            The first file's path in the container.
        """
        base = Path(os.path.commonpath([file.absolute().parent for file in map(_normalize, files)]))
        folder = f"files/{len(self.bundle.source_files)}"
        messages = list(local_files.describe_outward_links(files, Path(value), self.folders))
        names = []
        for file in files if not messages else ():
            try:
                data = file.read_bytes()
            except OSError as error:
                messages.append(f"{file}: cannot be read: {error.strerror}")
                continue
            messages += local_files.describe_secrets(file, data.decode("utf-8", "replace"))
            names.append(f"{folder}/{_normalize(file).absolute().relative_to(base).as_posix()}")
            self.bundle.source_files[f"job/{names[-1]}"] = data
            self.bundle.local_sources[f"job/{names[-1]}"] = str(file)
        for message in messages:
            self._report(keys, message)
        return f"./{names[0]}" if names else value

    def _report(self, keys: tuple[Key, ...], message: str) -> None:
        self.problems.append(Problem(self.recipe.locate(*keys), message))

    def _rewrite_model(self, value: str, keys: tuple[Key, ...]) -> str:
        return self._rewrite_data(value, keys, is_model=True)

    def _rewrite_data(self, value: str, keys: tuple[Key, ...], is_model: bool = False) -> str:
        """Add data or a model: a channel from S3, or an upload."""
        if value in self.container_paths:
            return self.container_paths[value]
        if is_s3(value):
            if any(c in value for c in "*?[") or len(self.bundle.channels) >= MAX_CHANNELS:
                return value  # the run reads it from S3
            is_file = value.endswith(DATA_SUFFIXES)  # a folder gets a slash: without it the prefix would match other folders too
            return self._add_channel(value, value if is_file else f"{value.rstrip('/')}/", PurePosixPath(value).name if is_file else "")
        files = local_files.list_model_files(value) if is_model else local_files.list_data_files(value)
        problems = list(self._check_upload(value, files, is_model))
        for problem in problems:
            self._report(keys, problem)
        if problems:
            return value
        listing = "\n".join(f"{name} {hash_file(file)}" for name, file in sorted(files.items()))
        folder = f"data/{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
        self.bundle.data_uploads += [Upload(file, f"{folder}/{name}") for name, file in sorted(files.items())]
        is_file = len(files) == 1 and Path(value).is_file()
        return self._add_channel(value, f"{folder}/", next(iter(files)) if is_file else "")

    def _check_upload(self, value: str, files: Mapping[str, Path], is_model: bool) -> Iterator[str]:
        """Yield what stands in the way of an upload."""
        if len(self.bundle.channels) >= MAX_CHANNELS:
            yield f"{value}: a job can read data from at most {MAX_CHANNELS} places: put several into one folder, or use a glob on S3"
        if not files:
            expected = "file of a model" if is_model else f"data file ({', '.join(DATA_SUFFIXES)})"
            yield f"{value}: there is nothing that is read: no {expected}"
        elif not self.settings.upload_data:
            size = sum(file.stat().st_size for file in files.values())
            problem = f"{value} is on this machine ({len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:,.1f} MB)"
            remedy = "use a path on S3 (s3://bucket/…), or set upload_data: true in the settings (--upload-data)"
            yield f"{problem}, which the job cannot read: {remedy}"
        else:
            outward = list(local_files.describe_outward_links(files.values(), Path(value), self.folders))
            yield from outward or local_files.describe_data_secrets(files, self.bundle.unsearched)

    def _add_channel(self, value: str, source: str, file_name: str) -> str:
        name = f"data{sum(channel.startswith('data') for channel in self.bundle.channels)}"
        self.bundle.channels[name] = source
        self.container_paths[value] = f"{INPUT_DATA_DIR}/{name}/{file_name}".rstrip("/")
        return self.container_paths[value]


def _normalize(path: Path) -> Path:
    """Return a path without `..`, as it is named: links are not followed."""
    return Path(os.path.normpath(path))
