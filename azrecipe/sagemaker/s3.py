"""Code, data and run directories in the bucket: upload and download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from azrecipe.errors import CannotRun, CommandError
from azrecipe.sagemaker.account import Account, translate_aws_errors
from azrecipe.sagemaker.bundle import Bundle, Upload

SKIPPED_PREFIXES = ("checkpoints/", "tensorboard/", ".lock")  # of a run directory: neither another run nor a report reads them
DOWNLOAD_THREADS = 8


class MissingFiles(NamedTuple):
    """The files of a bundle that the bucket lacks."""

    code: bool
    data: list[Upload]


class Bucket:
    """A bucket and the prefix in it.

    Its methods raise CannotRun or CommandError where S3 refuses.
    """

    def __init__(self, account: Account, name: str, prefix: str, kms_key_id: str | None = None) -> None:
        self.name, self.prefix = name, prefix
        self.owner_id = account.account_id
        self.client: Any = account.session.client("s3", region_name=account.region)
        self.encryption_arguments = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key_id} if kms_key_id else {}

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{self.prefix}/{key}"

    def list_sizes(self, key: str) -> dict[str, int]:
        """List the sizes of objects below a key, in bytes.

        Returns:
            Sizes by the path below the key.
        """
        prefix = f"{self.prefix}/{key}"
        sizes: dict[str, int] = {}
        with translate_aws_errors(f"s3:ListBucket {self.uri(key)}"):
            for page in self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix, ExpectedBucketOwner=self.owner_id
            ):
                sizes |= {entry["Key"][len(prefix) :]: int(entry["Size"]) for entry in page.get("Contents", [])}
        return sizes

    def read_object(self, key: str) -> bytes | None:
        """Read an object; None where it does not exist."""
        from botocore.exceptions import ClientError

        with translate_aws_errors(f"s3:GetObject {self.uri(key)}"):
            try:
                data: bytes = self.client.get_object(Bucket=self.name, Key=f"{self.prefix}/{key}", ExpectedBucketOwner=self.owner_id)[
                    "Body"
                ].read()
            except ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                    return None
                raise
        return data

    def write_object(self, key: str, data: bytes) -> None:
        """Write an object."""
        with translate_aws_errors(f"s3:PutObject {self.uri(key)}"):
            self.client.put_object(
                Bucket=self.name, Key=f"{self.prefix}/{key}", Body=data, ExpectedBucketOwner=self.owner_id, **self.encryption_arguments
            )

    def read_status(self, run: str) -> dict[str, Any]:
        """Read a run's status.json; empty where it is missing or incomplete."""
        try:
            status: dict[str, Any] = json.loads(self.read_object(f"runs/{run}/status.json") or b"{}")
        except ValueError:
            return {}
        return status

    def is_complete(self, run: str) -> bool:
        """Return whether a run and all files of its model are complete.

        SageMaker uploads files one by one, and status.json may be there before the model.
        """
        status = self.read_status(run)
        if status.get("state") != "complete":
            return False
        sizes = self.list_sizes(f"runs/{run}/final/") if status.get("final") else {}
        return all(sizes.get(name) == size for name, size in (status.get("final") or {}).items())

    def list_missing(self, bundle: Bundle) -> MissingFiles:
        """List a bundle's files that the bucket lacks, by size."""
        sizes: dict[str, int] = {}
        for folder in dict.fromkeys("/".join(upload.key.split("/")[:2]) for upload in bundle.data_uploads):
            sizes |= {f"{folder}/{name}": size for name, size in self.list_sizes(f"{folder}/").items()}
        code = self.list_sizes(bundle.archive_key).get("") != len(bundle.archive)
        return MissingFiles(code, [upload for upload in bundle.data_uploads if sizes.get(upload.key) != upload.size])

    def upload_missing(self, bundle: Bundle) -> int:
        """Upload the missing files of a bundle, and return their number."""
        missing = self.list_missing(bundle)
        if missing.code:
            self.write_object(bundle.archive_key, bundle.archive)
        for upload in missing.data:
            with translate_aws_errors(f"s3:PutObject {self.uri(upload.key)}"):
                self.client.upload_file(
                    str(upload.file),
                    self.name,
                    f"{self.prefix}/{upload.key}",
                    ExtraArgs={"ExpectedBucketOwner": self.owner_id, **self.encryption_arguments},
                )
        return missing.code + len(missing.data)

    def write_manifest(self, run: str, job: str, channel: str) -> str:
        """Write the manifest of a complete run that another run reads.

        Checkpoints are not in it.

        Args:
            run: The path of the run below runs/.
            job: The path of the run that reads it.
            channel: The channel that brings it in.

        Returns:
            The manifest's URI.

        Raises:
            CommandError: The run is not complete.
        """
        if not self.is_complete(run):
            state = self.read_status(run).get("state", "it has not been run")
            raise CommandError(f"{self.uri(f'runs/{run}')}: this run is not complete ({state}): submit it first")
        names = sorted(_without_skipped(self.list_sizes(f"runs/{run}/")))
        key = f"manifests/{job}/{channel}.json"
        self.write_object(key, json.dumps([{"prefix": self.uri(f"runs/{run}/")}, *names]).encode())
        return self.uri(key)

    def fetch_run(self, run: str, folder: Path, checkpoints: bool = False) -> int:
        """Download a run directory.

        Large local files of the same size are not downloaded again.

        Args:
            run: The path of the run below runs/.
            folder: The local run directory.
            checkpoints: Whether to download checkpoints too.

        Returns:
            The number of downloaded files.
        """
        names = self.list_sizes(f"runs/{run}/")
        if not names:
            raise CommandError(f"{self.uri(f'runs/{run}')}: there is nothing yet: the job writes it while it trains")
        selected = names if checkpoints else {name: names[name] for name in _without_skipped(names)}
        needed = {name: size for name, size in selected.items() if not _is_current(folder / name, size)}
        with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool, translate_aws_errors(f"s3:GetObject {self.uri(f'runs/{run}')}"):
            list(pool.map(lambda name: self._download(f"runs/{run}/{name}", folder / name), needed))
        return len(needed)

    def _download(self, key: str, file: Path) -> None:
        """Download one file; it appears under its name when it is complete."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.fetched")
        try:
            self.client.download_file(self.name, f"{self.prefix}/{key}", str(temporary))
            temporary.replace(file)
        except OSError as error:
            raise CannotRun(f"{file}: cannot be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)


def _without_skipped(names: Sequence[str] | dict[str, int]) -> Iterator[str]:
    return (name for name in names if not name.startswith(SKIPPED_PREFIXES) and not Path(name).name.startswith("."))


def _is_current(file: Path, size: int) -> bool:
    """Return whether a large local file has the size of the object.

    Small files are always downloaded: their content may change and their size may not.
    """
    return size > 1_000_000 and file.is_file() and file.stat().st_size == size
