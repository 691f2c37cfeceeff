"""Knows what of a recipe goes to S3: the code and the recipe as the container will read them, and local data where that is asked for.

Nothing else is ever taken along: no .git, no caches, no run directories, no credentials. Data go by themselves, not with the code.
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
from typing import Any

import azrecipe
from azrecipe.errors import Problem, RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.extras import required_packages
from azrecipe.recipe.load import Recipe, load
from azrecipe.recipe.overrides import dotted
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key
from azrecipe.runs.run_dir import locate, run_of
from azrecipe.sagemaker.settings import SECRETS, Settings, secrets_in
from azrecipe.utils import shipped_files
from azrecipe.utils.atomic_files import sha256
from azrecipe.utils.paths import DATA_SUFFIXES, LOCAL, is_s3

ENTRY = "sagemaker_entry.py"
JOB = "job.json"
INPUTS = "/opt/ml/input/data"
CODE_SUFFIXES = (".py", ".json", ".yaml", ".html", ".css", ".js", ".svg")
MOST_CHANNELS = 15  # SageMaker allows 20; code, drivers and the outputs of earlier runs take some
ENTRY_TEXT = '''"""Entry point of a training job. Arguments: none, or a recipe and what `python -m azrecipe` takes."""

import sys

from azrecipe.sagemaker.container import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


@dataclass(frozen=True)
class Upload:
    """A local file, and its key below the prefix; the key holds a hash of the content, so what is there already is the same."""

    file: Path
    key: str

    @property
    def size(self) -> int:
        return self.file.stat().st_size


@dataclass
class Parcel:
    """One job's files.

    run: where it lies below a runs directory, <project>/<name> or that of a cell. code: content by path below the source folder. data: uploads. channels: what comes in, as an S3 URI or as a key below the prefix, by the
    channel's name. runs: runs of other recipes that come in, as <project>/<name> here by channel, and where they lie below runs/ in the bucket.
    """

    run: str
    recipe: Recipe  # as the container reads it
    code: dict[str, bytes] = field(default_factory=dict)
    data: list[Upload] = field(default_factory=list)
    channels: dict[str, str] = field(default_factory=dict)
    runs: dict[str, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def archive(self) -> bytes:
        """The code as one file, the same for the same code: it is in S3 whole or not at all, and once."""
        held = io.BytesIO()
        with gzip.GzipFile(fileobj=held, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in sorted(self.code.items()):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))
        return held.getvalue()

    @property
    def archive_key(self) -> str:
        """Its key below the prefix."""
        return f"code/{hashlib.sha256(self.archive).hexdigest()[:32]}/sourcedir.tar.gz"

    def write(self, folder: Path) -> None:
        """Lay the code into a folder."""
        for name, data in self.code.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def pack(recipe: Recipe, settings: Settings) -> Parcel:
    """Make a recipe ready to travel. Raises RecipeError for local data that may not, for secrets, and for what would not be a recipe there."""
    problems = [
        Problem(recipe.place(*at), f"{dotted(at)} looks like a secret, and would stand in S3: take it out")
        for at in secrets_in(recipe.data)
    ]
    parcel = Parcel(_run(recipe), recipe)
    travel = _Traveller(recipe, settings, parcel)
    own = {
        key: value for key, value in recipe.tree.plain().items() if key not in ("extends", "fragment", "variables")
    }  # no defaults: some only suit some
    data = travel.moved(own, schema.document(recipe.stage), ())
    told = recipe.data.get("training", {}).get("report_to")
    if told is not None and "tensorboard" not in told:
        data["training"] = {**data.get("training", {}), "report_to": [*told, "tensorboard"]}  # SageMaker shows it
    parcel.recipe = replace(recipe, data=data)
    problems += travel.problems
    if problems:
        raise RecipeError(problems)
    parcel.code.update(_package())
    parcel.code[f"job/{recipe.name}.yaml"] = to_yaml(data).encode()
    for name in travel.upstream:  # a recipe names others by their files; of their runs, not of these, it takes what it takes
        parcel.code.setdefault(
            f"job/{name}.yaml", f"# Stands for a recipe whose run comes in.\nstage: tokenizer\nproject: {recipe.project}\n".encode()
        )
    parcel.code[ENTRY] = ENTRY_TEXT.encode()
    shipped = shipped_files.root() / "sagemaker"
    more = "".join(f"{line}\n" for line in required_packages(recipe))
    parcel.code["requirements.txt"] = (shipped / "requirements.txt").read_bytes() + more.encode()
    parcel.code["constraints.txt"] = (shipped / "constraints.txt").read_bytes()
    job = {
        "recipe": f"job/{recipe.name}.yaml",
        "run": f"{recipe.project}/{recipe.name}",
        "runs": {channel: here for channel, (here, _) in parcel.runs.items()},
        "accelerate_config": settings.accelerate_config,
        "hub_token_secret": settings.hub_token_secret,
    }
    parcel.code[JOB] = (json.dumps(job, indent=2) + "\n").encode()
    _check_readable(parcel, recipe)
    return parcel


def _check_readable(parcel: Parcel, recipe: Recipe) -> None:
    """Load the recipe as it was written. Raises RecipeError: what the container cannot read is better told here."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in parcel.code.items():
            if name.startswith("job/"):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(data)
        load(Path(folder) / "job" / f"{recipe.name}.yaml")


def _run(recipe: Recipe) -> str:
    """Where the run lies below a runs directory: <project>/<name>, or that of its cell."""
    return locate(recipe, Path()).path.as_posix()


@cache
def _package() -> tuple[tuple[str, bytes], ...]:
    """The installed package and what ships with it, by path in the source folder; read once for all steps of a pipeline."""
    return tuple(_packaged())


