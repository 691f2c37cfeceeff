"""A checked recipe as frozen dataclasses: one class a schema object, one field a key (a test holds the two equal).

Units and meanings stand in schema/; defaults are filled in from there, so no field has one here unless its key may be
absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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


@dataclass(frozen=True)
class Source:
    """Common to every kind of dataset entry."""

    path: str
    split: str
    name: str | None = None
    data_files: str | list[str] | None = None
    revision: str | None = None


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


@dataclass(frozen=True)
class ModelSource:
    """Where a model or a tokenizer comes from: exactly one of name_or_path and output_of."""

    name_or_path: str | None = None
    revision: str | None = None
    output_of: str | None = None


@dataclass(frozen=True)
class Model(ModelSource):
    attn_implementation: str = "sdpa"


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
class Phase:
    name: str
    trainable_parameters: list[str]
    learning_rate: float
    max_steps: int | None = None
    max_tokens: int | None = None
    max_bytes: int | None = None
    num_train_epochs: float | None = None
    lr_scheduler_type: str | None = None
    decay_ratio: float | None = None
    min_lr_ratio: float | None = None
    warmup_ratio: float | None = None
    optim: str | None = None
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class LigerKernels:
    rope: bool | None = None
    rms_norm: bool | None = None
    swiglu: bool | None = None
    geglu: bool | None = None
    layer_norm: bool | None = None
    cross_entropy: bool | None = None
    fused_linear_cross_entropy: bool | None = None


@dataclass(frozen=True)
class Profile:
    start_step: int
    steps: int


@dataclass(frozen=True)
class Training:
    """What every training stage shares; names are transformers.TrainingArguments'."""

    global_batch_size: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    lr_scheduler_type: str
    decay_ratio: float
    min_lr_ratio: float
    optim: str
    warmup_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    precision: str
    use_liger_kernel: bool
    torch_compile: bool
    activation_checkpointing: bool
    logging_steps: int
    save_steps: int
    save_total_limit: int
    report_to: list[str]
    trainer_arguments: dict[str, Any]
    eval_steps: int | None = None
    liger_kernel_config: LigerKernels | None = None
    profile: Profile | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainTraining(Training):
    on_bad_loss: str
    loss_spike_factor: float | None = None
    fused_linear_cross_entropy: str | None = None


@dataclass(frozen=True)
class Pretrain:
    stage: str
    project: str
    description: str
    seed: int
    model: PretrainModel
    tokenizer: PretrainTokenizer
    data: PretrainData
    phases: list[Phase]
    training: PretrainTraining


@dataclass(frozen=True)
class Candidate:
    kind: str
    pre_tokenizer: str
    vocab_size: int | None = None
    new_tokens: int | None = None
    protect: ValidationSource | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelSource(Source):
    text_column: str
    english_column: str
    max_pairs: int
    by: str | None = None


@dataclass(frozen=True)
class TokenizerData:
    datasets: list[TextSource]
    validation: Mapping[str, ValidationSource]
    max_length: int
    parallel: ParallelSource | None = None


@dataclass(frozen=True)
class Tokenizer:
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
class ConversationSource(Source):
    format: str = "auto"
    weight: float | None = None


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
class Lora:
    r: int
    lora_alpha: int | float
    lora_dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool
    modules_to_save: list[str]
    train_new_tokens: bool


@dataclass(frozen=True)
class Dpo:
    beta: float
    loss_type: str
    label_smoothing: float


@dataclass(frozen=True, kw_only=True)
class SftTraining(Training):
    learning_rate: float
    assistant_only_loss: bool
    num_train_epochs: float | None = None
    max_steps: int | None = None
    neftune_noise_alpha: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sft:
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
class Prompt:
    """What models are asked: exactly one of text to continue and messages to answer."""

    text: str | None = None
    messages: list[Message] | None = None
    language: str | None = None


@dataclass(frozen=True)
class EvaluateModel(ModelSource):
    adapter: str | None = None


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
class EvaluateData:
    max_length: int
    validation: Mapping[str, ValidationSource]


@dataclass(frozen=True)
class Generation:
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class Evaluate:
    stage: str
    project: str
    description: str
    seed: int
    models: Mapping[str, EvaluateModel]
    data: EvaluateData
    prompts: list[str | Prompt]
    generation: Generation
    tasks: list[str | HarnessTask]
    per_device_eval_batch_size: int
    precision: str
    baseline: str | None = None
    language: str | None = None
    languages: list[str] | None = None
    script: str | None = None
    answers: Answers | None = None


@dataclass(frozen=True)
class Compare:
    metric: str
    dataset: str | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Pipeline:
    stage: str
    project: str
    description: str
    steps: list[str]
    set: Mapping[str, Mapping[str, Any]]
    matrix: Mapping[str, Mapping[str, Mapping[str, Any]]]
    compare: Compare | None = None


STAGE_TYPES: Mapping[str, type[Any]] = {
    "tokenizer": Tokenizer,
    "pretrain": Pretrain,
    "sft": Sft,
    "evaluate": Evaluate,
    "pipeline": Pipeline,
}
