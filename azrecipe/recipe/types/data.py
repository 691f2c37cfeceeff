"""Dataclasses of datasets and of the `data` key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class HeldOut:
    fraction: float
    by: str | None = None


@dataclass(frozen=True)
class Scripts:
    allow: list[str]
    min_share: float = 0.9
    unit: str = "document"


@dataclass(frozen=True)
class Filters:
    min_characters: int | None = None
    max_characters: int | None = None
    repetition: bool = False


MAX_DOCUMENT_BYTES = 64 << 20  # the default of max_document_bytes


@dataclass(frozen=True)
class Source:
    """The keys of every kind of dataset."""

    path: str
    split: str
    name: str | None = None
    data_files: str | list[str] | None = None
    revision: str | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES


@dataclass(frozen=True)
class ValidationSource(Source):
    text_column: str = "text"
    max_bytes: int | None = None
    held_out: HeldOut | None = None
    normalize: list[str] = field(default_factory=list)
    scripts: Scripts | None = None


@dataclass(frozen=True)
class TextSource(ValidationSource):
    weight: float = 1.0
    max_epochs: float | None = None
    filters: Filters | None = None
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelSource(Source):
    text_column: str
    english_column: str
    max_pairs: int
    by: str | None = None


@dataclass(frozen=True)
class ConversationSource(Source):
    format: str = "auto"
    weight: float | None = None


@dataclass(frozen=True)
class Deduplication:
    method: str
    threshold: float
    ngram_size: int
    num_perm: int


@dataclass(frozen=True)
class PretrainData:
    max_length: int
    packing: bool
    packing_strategy: str
    datasets: list[TextSource]
    validation: Mapping[str, ValidationSource]
    stopping_strategy: str
    sampling_temperature: float | None = None
    deduplication: Deduplication | None = None
    continue_from: str | None = None


@dataclass(frozen=True)
class TokenizerData:
    datasets: list[TextSource]
    validation: Mapping[str, ValidationSource]
    max_length: int
    parallel: ParallelSource | None = None


@dataclass(frozen=True)
class SftHeldOut:
    fraction: float


@dataclass(frozen=True)
class SftValidation:
    held_out: SftHeldOut


@dataclass(frozen=True)
class SftData:
    max_length: int
    packing: bool
    datasets: list[ConversationSource]
    validation: SftValidation


@dataclass(frozen=True)
class EvaluateData:
    max_length: int
    validation: Mapping[str, ValidationSource]
