"""The estimate of a recipe on machines, as `azrecipe plan --json` writes it."""

from __future__ import annotations

from typing import TypedDict


class Bounds(TypedDict):
    """A value with its bounds."""

    low: float
    middle: float
    high: float


class CardSummary(TypedDict):
    """A card, its memory in bytes, and where that number comes from."""

    name: str
    bytes: int
    source: str


class ListPrice(TypedDict):
    """The price of all machines together, and its region and day."""

    usd_per_hour: float
    region: str
    as_of: str
    source: str


class Prices(TypedDict):
    """Prices by kind; None where none is known."""

    on_demand: ListPrice | None
    spot: ListPrice | None


class Costs(TypedDict):
    """USD by kind of price; None where hours or price are not known."""

    on_demand: Bounds | None
    spot: Bounds | None


class ModelParameters(TypedDict):
    """Parameters of a model; embeddings includes the head."""

    total: int
    trainable: int
    embeddings: int


class MemoryEstimate(TypedDict):
    """Bytes on a card: of tensors, and bounds with all around them.

    measuring, measuring_most: while held-out text is measured; None where that is not planned.
    """

    parts: dict[str, int]
    peak: int
    least: int
    most: int
    measuring: int | None
    measuring_most: int | None


class BatchLimits(TypedDict):
    """The largest batch that certainly fits, and that perhaps does."""

    surely: int
    perhaps: int


class LoopEstimate(TypedDict):
    """The estimate of one training loop.

    steps, tokens, hours and cost are None where the amount of data is not known.
    """

    name: str
    parameters: ModelParameters
    max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    memory: MemoryEstimate
    verdict: str  # fits, may fit, does not fit: of steps and measurements; a card that a run refuses does not fit
    largest_batch: BatchLimits
    fitting_batch: int  # the largest that certainly fits and divides the global batch; 0: none
    fitting_eval_batch: int | None  # the recipe's for measurements, or a half that certainly fits; 0: none; None: nothing is measured
    flops_per_token: float
    step_seconds: Bounds
    seconds_by: dict[str, float]
    bound: str  # what a step waits for: compute, links, network
    tokens_per_second: Bounds
    tokens_per_second_per_card: Bounds
    hours_without_efa: float | None
    rests_on: str
    card_is_known: bool  # whether a published run on such a card is known
    steps: int | None
    tokens: int | None
    epochs: dict[str, float]
    hours: Bounds | None
    cost: Costs


class AlternativeEstimate(TypedDict):
    """What one change of the recipe or the launch would do."""

    change: str
    how: str  # the command-line options
    peak: int
    difference: int
    verdict: str
    largest_batch: BatchLimits
    best_batch: int
    tokens_per_second: Bounds | None
    faster: float | None


class Alternatives(TypedDict):
    """The changes, best first, and the loop that they are about."""

    of: str
    changes: list[AlternativeEstimate]


class RecipeEstimate(TypedDict):
    """The estimate of a recipe on machines."""

    decision: str  # the answer in one sentence
    recipe: str
    stage: str
    hardware: str
    backend: str
    processes: int
    card: CardSummary
    price: Prices
    vocab_size: int
    refusal: str  # why a run refuses these cards; "" where it does not
    loops: list[LoopEstimate]
    hours: Bounds | None
    levers: Alternatives
    notes: list[str]
