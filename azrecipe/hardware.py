"""The GPUs and machines that a run can be planned for.

hardware/hardware.yaml lists them, each figure with its source. A user's file of the same form (--hardware-file) overrides it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, Problem, RecipeError, SourceLocation, did_you_mean, list_choices
from azrecipe.recipe import schema
from azrecipe.recipe.compose import display_path
from azrecipe.recipe.null_keys import check_null_keys, find_null_keys
from azrecipe.recipe.yaml_tree import YamlNode, decode_utf8, parse_yaml
from azrecipe.utils import shipped_files

MAX_CARDS_PER_MACHINE = 16  # cards of one machine, where only a card is named
GIB = 2**30
# With such a word, a device is another chip than the one that the rest of its name says: a slice of it, or a variant.
VARIANT_WORDS = frozenset({"LAPTOP", "MIG", "TI", "SUPER", "D", "MAX"})
_MAKER = re.compile(r"\b(nvidia|geforce|tesla)\b")
_TIMES = r"[x×*]"
_COUNT_FIRST = re.compile(rf"(?P<count>\d{{1,3}})\s*{_TIMES}?\s+(?P<card>.*)|(?P<count2>\d{{1,3}}){_TIMES}(?P<card2>.*)")
_COUNT_LAST = re.compile(rf"(?P<card>.*?)(?<![rg]t)\s*{_TIMES}\s*(?P<count>\d+)")


@dataclass(frozen=True)
class Link:
    """The link between the cards of one machine.

    gb_per_s: what one card can send at most, in one direction. cards: how many it joins at most; None: all of a machine.
    """

    kind: str  # nvlink, pcie, infinity_fabric
    gb_per_s: float
    cards: int | None = None


@dataclass(frozen=True)
class Network:
    """The network between machines.

    gbit_per_s: what a whole machine can send at most, in one direction.
    """

    gbit_per_s: float
    efa_interfaces: int = 0
    gpudirect_rdma: bool = False
    kind: str | None = None  # efa, infiniband, roce, slingshot, ethernet


@dataclass(frozen=True)
class Price:
    """The price of a whole machine for an hour."""

    usd_per_hour: float
    region: str | None = None
    as_of: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Card:
    """A GPU.

    Peaks are those of dense matrices. total_memory_gib: what PyTorch reports. memory_gb: what the seller says.
    bridge: joins a few cards; more talk over link. bf16: whether it has units for bfloat16. fp16_tflops: None: as bf16_tflops.
    """

    name: str
    memory_gb: float
    total_memory_gib: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    link: Link
    aliases: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    capability: str | None = None
    bf16: bool = True
    fp16_tflops: float | None = None
    bridge: Link | None = None
    source: str | None = None
    memory_source: str | None = None


@dataclass(frozen=True)
class Machine:
    """A machine: cards of one kind, its network, its prices.

    None stands for an unknown value. price: the list price on demand; SageMaker's where the name begins with `ml.`.
    billed_in: `usd`, or `node_hours` where hours are allotted.
    """

    name: str
    card: Card
    count: int
    link: Link
    provider: str | None = None
    billed_in: str = "usd"
    network: Network | None = None
    vcpus: int | None = None
    memory_gib: float | None = None
    local_disk_gb: float | None = None
    price: Price | None = None
    spot: Price | None = None
    source: str | None = None


@dataclass(frozen=True)
class HardwareCatalog:
    """All cards and machines by name, and SageMaker's prices."""

    cards: Mapping[str, Card]
    machines: Mapping[str, Machine]
    sagemaker_prices: Mapping[str, Price]


def find_machine(text: str, user_file: Path | None = None) -> Machine:
    """Find the machine that a user names.

    Examples: `p5.48xlarge`, `ml.p5.48xlarge`, `h100-80g x8`, `8x h100`, `RTX 4090`, or a machine of the user's file.

    Raises:
        CommandError: The name is unknown or fits several cards.
        RecipeError: The user's file has problems; it lists all of them.
    """
    catalog = load_catalog(user_file)
    name = " ".join(text.split())
    machine = _match_machine(name, catalog)
    if machine is not None:
        return machine
    cards = _index_cards(catalog.cards)
    card, count = cards.get(_normalize(name)), 1
    if card is None:
        card_name, count = _split_count(name)
        card = cards.get(_normalize(card_name))
        if card is None:
            raise _unknown_name_error(text, card_name, catalog)
    if not 1 <= count <= MAX_CARDS_PER_MACHINE:
        raise CommandError(f"--hardware '{text}': one machine has 1 to {MAX_CARDS_PER_MACHINE} cards; say how many machines with --nodes")
    return _build_machine(card, count)


def find_instance_type(instance_type: str) -> Machine | None:
    """Find the machine of a SageMaker instance type; None for one without GPUs."""
    return load_catalog().machines.get(instance_type.removeprefix("ml."))


def build_machine_of_device(device: str, count: int, total_memory: int) -> Machine | None:
    """Build a machine from the device name that torch.cuda reports.

    total_memory: bytes of one card, from torch.cuda.get_device_properties(). It replaces the listed memory.
    Returns None for an unknown name.
    """
    card = find_card(device)
    return None if card is None else _build_machine(replace(card, total_memory_gib=total_memory / GIB), count)


