"""Dataclasses of each stage's recipe, and of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.recipe.types.data import EvaluateData, PretrainData, SftData, TokenizerData, ValidationSource
from azrecipe.recipe.types.training import Dpo, Lora, Phase, PretrainTraining, SftTraining


@dataclass(frozen=True)
class ModelSource:
    """The source of a model or a tokenizer.

    Exactly one of name_or_path and output_of is set.
    """

    name_or_path: str | None = None
    revision: str | None = None
    output_of: str | None = None


@dataclass(frozen=True)
class Model(ModelSource):
    attn_implementation: str = AUTO


@dataclass(frozen=True)
class PretrainModel(Model):
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class PretrainTokenizer(ModelSource):
    candidate: str | None = None
    family: str | None = None
    vocab_size: int | None = None
    new_embeddings: str = "subtoken_mean"
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class PretrainConfig:
    stage: str
    project: str
    description: str
    seed: int
    model: PretrainModel
    tokenizer: PretrainTokenizer
    data: PretrainData
    phases: list[Phase]
    training: PretrainTraining

    @property
    def changes_mix(self) -> bool:
        """Whether a phase has a mix of its own."""
        return any(phase.data is not None for phase in self.phases)

    def list_weights(self, phase: Phase) -> list[float]:
        """List the weights of the sources in a phase, in their order.

        With a sampling temperature they say nothing.
        """
        weights = phase.data.weights if phase.data is not None else {}
        return [source.weight if source.id is None else weights.get(source.id, source.weight) for source in self.data.datasets]


@dataclass(frozen=True)
class Candidate:
    kind: str
    pre_tokenizer: str
    vocab_size: int | None = None
    new_tokens: int | None = None
    protect: ValidationSource | None = None


@dataclass(frozen=True)
class TokenizerConfig:
    stage: str
    project: str
    description: str
    seed: int
    tokenizer: ModelSource
    data: TokenizerData
    candidates: Mapping[str, Candidate]
    select: str
    show_words: list[str]
    training_bytes: int | None = None


@dataclass(frozen=True)
class SftConfig:
    stage: str
    project: str
    description: str
    seed: int
    model: Model
    method: str
    chat_template: str
    data: SftData
    adapter: str
    lora: Lora
    dpo: Dpo
    training: SftTraining


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class PromptEntry:
    """A prompt for models.

    Exactly one of text to continue and messages to answer is set.
    """

    text: str | None = None
    messages: list[Message] | None = None
    language: str | None = None


@dataclass(frozen=True)
class EvaluateModel(ModelSource):
    adapter: str | None = None


@dataclass(frozen=True)
class MergeModel(EvaluateModel):
    """A model that is merged.

    At most one of weight and weights is set.
    """

    weight: float | None = None
    weights: Mapping[str, float] | None = None


@dataclass(frozen=True)
class MergeConfig:
    stage: str
    project: str
    description: str
    seed: int
    models: Mapping[str, MergeModel]
    method: str
    density: float
    base: EvaluateModel | None = None
    tokenizer_of: str | None = None
    special_tokens_from: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Answers:
    output_of: str
    max_conversations: int


@dataclass(frozen=True)
class HarnessTask:
    task: str
    apply_chat_template: bool = False
    num_fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Generation:
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class EvaluateConfig:
    stage: str
    project: str
    description: str
    seed: int
    models: Mapping[str, EvaluateModel]
    data: EvaluateData
    prompts: list[str | PromptEntry]
    generation: Generation
    tasks: list[str | HarnessTask]
    per_device_eval_batch_size: int
    precision: str
    attn_implementation: str = AUTO
    baseline: str | None = None
    language: str | None = None
    languages: list[str] | None = None
    script: str | None = None
    answers: Answers | None = None


@dataclass(frozen=True)
class CompareConfig:
    metric: str
    dataset: str | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class PipelineConfig:
    stage: str
    project: str
    description: str
    steps: list[str]
    set: Mapping[str, Mapping[str, Any]]
    matrix: Mapping[str, Mapping[str, Mapping[str, Any]]]
    compare: CompareConfig | None = None


STAGE_TYPES: Mapping[str, type[Any]] = {
    "tokenizer": TokenizerConfig,
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "merge": MergeConfig,
    "evaluate": EvaluateConfig,
    "pipeline": PipelineConfig,
}