def _packaged() -> Iterator[tuple[str, bytes]]:
    package = Path(azrecipe.__file__).resolve().parent
    for file in sorted(package.rglob("*")):
        relative = file.relative_to(package)
        if _taken(relative) and relative.parts[0] != "_shipped" and file.is_file():
            yield f"azrecipe/{relative.as_posix()}", file.read_bytes()
    for top in shipped_files.SHIPPED:
        for file in sorted((shipped_files.root() / top).rglob("*")):
            relative = file.relative_to(shipped_files.root())
            if (_taken(relative) or relative.suffix in (".jinja", ".txt")) and "data" not in relative.parts and file.is_file():
                yield f"azrecipe/_shipped/{relative.as_posix()}", file.read_bytes()


def _taken(relative: Path) -> bool:
    return relative.suffix in CODE_SUFFIXES and not any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


class _Traveller:
    """Rewrites the paths of one resolved recipe for the container, and notes what has to come along."""

    def __init__(self, recipe: Recipe, settings: Settings, parcel: Parcel) -> None:
        self.recipe, self.settings, self.parcel = recipe, settings, parcel
        self.problems: list[Problem] = []
        self.upstream: dict[str, None] = {}
        self.seen: dict[str, str] = {}
        self.kinds: dict[str, Callable[[str, tuple[Key, ...]], str]] = {
            "recipe": self._recipe, "data": self._data, "model": self._data, "template": self._file, "task": self._file,
        }  # fmt: skip

    def moved(self, value: Any, definition: schema.Schema, keys: tuple[Key, ...]) -> Any:
        """The same data with paths as they are in the container."""
        definition = schema.follow(definition)
        if isinstance(value, Mapping):
            return {key: self.moved(inner, schema.below(definition, key) or {}, (*keys, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.moved(inner, schema.below(definition, i) or {}, (*keys, i)) for i, inner in enumerate(value)]
        kind = definition.get("x-path")
        if kind is None or not isinstance(value, str) or not (LOCAL[kind](value) or is_s3(value)):
            return value
        return self.kinds[kind](value, keys)

    def _recipe(self, value: str, _keys: tuple[Key, ...]) -> str:
        name = Path(value).stem
        if name not in self.upstream:
            self.upstream[name] = None
            there = run_of(self.recipe, Path(), name).path.as_posix()
            self.parcel.runs[f"run{len(self.parcel.runs)}"] = (f"{self.recipe.project}/{name}", there)
        return f"./{name}.yaml"

    def _file(self, value: str, keys: tuple[Key, ...]) -> str:
        """A small file that the recipe names: a chat template, a task."""
        name = f"files/{len(self.parcel.code)}/{Path(value).name}"
        try:
            data = Path(value).read_bytes()
        except OSError as error:
            self.problems.append(Problem(self.recipe.place(*keys), f"{value}: cannot be read: {error.strerror}"))
            return value
        if SECRETS.search(data.decode("utf-8", "replace")):
            self.problems.append(
                Problem(self.recipe.place(*keys), f"{value} holds what looks like a secret, and would stand in S3: take it out")
            )
        self.parcel.code[f"job/{name}"] = data
        return f"./{name}"

    def _data(self, value: str, keys: tuple[Key, ...]) -> str:
        """Data and models: from S3 through a channel; local ones through the bucket, where that is asked for."""
        if value in self.seen:
            return self.seen[value]
        if is_s3(value):
            if any(c in value for c in "*?[") or len(self.parcel.channels) >= MOST_CHANNELS:
                return value  # read from S3 as the run goes on
            alone = value.endswith(DATA_SUFFIXES)  # a prefix without its slash would be that of other folders too
            return self._channel(value, value if alone else f"{value.rstrip('/')}/", PurePosixPath(value).name if alone else "")
        files = _files(value)
        if len(self.parcel.channels) >= MOST_CHANNELS:
            message = f"{value}: a job has room for {MOST_CHANNELS} places of data: put several into one folder, or name a glob on S3"
            self.problems.append(Problem(self.recipe.place(*keys), message))
        if not files:
            self.problems.append(Problem(self.recipe.place(*keys), f"{value}: there is nothing"))
            return value
        if not self.settings.upload_data:
            size = sum(file.stat().st_size for file in files.values())
            what = f"{value} is on this machine ({len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:,.1f} MB)"
            how = "name it on S3 (s3://bucket/…), or say upload_data: true in the settings (--upload-data)"
            self.problems.append(Problem(self.recipe.place(*keys), f"{what}, where the job is not: {how}"))
            return value
        listing = "\n".join(f"{name} {sha256(file)}" for name, file in sorted(files.items()))
        folder = f"data/{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
        self.parcel.data += [Upload(file, f"{folder}/{name}") for name, file in sorted(files.items())]
        alone = len(files) == 1 and Path(value).is_file()
        return self._channel(value, f"{folder}/", next(iter(files)) if alone else "")

    def _channel(self, value: str, source: str, below: str) -> str:
        name = f"data{sum(channel.startswith('data') for channel in self.parcel.channels)}"
        self.parcel.channels[name] = source
        self.seen[value] = f"{INPUTS}/{name}/{below}".rstrip("/")
        return self.seen[value]


def _files(value: str) -> dict[str, Path]:
    """The files that a local path names: itself, all of a folder, those of a glob; by their path below what all have in common."""
    path = Path(value).expanduser()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        base, found = path, [file for file in path.rglob("*") if file.is_file()]
    else:
        fixed = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), len(path.parts))
        base = Path(*path.parts[:fixed])
        found = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    kept = [file for file in found if not any(part.startswith(".") for part in file.relative_to(base).parts)]
    return {file.relative_to(base).as_posix(): file for file in kept}