def find_card(device: str) -> Card | None:
    """Find the card of a device name from torch.cuda.get_device_name().

    The card's listed name must be in it, word for word. Of several, the longest counts.
    """
    words = _pad_words(device)
    listed = [(_pad_words(name), card) for card in load_catalog().cards.values() for name in card.devices]
    variant = VARIANT_WORDS & set(words.split())
    matches = [(len(name), card) for name, card in listed if name in words and VARIANT_WORDS & set(name.split()) == variant]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def load_catalog(user_file: Path | None = None) -> HardwareCatalog:
    """Load the shipped catalog, overridden by a user's file.

    Raises RecipeError with every problem of that file.
    """
    if user_file is None:
        return _load_shipped_catalog()
    shipped, user_root = read_shipped_file("hardware.yaml"), _read_user_file(user_file)
    null_keys = find_null_keys(user_root, [((), shipped)])
    return _validate_catalog(_merge(shipped, user_root), list(check_null_keys(null_keys, schema.load_schema("hardware"))))


@cache
def _load_shipped_catalog() -> HardwareCatalog:
    return _build_catalog(read_shipped_file("hardware.yaml").to_plain())  # a test validates this file, so no process has to


@cache
def read_shipped_file(name: str) -> YamlNode:
    """Read a file of the folder hardware/, once."""
    file = shipped_files.locate_root() / "hardware" / name
    return parse_yaml(file.read_text(encoding="utf-8"), display_path(file))


def _read_user_file(path: Path) -> YamlNode:
    file = display_path(path)
    try:
        root = parse_yaml(decode_utf8(path.read_bytes(), file), file)
    except OSError as error:
        raise CommandError(f"--hardware-file {file}: {error.strerror}") from None
    if not isinstance(root.value, dict):
        raise RecipeError([Problem(root.location, "a hardware file is a mapping with the keys machines, cards, sources")])
    return root


def _merge(base: YamlNode, override: YamlNode, depth: int = 0) -> YamlNode:
    """Merge a file into another one.

    Sections, their entries and a machine's prices are merged. Other values are replaced. null removes a key.
    """
    if not isinstance(base.value, dict) or not isinstance(override.value, dict):
        return override
    entries = dict(base.value)
    for key, node in override.value.items():
        if node.value is None:
            entries.pop(key, None)
        else:
            merged = key in entries and (depth < 2 or key == "prices")
            entries[key] = _merge(entries[key], node, depth + 1) if merged else node
    return replace(override, value=entries)


def _validate_catalog(root: YamlNode, problems: list[Problem]) -> HardwareCatalog:
    problems = [*problems, *schema.check_schema(root, "hardware")]
    problems = problems or [*_find_unknown_cards(root), *_find_duplicate_names(root)]
    if problems:
        raise RecipeError(sorted(set(problems), key=lambda p: (p.location.file, p.location.line, p.location.column)))
    return _build_catalog(root.to_plain())


def _section_entries(root: YamlNode, section: str) -> dict[str, YamlNode]:
    node = root.get(section)
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _find_unknown_cards(root: YamlNode) -> Iterator[Problem]:
    """Find machines whose card is not listed."""
    cards = _section_entries(root, "cards")
    for name, machine in _section_entries(root, "machines").items():
        card = machine.get("card")
        if card is not None and card.value not in cards:
            suggestion = did_you_mean(str(card.value), cards) or "."
            yield Problem(card.location, f"machines.{name}.card: there is no card '{card.value}'{suggestion} Cards: {list_choices(cards)}")


def _find_duplicate_names(root: YamlNode) -> Iterator[Problem]:
    """Find names that stand for two entries."""
    locations: dict[str, SourceLocation] = {}
    for section in ("cards", "machines"):
        for name, entry in _section_entries(root, section).items():
            aliases = entry.get("aliases")
            listed = aliases.value if aliases is not None and isinstance(aliases.value, list) else []
            for text, location in [(name, entry.entry_location), *((str(alias.value), alias.location) for alias in listed)]:
                key = _normalize(text)
                if key in locations:
                    yield Problem(location, f"the name '{text}' is taken: {locations[key]}")
                locations.setdefault(key, location)


def _build_catalog(data: Mapping[str, Any]) -> HardwareCatalog:
    sources = data.get("sources", {})
    cards = {name: _build_card(name, values, sources) for name, values in data.get("cards", {}).items()}
    machines, sagemaker_prices = {}, {}
    for name, values in data.get("machines", {}).items():
        prices = {kind: _build_price(value, sources) for kind, value in values.get("prices", {}).items()}
        card = cards[values["card"]]
        machines[name] = Machine(
            name,
            card,
            values["count"],
            Link(**values["link"]) if "link" in values else card.link,
            values.get("provider"),
            values.get("billed_in", "usd"),
            Network(**values["network"]) if "network" in values else None,
            **{key: values.get(key) for key in ("vcpus", "memory_gib", "local_disk_gb")},
            price=prices.get("on_demand"),
            spot=prices.get("spot"),
            source=_get_source(values, sources),
        )
        if "sagemaker" in prices:
            sagemaker_prices[name] = prices["sagemaker"]
    return HardwareCatalog(cards, machines, sagemaker_prices)


