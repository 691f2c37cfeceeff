"""What each stage will make, and whether later recipes can use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from azrecipe.errors import Problem, RecipeError, list_choices, suggest_choices
from azrecipe.recipe.compose import compose_recipe
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import EvaluateConfig, HarnessTask, MergeConfig, ModelSource, PretrainConfig, SftConfig, TokenizerConfig
from azrecipe.recipe.yaml_tree import Key

MODEL, TOKENIZER, POSITION, CONVERSATIONS = "a model", "a tokenizer", "a position in its text", "held-out conversations"
# What a finished run of each stage leaves for other recipes
STAGE_OUTPUTS: Mapping[str, frozenset[str]] = {
    "tokenizer": frozenset({TOKENIZER}),
    "pretrain": frozenset({MODEL, TOKENIZER, POSITION}),
    "sft": frozenset({MODEL, TOKENIZER, CONVERSATIONS}),
    "merge": frozenset({MODEL, TOKENIZER}),
    "evaluate": frozenset(),
    "pipeline": frozenset(),
}


@dataclass(frozen=True)
class StageOutput:
    """What a recipe's run will leave for the recipes after it.

    Attributes:
        stage: The recipe's stage.
        config: The recipe; None where only the stage is known.
        base_model: The model that training started from: a hub id, a folder or a configuration. None: unknown, or no model.
        base_tokenizer: The tokenizer whose chat template it keeps. None: unknown, or trained anew.
        chat_template: A name or a file that an sft recipe sets; None: that of `base_tokenizer`.
        has_template: Whether its tokenizer has a chat template; None: the base tokenizer says.
        max_positions: The model's longest sequence, where a configuration says so [tokens].
    """

    stage: str
    config: Any = None
    base_model: ModelSource | None = None
    base_tokenizer: ModelSource | None = None
    chat_template: str | None = None
    has_template: bool | None = None
    max_positions: int | None = None


FindOutput = Callable[[str], StageOutput | None]


@dataclass(frozen=True)
class UpstreamReference:
    """A key of a recipe that takes the output of another one."""

    keys: tuple[Key, ...]
    file: str
    needs: str  # one of MODEL, TOKENIZER, POSITION, CONVERSATIONS


def list_references(recipe: Recipe) -> list[UpstreamReference]:
    """List what a recipe takes from other recipes."""
    config, references = recipe.config, []
    if isinstance(config, PretrainConfig | SftConfig) and config.model.output_of is not None:
        references.append(UpstreamReference(("model", "output_of"), config.model.output_of, MODEL))
    if isinstance(config, PretrainConfig | TokenizerConfig) and config.tokenizer.output_of is not None:
        references.append(UpstreamReference(("tokenizer", "output_of"), config.tokenizer.output_of, TOKENIZER))
    if isinstance(config, PretrainConfig) and config.data.continue_from is not None:
        references.append(UpstreamReference(("data", "continue_from"), config.data.continue_from, POSITION))
    if isinstance(config, EvaluateConfig | MergeConfig):
        for name, model in config.models.items():
            if model.output_of is not None:
                references.append(UpstreamReference(("models", name, "output_of"), model.output_of, MODEL))
    if isinstance(config, MergeConfig) and config.base is not None and config.base.output_of is not None:
        references.append(UpstreamReference(("base", "output_of"), config.base.output_of, MODEL))
    if isinstance(config, EvaluateConfig) and config.answers is not None:
        references.append(UpstreamReference(("answers", "output_of"), config.answers.output_of, CONVERSATIONS))
    return references


def describe_output(recipe: Recipe, find_output: FindOutput) -> StageOutput:
    """Describe what a recipe's run will leave.

    Args:
        recipe: The recipe.
        find_output: Returns the output of a recipe that this one refers to; None where it is unknown.
    """
    config = recipe.config
    output = StageOutput(recipe.stage, config)
    if isinstance(config, TokenizerConfig):
        return _take_template(output, config.tokenizer, find_output)
    if isinstance(config, MergeConfig):
        return _describe_merge(output, config, find_output)
    if not isinstance(config, PretrainConfig | SftConfig):
        return output
    if config.model.output_of is not None:
        upstream = find_output(config.model.output_of)
        base_model, max_positions = (upstream.base_model, upstream.max_positions) if upstream else (None, None)
    else:
        base_model, max_positions = config.model, _read_max_positions(config.model)
    output = replace(output, base_model=base_model, max_positions=max_positions)
    if isinstance(config, SftConfig):
        if config.chat_template == "keep":
            return _take_template(output, config.model, find_output)
        return replace(output, chat_template=config.chat_template, has_template=True)
    if config.tokenizer.family is not None:
        return replace(output, has_template=False)
    has_source = config.tokenizer.name_or_path is not None or config.tokenizer.output_of is not None
    return _take_template(output, config.tokenizer if has_source else config.model, find_output)


def _describe_merge(output: StageOutput, config: MergeConfig, find_output: FindOutput) -> StageOutput:
    """Describe a merged model.

    It has one model's vocabulary, and perhaps the template of another.
    """
    source = config.models[config.tokenizer_of or next(iter(config.models))]
    upstream = find_output(source.output_of) if source.output_of is not None else None
    base_model = source if source.output_of is None else upstream.base_model if upstream else None
    output = replace(output, base_model=base_model, max_positions=upstream.max_positions if upstream else None)
    output = _take_template(output, source, find_output)
    if config.special_tokens_from is None:
        return output
    template = _take_template(replace(output, has_template=None), config.models[config.special_tokens_from], find_output)
    return output if template.has_template is False else template


def _take_template(output: StageOutput, source: ModelSource, find_output: FindOutput) -> StageOutput:
    """Return the output with the chat template of a tokenizer that it takes."""
    if source.output_of is None:
        return replace(output, base_tokenizer=source)
    upstream = find_output(source.output_of)
    if upstream is None:
        return output
    return replace(output, base_tokenizer=upstream.base_tokenizer, chat_template=upstream.chat_template, has_template=upstream.has_template)


def _read_max_positions(model: Any) -> int | None:
    value = (getattr(model, "config", None) or {}).get("max_position_embeddings")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def describe_file(file: str) -> StageOutput | None:
    """Describe the output of a recipe that is no step: its stage only.

    Its run may have been made with other values. Returns None where the file cannot be read.
    """
    try:
        composed = compose_recipe(Path(file))
    except RecipeError:
        return None
    stage = composed.root.get("stage")
    is_known = stage is not None and not composed.is_fragment and stage.value in STAGE_OUTPUTS
    return StageOutput(str(stage.value)) if stage is not None and is_known else None


def check_references(recipe: Recipe, find_output: FindOutput, earlier: Sequence[Recipe] = ()) -> Iterator[Problem]:
    """Find what a recipe takes from others that they do not make.

    Args:
        recipe: The recipe.
        find_output: Returns the output of a recipe that this one refers to; None where it is unknown.
        earlier: The pipeline's recipes before this one, for advice.
    """
    for reference in list_references(recipe):
        if Path(reference.file).stem == recipe.name:
            yield Problem(recipe.locate(*reference.keys), f"{recipe.path.name} takes its own output: name a recipe that runs before it")
            continue
        output = find_output(reference.file)
        if output is None:
            continue
        name, location = Path(reference.file).name, recipe.locate(*reference.keys)
        if reference.needs not in STAGE_OUTPUTS[output.stage]:
            makers = dict.fromkeys(step.path.name for step in earlier if reference.needs in STAGE_OUTPUTS[step.stage])
            advice = suggest_choices(name, makers, "Earlier steps that do") if makers else _list_makers(reference.needs)
            yield Problem(
                location,
                f"{name} is {'an' if output.stage == 'evaluate' else 'a'} {output.stage} recipe, which leaves {_NOT_LEFT[reference.needs]}{advice}",
            )
            continue
        if reference.needs == CONVERSATIONS:
            yield from (Problem(location, message) for message in _check_conversations(name, output.config))
        if reference.needs == POSITION:
            yield from (Problem(location, message) for message in _check_same_text(name, recipe.config, output.config))
    yield from _check_use(recipe, find_output)


_NOT_LEFT = {
    MODEL: "no model",
    TOKENIZER: "no tokenizer",
    POSITION: "no position in its text to go on from",
    CONVERSATIONS: "no held-out conversations",
}


def _list_makers(needs: str) -> str:
    return f". Stages that do: {list_choices(stage for stage, outputs in STAGE_OUTPUTS.items() if needs in outputs)}"


def _check_conversations(name: str, config: SftConfig | None) -> Iterator[str]:
    if config is None:
        return
    if config.method != "sft":
        yield f"{name} trains on preferences (method: {config.method}): only method: sft holds out conversations"
    elif config.data.validation.held_out.fraction == 0:
        yield f"{name} holds out no conversation: raise its data.validation.held_out.fraction"


def _check_same_text(name: str, config: PretrainConfig, upstream: PretrainConfig | None) -> Iterator[str]:
    """Find differences with which the data cannot go on."""
    if upstream is None:
        return
    differences = []
    if len(config.data.datasets) != len(upstream.data.datasets):
        differences.append(f"data.datasets ({len(upstream.data.datasets)} there, {len(config.data.datasets)} here)")
    if config.seed != upstream.seed:
        differences.append(f"seed ({upstream.seed} there, {config.seed} here)")
    if differences:
        yield f"the data cannot go on from {name}: these differ: {', '.join(differences)}"


def _check_use(recipe: Recipe, find_output: FindOutput) -> Iterator[Problem]:
    """Check chat templates and lengths against the models of earlier steps."""
    config = recipe.config
    if isinstance(config, PretrainConfig | SftConfig):
        output = find_output(config.model.output_of) if config.model.output_of is not None else None
        limit = output.max_positions if output else _read_max_positions(config.model)
        if limit is not None and config.data.max_length > limit:
            message = f"data.max_length = {config.data.max_length:,} is more than the model's {limit:,} positions"
            yield Problem(recipe.locate("data", "max_length"), message)
        if isinstance(config, SftConfig) and config.chat_template == "keep" and output is not None and output.has_template is False:
            file = Path(str(config.model.output_of)).name
            message = (
                f"chat_template: keep needs a chat template, and the tokenizer of {file} will have none: name one, as chat_template: llama3"
            )
            yield Problem(recipe.tree.find_nearest(("chat_template",)).location, message)
    if isinstance(config, EvaluateConfig):
        yield from _check_task_templates(recipe, config, find_output)


def _check_task_templates(recipe: Recipe, config: EvaluateConfig, find_output: FindOutput) -> Iterator[Problem]:
    outputs = {name: find_output(model.output_of) for name, model in config.models.items() if model.output_of is not None}
    without_template = [name for name, output in outputs.items() if output is not None and output.has_template is False]
    for i, task in enumerate(config.tasks):
        if isinstance(task, HarnessTask) and task.apply_chat_template and without_template:
            message = f"apply_chat_template: models without a chat template: {', '.join(without_template)}"
            yield Problem(recipe.locate("tasks", i, "apply_chat_template"), message)


def check_steps(recipes: Iterable[Recipe]) -> Iterator[Problem]:
    """Check what each step of a pipeline takes from the steps before it.

    Args:
        recipes: The steps' recipes, in the order in which they run; each knows its cell.
    """
    earlier: list[Recipe] = []
    recipes = list(recipes)
    keys = [(recipe.cell.name if recipe.cell else None, recipe.name) for recipe in recipes]
    for i, (recipe, find_output) in enumerate(follow_steps(recipes)):
        for reference in list_references(recipe):
            stem = Path(reference.file).stem
            key, later = (recipe.find_cell(stem), stem), keys[i + 1 :]
            if key not in keys[:i] and (key in later or (recipe.cell is None and stem in (name for _, name in later))):
                message = f"{Path(reference.file).name} runs after {recipe.path.name}, which takes its output: move it before this step"
                yield Problem(recipe.locate(*reference.keys), message)
        yield from check_references(recipe, find_output, earlier)
        earlier.append(recipe)


def follow_steps(recipes: Iterable[Recipe]) -> Iterator[tuple[Recipe, FindOutput]]:
    """Yield each recipe with a function that finds the outputs before it."""
    outputs: dict[tuple[str | None, str], StageOutput] = {}
    for recipe in recipes:

        def find_output(file: str, recipe: Recipe = recipe) -> StageOutput | None:
            stem = Path(file).stem
            return outputs.get((recipe.find_cell(stem), stem)) or describe_file(file)

        yield recipe, find_output
        outputs[recipe.cell.name if recipe.cell else None, recipe.name] = describe_output(recipe, find_output)
