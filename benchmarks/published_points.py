"""Published trainings as data: benchmarks/published_points.yaml, read and checked.

A point says what ran (`model`, `run`, `lora`, `batch`), where (`hardware`: cards of each of `machines` machines), and what its source reports:
`tokens_per_second` of one card (`is_lower_bound`: the time has more in it than steps), and `memory`, the peak on a card in bytes. `memory.of` is `allocated` (PyTorch's tensors), `reserved`
(with what its allocator holds) or `device` (all that the driver counts). `execution` is `eager`, `fused` (hand-written kernels for some operators)
or `compiled` (torch.compile); what is fused by other kernels than Liger's counts as compiled layers. `run.weights` and `run.adapters` say what these are stored in, where it is not as the precision says and not as PEFT
makes them (in float32). `batch.sequences` are those of a card at once, `accumulation` the batches of an optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.errors import Problem, RecipeError, did_you_mean, list_choices
from azrecipe.hardware import load_catalog
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.recipe.types import Lora
from azrecipe.recipe.yaml_tree import YamlNode, parse_yaml

SHIPPED_FILE = Path(__file__).resolve().parent / "published_points.yaml"
SECTIONS = ("sources", "models", "points")
NUMBER, TEXT = (int, float), (str,)
# Key: the allowed types of its value, or the allowed words. A key that ends with "?" may be absent.
SOURCE = {"url": TEXT, "date": TEXT, "about": TEXT, "assumed": TEXT}
HARDWARE = {
    "card": TEXT,
    "cards": (int,),
    "machines?": (int,),
    "network_gbit_per_s?": NUMBER,
    "network?": ("efa", "infiniband", "roce", "ethernet"),
}
RUN = {
    "precision": ("bf16_pure", "bf16_mixed", "float32"),
    "strategy": ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"),
    "shards": (int,),
    "optimizer": TEXT,
    "attention": ("sdpa", "flash_attention_2", "eager"),
    "activation_checkpointing?": (bool,),
    "kernels?": (list,),
    "loss?": ("logits", "liger", "torch", "trl"),
    "weights?": ("bfloat16",),
    "adapters?": ("bfloat16",),
}
LORA = {"r": (int,), "alpha": NUMBER, "dropout": NUMBER, "target_modules": (list,)}
BATCH = {"sequences": (int,), "tokens": (int,), "accumulation": (int,)}
MEMORY = {"bytes": (int,), "of": ("allocated", "reserved", "device")}
POINT = {
    "name": TEXT,
    "source": TEXT,
    "hardware": HARDWARE,
    "model": TEXT,
    "method": ("full", "lora", "qlora"),
    "execution": ("eager", "fused", "compiled"),
    "run": RUN,
    "lora?": LORA,
    "batch": BATCH,
    "tokens_per_second?": NUMBER,
    "is_lower_bound?": (bool,),
    "memory?": MEMORY,
    "assumed?": TEXT,
    "beyond_plan?": TEXT,
}


@dataclass(frozen=True)
class PublishedPoint:
    """A published training; see the module for what the fields mean."""

    name: str
    source: str
    card: str
    cards: int
    machines: int
    network_gbit_per_s: float | None
    network_kind: str | None
    method: str
    execution: str
    step: StepSpec
    replicate_size: int
    length: int
    batch: int
    accumulation: int
    tokens_per_second: float | None
    is_lower_bound: bool
    memory_bytes: int | None
    memory_of: str | None
    beyond_plan: str | None

    @property
    def kind(self) -> str:
        return f"{self.method}, {self.execution}"


def read_points(path: Path = SHIPPED_FILE) -> list[PublishedPoint]:
    """Read a file of points. Raises RecipeError with every problem."""
    root = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    problems = list(_find_problems(root))
    if problems:
        raise RecipeError(problems)
    content = root.to_plain()
    return [_build_point(point, content["models"]) for point in content["points"]]


def read_sources(path: Path = SHIPPED_FILE) -> dict[str, dict[str, str]]:
    """Read the sources of a file of points, by name."""
    sources: dict[str, dict[str, str]] = parse_yaml(path.read_text(encoding="utf-8"), path.name).to_plain()["sources"]
    return sources


def _find_problems(root: YamlNode) -> Iterator[Problem]:
    if not isinstance(root.value, dict) or set(root.value) != set(SECTIONS):
        yield Problem(root.location, f"a file of points is a mapping with the keys {', '.join(SECTIONS)}")
        return
    sources, models, points = (root.value[name] for name in SECTIONS)
    if not isinstance(sources.value, dict) or not isinstance(models.value, dict) or not isinstance(points.value, list):
        yield Problem(root.location, "sources and models are mappings, points is a list")
        return
    for source in sources.value.values():
        yield from _check_mapping(source, SOURCE, "a source")
    names: set[Any] = set()
    for point in points.value:
        invalid = list(_check_mapping(point, POINT, "a point"))
        yield from invalid or _find_contradictions(point, point.to_plain(), sources.value, models.value)
        name = point.get("name")
        if name is not None and name.value in names:
            yield Problem(name.location, f"there is another point '{name.value}'")
        names.add(name.value if name is not None else None)


def _check_mapping(node: YamlNode, allowed: Mapping[str, Any], what: str) -> Iterator[Problem]:
    """Check a mapping's keys, and their values."""
    if not isinstance(node.value, dict):
        yield Problem(node.location, f"{what} is a mapping")
        return
    rules = {key.removesuffix("?"): rule for key, rule in allowed.items()}
    for key, value in node.value.items():
        if key not in rules:
            yield Problem(value.entry_location, f"unknown key '{key}'{did_you_mean(key, rules) or '.'} Allowed here: {list_choices(rules)}")
        else:
            yield from _check_value(value, rules[key], key)
    for key in allowed:
        if not key.endswith("?") and key not in node.value:
            yield Problem(node.entry_location, f"missing key '{key}' of {what}")


