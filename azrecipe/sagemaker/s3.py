"""Knows what lies in the bucket: code and data by their content, run directories as they are on disk, and how each is brought there and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from azrecipe.errors import CannotRun, CommandError
from azrecipe.sagemaker.account import Account, explained
from azrecipe.sagemaker.bundle import Parcel, Upload

LEFT = ("checkpoints/", "tensorboard/", ".lock")  # of a run directory: what the next run and a report do not read
THREADS = 8


class Bucket:
    """One bucket and the prefix in it. Raises CannotRun or CommandError for what S3 refuses."""

    def __init__(self, where: Account, name: str, prefix: str, kms_key_id: str | None = None) -> None:
        self.name, self.prefix = name, prefix
        self.owner = where.number
        self.s3: Any = where.session.client("s3", region_name=where.region)
        self.more = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key_id} if kms_key_id else {}

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{self.prefix}/{key}"

    def listed(self, key: str) -> dict[str, int]:
        """Sizes of what lies below a key, by the path below it."""
        whole = f"{self.prefix}/{key}"
        found: dict[str, int] = {}
        with explained(f"s3:ListBucket {self.uri(key)}"):
            for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=whole, ExpectedBucketOwner=self.owner):
                found |= {each["Key"][len(whole) :]: int(each["Size"]) for each in page.get("Contents", [])}
        return found

    def read(self, key: str) -> bytes | None:
        """An object's content; None where there is none."""
        from botocore.exceptions import ClientError

        with explained(f"s3:GetObject {self.uri(key)}"):
            try:
                data: bytes = self.s3.get_object(Bucket=self.name, Key=f"{self.prefix}/{key}", ExpectedBucketOwner=self.owner)[
                    "Body"
                ].read()
            except ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                    return None
                raise
        return data

    def write(self, key: str, data: bytes) -> None:
        with explained(f"s3:PutObject {self.uri(key)}"):
            self.s3.put_object(Bucket=self.name, Key=f"{self.prefix}/{key}", Body=data, ExpectedBucketOwner=self.owner, **self.more)

    def status(self, run: str) -> dict[str, Any]:
        """status.json of a run; empty where there is none, or where it is torn."""
        try:
            found: dict[str, Any] = json.loads(self.read(f"runs/{run}/status.json") or b"{}")
        except ValueError:
            return {}
        return found

    def complete(self, run: str) -> bool:
        """Whether a run is complete, and all of its model is there: files go up one by one, and status.json may be before them."""
        status = self.status(run)
        if status.get("state") != "complete":
            return False
        there = self.listed(f"runs/{run}/final/") if status.get("final") else {}
        return all(there.get(name) == size for name, size in (status.get("final") or {}).items())

    def lacking(self, parcel: Parcel) -> tuple[bool, list[Upload]]:
        """Whether the code is, and which data are, not there yet in their size."""
        data: dict[str, int] = {}
        for folder in dict.fromkeys("/".join(upload.key.split("/")[:2]) for upload in parcel.data):
            data |= {f"{folder}/{name}": size for name, size in self.listed(f"{folder}/").items()}
        code = self.listed(parcel.archive_key).get("") != len(parcel.archive)
        return code, [upload for upload in parcel.data if data.get(upload.key) != upload.size]

    def bring(self, parcel: Parcel) -> int:
        """Upload what is lacking; returns how many files that were."""
        code, data = self.lacking(parcel)
        if code:
            self.write(parcel.archive_key, parcel.archive)
        for upload in data:
            with explained(f"s3:PutObject {self.uri(upload.key)}"):
                self.s3.upload_file(
                    str(upload.file), self.name, f"{self.prefix}/{upload.key}", ExtraArgs={"ExpectedBucketOwner": self.owner, **self.more}
                )
        return code + len(data)

    def manifest(self, run: str, job: str, channel: str) -> str:
        """Write the list of a complete run's files that another run takes, checkpoints left out; returns its URI. Raises CommandError."""
        if not self.complete(run):
            state = self.status(run).get("state", "it has not been run")
            raise CommandError(f"{self.uri(f'runs/{run}')}: this run is not complete ({state}): submit it first")
        names = sorted(_kept(self.listed(f"runs/{run}/")))
        key = f"manifests/{job}/{channel}.json"
        self.write(key, json.dumps([{"prefix": self.uri(f"runs/{run}/")}, *names]).encode())
        return self.uri(key)

    def fetch(self, run: str, folder: Path, checkpoints: bool = False) -> int:
        """Bring a run directory here; files that are here in their size and are not changed any more stay. Returns how many came."""
        names = self.listed(f"runs/{run}/")
        if not names:
            raise CommandError(f"{self.uri(f'runs/{run}')}: there is nothing yet: the job writes it while it trains")
        wanted = names if checkpoints else {name: names[name] for name in _kept(names)}
        needed = {name: size for name, size in wanted.items() if not _same(folder / name, size)}
        with ThreadPoolExecutor(THREADS) as pool, explained(f"s3:GetObject {self.uri(f'runs/{run}')}"):
            list(pool.map(lambda name: self._get(f"runs/{run}/{name}", folder / name), needed))
        return len(needed)

    def _get(self, key: str, file: Path) -> None:
        """One file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.fetched")
        try:
            self.s3.download_file(self.name, f"{self.prefix}/{key}", str(aside))
            aside.replace(file)
        except OSError as error:
            raise CannotRun(f"{file}: cannot be written: {error.strerror}") from None
        finally:
            aside.unlink(missing_ok=True)


def _kept(names: Sequence[str] | dict[str, int]) -> Iterator[str]:
    return (name for name in names if not name.startswith(LEFT) and not Path(name).name.startswith("."))


def _same(file: Path, size: int) -> bool:
    """Whether a file need not come again. Small ones always do: their content changes while their size may not."""
    return size > 1_000_000 and file.is_file() and file.stat().st_size == size
