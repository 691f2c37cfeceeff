"""The content of result.json and plan.json, as types.

schema/result.json and schema/plan.json describe the same, key by key.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class MetricEstimate(TypedDict):
    """A value and its confidence interval; None where it has none."""

    value: float | None
    interval: list[float] | None


class ResamplingSettings(TypedDict):
    """The bootstrap that intervals come from; level is in percent."""

    seed: int
    count: int
    level: float


class ValidationSize(TypedDict):
    """The size of a validation set."""

    documents: int
    groups: NotRequired[int]
    bytes: int
    words: int
    cleaned: NotRequired[dict[str, Any]]


class CandidateResult(TypedDict):
    """A tokenizer candidate; estimates are by validation set.

    Further keys depend on the kind of the candidate.
    """

    name: str
    kind: Literal["baseline", "extension", "custom"]
    vocab_size: int
    fertility: dict[str, MetricEstimate]
    bytes_per_token: dict[str, MetricEstimate]
    characters_per_token: dict[str, MetricEstimate]
    words_in_window: dict[str, MetricEstimate]
    strr: dict[str, MetricEstimate]
    continued_words: dict[str, MetricEstimate]
    renyi_efficiency: dict[str, MetricEstimate]
    partial_character_tokens: dict[str, MetricEstimate]
    tokens_vs_baseline: dict[str, MetricEstimate]
    parity: NotRequired[MetricEstimate]
    changed_documents: dict[str, int]
    unused_tokens: dict[str, float]
    encoding: dict[str, int]
    words: list[list[list[str]]]
    embedding_rows_added: int
    embedding_parameters_added: int | None
    training: NotRequired[dict[str, Any]]
    protect: NotRequired[dict[str, Any]]


class TokenizerResult(TypedDict):
    """The result of a tokenizer recipe."""

    stage: Literal["tokenizer"]
    checksums: NotRequired[dict[str, str]]
    selected: str
    candidates: list[CandidateResult]
    show_words: list[str]
    window: int
    resamples: ResamplingSettings
    definitions: dict[str, str]
    validation: dict[str, ValidationSize]


class PhaseResult(TypedDict):
    """A phase of pretraining; seconds are those since the last resume."""

    steps: int
    last_loss: float | None
    seconds: float
    resumed_from: int | None
    tokens: int
    fill: float
    bytes: int
    trainable_parameters: int
    learning_rate: float
    skipped_steps: list[int]
    checkpoints: NotRequired[int]
    seconds_blocked: NotRequired[float]
    seconds_written: NotRequired[float]


class SourceResult(TypedDict):
    """A source that a pretrain recipe was trained on."""

    source: str
    documents: int
    bytes: int
    tokens: int
    held_out_left_out: int
    share: float
    phase_shares: NotRequired[dict[str, float]]
    epochs: float
    duplicates: NotRequired[dict[str, Any]]
    cleaned: NotRequired[dict[str, Any]]


class MixResult(TypedDict):
    """The weights of the sources from a token on."""

    token: int
    weights: list[float]


class DataEnd(TypedDict):
    """Where the next run continues in the data."""

    token: int
    fingerprint: str
    sequence: int | None
    mixes: NotRequired[list[MixResult]]


class PretrainResult(TypedDict):
    """The result of a pretrain recipe; bpb is by moment and validation set."""

    stage: Literal["pretrain"]
    checksums: NotRequired[dict[str, str]]
    attn_implementation: NotRequired[str]
    parameters: int | None
    vocabulary: dict[str, Any] | None
    vocab_size: int
    bpb: dict[str, dict[str, float] | None]
    phases: dict[str, PhaseResult]
    data: list[SourceResult]
    data_end: DataEnd
    bytes: int
    definitions: dict[str, str]


class BeforeAndAfter(TypedDict):
    """A measure before and after training; None without held-out rows."""

    before: float | None
    after: float | None


class SftTrainingResult(TypedDict):
    """The training loop of an sft recipe."""

    steps: int
    last_loss: float | None
    seconds: float
    resumed_from: int | None
    epochs: float
    tokens: int
    sequences: int
    sources: list[dict[str, float]]


class SftResult(TypedDict):
    """The result of an sft recipe."""

    stage: Literal["sft"]
    checksums: NotRequired[dict[str, str]]
    attn_implementation: NotRequired[str]
    method: Literal["sft", "dpo"]
    adapter: Literal["lora", "qlora", "none"]
    parameters: int
    new_tokens: list[str]
    data: dict[str, int]
    training: SftTrainingResult
    held_out_loss: NotRequired[BeforeAndAfter]
    held_out_accuracy: NotRequired[BeforeAndAfter]
    held_out_margin: NotRequired[BeforeAndAfter]
    definitions: dict[str, str]


class MergedModelSource(TypedDict):
    """A model that was merged."""

    path: str
    adapter: NotRequired[str]


class MergeResult(TypedDict):
    """The result of a merge recipe; rows are those of the embedding matrices."""

    stage: Literal["merge"]
    checksums: NotRequired[dict[str, str]]
    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_ties"]
    tokenizer_of: str
    models: dict[str, MergedModelSource]
    parameters: int
    vocab_size: int
    rows: dict[str, int]
    dtype: Literal["float32", "bfloat16", "float16"]
    bytes: int
    definitions: dict[str, str]


class ModelResult(TypedDict):
    """An evaluated model; difference is to the baseline."""

    path: str
    adapter: NotRequired[str]
    parameters: int
    vocab_size: int
    bpb: NotRequired[dict[str, MetricEstimate]]
    fertility: NotRequired[dict[str, MetricEstimate]]
    bytes_per_token: NotRequired[dict[str, MetricEstimate]]
    generations: NotRequired[dict[str, MetricEstimate]]
    answers: NotRequired[dict[str, MetricEstimate]]
    samples: NotRequired[list[dict[str, Any]]]
    answer_samples: NotRequired[list[dict[str, Any]]]
    tasks: NotRequired[dict[str, dict[str, dict[str, float | None]]]]
    difference: NotRequired[dict[str, dict[str, Any]]]


class EvaluateResult(TypedDict):
    """The result of an evaluate recipe."""

    stage: Literal["evaluate"]
    attn_implementation: NotRequired[str]
    baseline: str
    models: dict[str, ModelResult]
    validation: dict[str, ValidationSize]
    prompts: list[str]
    generation: dict[str, float]
    expected: dict[str, Any]
    answers: NotRequired[dict[str, Any]]
    harness: NotRequired[str]
    tasks: NotRequired[dict[str, dict[str, Any]]]
    resamples: ResamplingSettings
    definitions: dict[str, str]


class RankedCell(TypedDict):
    """A finished cell of a matrix."""

    cell: str
    bpb: float
    bpb_after: dict[str, dict[str, float]]
    vocab_size: int | None
    parameters: int | None
    bytes: int
    tokens: int
    steps: int
    training_seconds: float
    tokens_per_second: float
    bytes_per_second: float
    price: NotRequired[float]
    same_bytes: bool


class UnfinishedCell(TypedDict):
    """A cell that is not complete, and its first incomplete step."""

    cell: str
    state: str
    step: str
    exit_code: int | None
    message: str


class ComparisonResult(TypedDict):
    """The result of a pipeline with `compare`."""

    stage: Literal["pipeline"]
    metric: str
    dataset: str
    ranking: list[RankedCell]
    unfinished: list[UnfinishedCell]
    definitions: dict[str, str]


class PlannedLoopEstimate(TypedDict):
    """The estimate of a training loop; bytes are those on one card."""

    name: str
    parameters: dict[str, int]
    max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    memory: dict[str, Any]
    verdict: Literal["fits", "may fit", "does not fit"] | None
    change: str | None
    tokens_per_second: dict[str, float] | None
    rests_on: str | None


class RunPlan(TypedDict):
    """The content of plan.json."""

    device: str
    card: dict[str, Any] | None
    processes: int
    nodes: int
    backend: str
    model: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    loops: list[PlannedLoopEstimate]