def _build_card(name: str, values: Mapping[str, Any], sources: Mapping[str, str]) -> Card:
    links = {key: Link(**values[key]) for key in ("link", "bridge") if key in values}
    names = {key: tuple(values.get(key, ())) for key in ("aliases", "devices")}
    source = _get_source(values, sources)
    memory_source = _get_source(values, sources, "memory_source") or source
    return Card(name, **{**values, **links, **names, "source": source, "memory_source": memory_source})


def _build_price(value: Any, sources: Mapping[str, str]) -> Price:
    if not isinstance(value, Mapping):
        return Price(float(value))
    return Price(**{**value, "source": _get_source(value, sources)})


def _get_source(values: Mapping[str, Any], sources: Mapping[str, str], key: str = "source") -> str | None:
    source = values.get(key)
    return None if source is None else sources.get(source, source)


def _normalize(name: str) -> str:
    """Remove case, spaces, dashes and the maker from a name.

    `NVIDIA GeForce RTX 4090` and `rtx-4090` become the same.
    """
    return re.sub(r"[^a-z0-9.]+", "", _MAKER.sub("", name.casefold()))


def _pad_words(device: str) -> str:
    """Put spaces around the words of a device name, in upper case."""
    return f" {device.replace('-', ' ')} ".upper()


def _index_cards(cards: Mapping[str, Card]) -> dict[str, Card]:
    """Map every name of every card to the card.

    A device name that begins several cards' names (A100) is left out: it does not say which memory the card has.
    """
    names = {_normalize(name): card for card in cards.values() for name in (card.name, *card.aliases)}
    for card in cards.values():
        for device in map(_normalize, card.devices):
            if len(_find_by_prefix(device, cards)) < 2:
                names.setdefault(device, card)
    return names


def _find_by_prefix(prefix: str, cards: Mapping[str, Card]) -> list[Card]:
    return [card for card in cards.values() if _normalize(card.name).startswith(prefix)] if prefix else []


def _match_machine(text: str, catalog: HardwareCatalog) -> Machine | None:
    """Find a machine by its name, or by SageMaker's name for it."""
    names = {_normalize(name): name for name in catalog.machines}
    if (name := names.get(_normalize(text))) is not None:
        return catalog.machines[name]
    if text.casefold().startswith("ml.") and (name := names.get(_normalize(text[3:]))) is not None:
        return replace(catalog.machines[name], name=f"ml.{name}", price=catalog.sagemaker_prices.get(name), spot=None)
    return None


def _split_count(text: str) -> tuple[str, int]:
    """Split a card's name and the number of cards (default 1).

    Forms: `8x h100`, `8 h100`, `h100 x8`, `h100x8`, `h100 × 8`.
    """
    lower = text.casefold()
    if first := _COUNT_FIRST.fullmatch(lower):
        return first["card"] or first["card2"] or "", int(first["count"] or first["count2"])
    if last := _COUNT_LAST.fullmatch(lower):
        return last["card"], int(last["count"])
    return text, 1


def _build_machine(card: Card, count: int) -> Machine:
    bridged = card.bridge is not None and count <= (card.bridge.cards or count)
    return Machine(f"{card.name} x{count}", card, count, card.bridge if card.bridge and bridged else card.link)


def _unknown_name_error(text: str, card_name: str, catalog: HardwareCatalog) -> CommandError:
    """Explain why a name is not known, with suggestions."""
    machine = _match_machine(card_name, catalog)
    if machine is not None:
        cards = f"{machine.count} × {machine.card.name}"
        return CommandError(f"--hardware '{text}': {machine.name} is a whole machine ({cards}); say how many of them with --nodes")
    candidates = _find_by_prefix(_normalize(card_name), catalog.cards)
    if len(candidates) > 1:
        names = ", ".join(f"{card.name} ({card.memory_gb:g} GB)" for card in candidates)
        return CommandError(f"--hardware '{text}' may mean several cards: {names}. Say which")
    matches = difflib.get_close_matches(card_name.casefold().replace(" ", "-"), [*catalog.machines, *catalog.cards])
    suggestion = f"; did you mean {' or '.join(matches)}?" if matches else ""
    return CommandError(
        f"--hardware '{text}' is not known{suggestion}\n"
        f"  machines: {_group_by_family(catalog.machines)} (with ml. before the name: SageMaker's price)\n"
        f"  cards, and how many ('h100-80g x8'): {', '.join(catalog.cards)}\n"
        "  anything else: describe it in a file of your own and give it with --hardware-file"
    )


def _group_by_family(names: Mapping[str, Machine]) -> str:
    """Write machines of one family as `g5.{xlarge,2xlarge}`."""
    families: dict[str, list[str]] = {}
    for name in names:
        family, dot, size = name.partition(".")
        families.setdefault(family + dot, []).append(size)
    return ", ".join(f"{family}{sizes[0]}" if len(sizes) == 1 else f"{family}{{{','.join(sizes)}}}" for family, sizes in families.items())