def _check_value(node: YamlNode, rule: Any, key: str) -> Iterator[Problem]:
    if isinstance(rule, dict):
        yield from _check_mapping(node, rule, key)
    elif isinstance(rule[0], str):
        if node.value not in rule:
            yield Problem(node.location, f"{key} is one of {list_choices(rule)}")
    elif not isinstance(node.value, rule) or (isinstance(node.value, bool) and bool not in rule):
        yield Problem(node.location, f"{key} has another type")
    elif isinstance(node.value, int | float) and not isinstance(node.value, bool) and node.value <= 0 and key != "dropout":
        yield Problem(node.location, f"{key} must be above 0")
    elif node.value in ("", []):
        yield Problem(node.location, f"{key} is empty")


def _find_contradictions(
    node: YamlNode, point: Mapping[str, Any], sources: Mapping[str, Any], models: Mapping[str, Any]
) -> Iterator[Problem]:
    """Find what no single value shows: unknown names, and keys that need or exclude each other."""
    for key, known in (("source", sources), ("model", models), ("card", load_catalog().cards)):
        value = point["hardware"]["card"] if key == "card" else point[key]
        if value not in known:
            yield Problem(node.location, f"there is no {key} '{value}'{did_you_mean(value, known) or '.'}")
    if "tokens_per_second" not in point and "memory" not in point:
        yield Problem(node.location, "a point has tokens_per_second or memory: what its source reports")
    if (point["method"] != "full") != ("lora" in point):
        yield Problem(node.location, "lora belongs to the methods lora and qlora")
    hardware, run = point["hardware"], point["run"]
    machines, world = hardware.get("machines", 1), hardware["cards"] * hardware.get("machines", 1)
    if (machines > 1) != ("network_gbit_per_s" in hardware):
        yield Problem(node.location, "several machines have network_gbit_per_s, and one has none")
    sharded = run["strategy"] in ("fsdp2", "hsdp", "zero3")
    if (run["shards"] > 1) != sharded or world % run["shards"] or (run["strategy"] == "fsdp2" and run["shards"] != world):
        yield Problem(node.location, f"shards: {run['shards']} does not go with strategy: {run['strategy']} on {world} cards")
    if (run["strategy"] == "single") != (world == 1):
        yield Problem(node.location, f"strategy: {run['strategy']} does not go with {world} cards")


def _build_point(point: Mapping[str, Any], models: Mapping[str, Any]) -> PublishedPoint:
    hardware, run, batch, memory = point["hardware"], point["run"], point["batch"], point.get("memory", {})
    machines = hardware.get("machines", 1)
    step = StepSpec(
        config=models[point["model"]],
        precision=run["precision"],
        lora=_build_lora(point["lora"]) if "lora" in point else None,
        quantized=point["method"] == "qlora",
        weights_dtype=run.get("weights"),
        adapter_dtype=run.get("adapters"),
        torch_compile=point["execution"] == "compiled" or (point["execution"] == "fused" and not run.get("kernels")),
        attn_implementation=run["attention"],
        kernels=tuple(run.get("kernels", ())),
        head=run.get("loss", "logits"),
        optim=run["optimizer"],
        activation_checkpointing=run.get("activation_checkpointing", False),
        accumulates=batch["accumulation"] > 1,
        strategy=run["strategy"],
        shards=run["shards"],
    )
    return PublishedPoint(
        name=point["name"],
        source=point["source"],
        card=hardware["card"],
        cards=hardware["cards"],
        machines=machines,
        network_gbit_per_s=hardware.get("network_gbit_per_s"),
        network_kind=hardware.get("network"),
        method=point["method"],
        execution=point["execution"],
        step=step,
        replicate_size=hardware["cards"] * machines // run["shards"] if run["strategy"] == "hsdp" else 1,
        length=batch["tokens"],
        batch=batch["sequences"],
        accumulation=batch["accumulation"],
        tokens_per_second=point.get("tokens_per_second"),
        is_lower_bound=point.get("is_lower_bound", False),
        memory_bytes=memory.get("bytes"),
        memory_of=memory.get("of"),
        beyond_plan=point.get("beyond_plan"),
    )


def _build_lora(values: Mapping[str, Any]) -> Lora:
    return Lora(
        r=values["r"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        target_modules=list(values["target_modules"]),
        use_rslora=False,
        use_dora=False,
        modules_to_save=[],
        train_new_tokens=False,
    )
