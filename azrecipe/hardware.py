"""Knows the cards and machines that a run can be planned for, by the names that people give them.

hardware/hardware.yaml holds them, each figure with its source; a file of the same form (--hardware-file) is laid over it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, Place, Problem, RecipeError, allowed, did_you_mean
from azrecipe.recipe import schema
from azrecipe.recipe.compose import shown
from azrecipe.recipe.yaml_tree import Node, decode, parse
from azrecipe.utils import shipped_files

MAX_COUNT = 16  # cards of one machine, where only a card is named
GIB = 2**30
# Words in a device's name that make it another chip than the one whose name it holds: a part of one, or a sibling.
OTHERS = frozenset({"LAPTOP", "MIG", "TI", "SUPER", "D"})
_MAKER = re.compile(r"\b(nvidia|geforce|tesla)\b")
_TIMES = r"[x×*]"
_COUNT_FIRST = re.compile(rf"(?P<count>\d{{1,3}})\s*{_TIMES}?\s+(?P<card>.*)|(?P<count2>\d{{1,3}}){_TIMES}(?P<card2>.*)")
_COUNT_LAST = re.compile(rf"(?P<card>.*?)(?<![rg]t)\s*{_TIMES}\s*(?P<count>\d+)")


@dataclass(frozen=True)
class Link:
    """What joins the cards of one machine: `nvlink` or `pcie`, and GB/s that one card can send, in one direction, at most."""

    kind: str
    gb_per_s: float


@dataclass(frozen=True)
class Network:
    """What joins machines: Gbit/s of a whole machine in one direction, at most, and how cards reach it."""

    gbit_per_s: float
    efa_interfaces: int = 0
    gpudirect_rdma: bool = False


@dataclass(frozen=True)
class Price:
    """USD for an hour of the whole machine; where, when and by whom, as far as that is known."""

    usd_per_hour: float
    region: str | None = None
    as_of: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Card:
    """A GPU. Peaks are of dense matrices in TFLOP/s; `total_memory_gib` is what PyTorch reports, `memory_gb` what is sold."""

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
    source: str | None = None
    memory_source: str | None = None


@dataclass(frozen=True)
class Machine:
    """Some cards of one kind, and what is around them; None is what is not known.

    `price` is the list price on demand, of SageMaker where the name began with `ml.`; `dataclasses.replace` puts in another.
    """

    name: str
    card: Card
    count: int
    link: Link
    network: Network | None = None
    vcpus: int | None = None
    memory_gib: float | None = None
    local_disk_gb: float | None = None
    price: Price | None = None
    spot: Price | None = None
    source: str | None = None


@dataclass(frozen=True)
class Known:
    """Everything that has a name: cards and machines by theirs, and SageMaker's price of a machine where it is known."""

    cards: Mapping[str, Card]
    machines: Mapping[str, Machine]
    sagemaker: Mapping[str, Price]


def find(text: str, own: Path | None = None) -> Machine:
    """The machine that a user names: `p5.48xlarge`, `ml.p5.48xlarge`, `h100-80g x8`, `8x h100`, `RTX 4090`, a machine of `own`.

    Raises CommandError for a name that is unknown or means several cards, RecipeError with all that is wrong in `own`.
    """
    known = load(own)
    wanted = " ".join(text.split())
    machine = _machine(wanted, known)
    if machine is not None:
        return machine
    names = _names(known.cards)
    card, count = names.get(_plain(wanted)), 1
    if card is None:
        bare, count = _counted(wanted)
        card = names.get(_plain(bare))
        if card is None:
            raise _unknown(text, bare, known)
    if not 1 <= count <= MAX_COUNT:
        raise CommandError(f"--hardware '{text}': one machine has 1 to {MAX_COUNT} cards; say how many machines with --nodes")
    return _of_card(card, count)


def of_instance(name: str) -> Machine | None:
    """The machine of an instance type of SageMaker's, ml.p4d.24xlarge; None for one that is not listed, as those without GPUs are."""
    return load().machines.get(name.removeprefix("ml."))


def of_device(name: str, count: int, total_memory: int) -> Machine | None:
    """The cards that this machine has, as torch.cuda names them; None for a name that is not known.

    `total_memory` is one card's memory in bytes, from torch.cuda.get_device_properties(): it counts instead of the listed one.
    """
    card = card_of(name)
    return None if card is None else _of_card(replace(card, total_memory_gib=total_memory / GIB), count)


def card_of(device: str) -> Card | None:
    """The card whose device name stands, word for word, in what torch.cuda.get_device_name() gives; the longest such name."""
    words = _words(device)
    if OTHERS & set(words.split()):
        return None
    cards = load().cards.values()
    fitting = [(len(_words(listed)), card) for card in cards for listed in card.devices if _words(listed) in words]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def load(own: Path | None = None) -> Known:
    """What ships, with a file of the user's own laid over it. Raises RecipeError with every problem of that file."""
    return _shipped() if own is None else _read(_over(shipped("hardware.yaml"), _own(own)))


@cache
def _shipped() -> Known:
    return _build(shipped("hardware.yaml").plain())  # a test checks the file; no process needs to do it again


@cache
def shipped(name: str) -> Node:
    """A file of the folder hardware/, read once."""
    file = shipped_files.root() / "hardware" / name
    return parse(file.read_text(encoding="utf-8"), shown(file))


def _own(path: Path) -> Node:
    file = shown(path)
    try:
        root = parse(decode(path.read_bytes(), file), file)
    except OSError as error:
        raise CommandError(f"--hardware-file {file}: {error.strerror}") from None
    if not isinstance(root.value, dict):
        raise RecipeError([Problem(root.place, "a hardware file is a mapping with the keys machines, cards, sources")])
    return root


def _over(below: Node, above: Node, depth: int = 0) -> Node:
    """One file laid over another: sections, the things in them and a machine's prices merge, all else replaces, null removes."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    entries = dict(below.value)
    for key, node in above.value.items():
        if node.value is None:
            entries.pop(key, None)
        elif key in entries and (depth < 2 or key == "prices"):
            entries[key] = _over(entries[key], node, depth + 1)
        else:
            entries[key] = node
    return replace(above, value=entries)


def _read(root: Node) -> Known:
    problems = schema.check(root, "hardware")
    problems = problems or [*_strangers(root), *_clashes(root)]
    if problems:
        raise RecipeError(sorted(set(problems), key=lambda p: (p.place.file, p.place.line, p.place.column)))
    return _build(root.plain())


def _entries(root: Node, section: str) -> dict[str, Node]:
    found = root.get(section)
    return found.value if found is not None and isinstance(found.value, dict) else {}


def _strangers(root: Node) -> Iterator[Problem]:
    """Machines whose card is not there."""
    cards = _entries(root, "cards")
    for name, machine in _entries(root, "machines").items():
        card = machine.get("card")
        if card is not None and card.value not in cards:
            near = did_you_mean(str(card.value), cards) or "."
            yield Problem(card.place, f"machines.{name}.card: there is no card '{card.value}'{near} Cards: {allowed(cards)}")


def _clashes(root: Node) -> Iterator[Problem]:
    """Names that mean two things."""
    seen: dict[str, Place] = {}
    for section in ("cards", "machines"):
        for name, entry in _entries(root, section).items():
            aliases = entry.get("aliases")
            listed = aliases.value if aliases is not None and isinstance(aliases.value, list) else []
            for text, at in [(name, entry.at), *((str(alias.value), alias.place) for alias in listed)]:
                if _plain(text) in seen:
                    yield Problem(at, f"the name '{text}' is taken: {seen[_plain(text)]}")
                seen.setdefault(_plain(text), at)


def _build(data: Mapping[str, Any]) -> Known:
    sources = data.get("sources", {})
    cards = {name: _card(name, values, sources) for name, values in data.get("cards", {}).items()}
    machines, sagemaker = {}, {}
    for name, values in data.get("machines", {}).items():
        prices = {kind: _price(value, sources) for kind, value in values.get("prices", {}).items()}
        card = cards[values["card"]]
        machines[name] = Machine(
            name,
            card,
            values["count"],
            Link(**values["link"]) if "link" in values else card.link,
            Network(**values["network"]) if "network" in values else None,
            **{key: values.get(key) for key in ("vcpus", "memory_gib", "local_disk_gb")},
            price=prices.get("on_demand"),
            spot=prices.get("spot"),
            source=_source(values, sources),
        )
        if "sagemaker" in prices:
            sagemaker[name] = prices["sagemaker"]
    return Known(cards, machines, sagemaker)


def _card(name: str, values: Mapping[str, Any], sources: Mapping[str, str]) -> Card:
    own = {
        "link": Link(**values["link"]),
        "aliases": tuple(values.get("aliases", ())),
        "devices": tuple(values.get("devices", ())),
        "source": _source(values, sources),
        "memory_source": _source(values, sources, "memory_source") or _source(values, sources),
    }
    return Card(name, **{**values, **own})


def _price(value: Any, sources: Mapping[str, str]) -> Price:
    if not isinstance(value, Mapping):
        return Price(float(value))
    return Price(**{**value, "source": _source(value, sources)})


def _source(values: Mapping[str, Any], sources: Mapping[str, str], key: str = "source") -> str | None:
    given = values.get(key)
    return None if given is None else sources.get(given, given)


def _plain(name: str) -> str:
    """A name without case, spaces, dashes and the maker's: `NVIDIA GeForce RTX 4090` and `rtx-4090` are one."""
    return re.sub(r"[^a-z0-9.]+", "", _MAKER.sub("", name.casefold()))


def _words(device: str) -> str:
    return f" {device.replace('-', ' ')} ".upper()


def _names(cards: Mapping[str, Card]) -> dict[str, Card]:
    """Every name of every card. A device's name that begins several cards' names (A100) is none: it would hide their memory."""
    names = {_plain(name): card for card in cards.values() for name in (card.name, *card.aliases)}
    for card in cards.values():
        for device in map(_plain, card.devices):
            if len(_beginning(device, cards)) < 2:
                names.setdefault(device, card)
    return names


def _beginning(name: str, cards: Mapping[str, Card]) -> list[Card]:
    return [card for card in cards.values() if _plain(card.name).startswith(name)] if name else []


def _machine(wanted: str, known: Known) -> Machine | None:
    """A machine by its own name, or by SageMaker's, which has a price of its own."""
    names = {_plain(name): name for name in known.machines}
    if (name := names.get(_plain(wanted))) is not None:
        return known.machines[name]
    if wanted.casefold().startswith("ml.") and (name := names.get(_plain(wanted[3:]))) is not None:
        return replace(known.machines[name], name=f"ml.{name}", price=known.sagemaker.get(name), spot=None)
    return None


def _counted(wanted: str) -> tuple[str, int]:
    """A name and how many: `8x h100`, `8 h100`, `h100 x8`, `h100x8`, `h100 × 8`; 1 where it does not say."""
    lower = wanted.casefold()
    if first := _COUNT_FIRST.fullmatch(lower):
        return first["card"] or first["card2"] or "", int(first["count"] or first["count2"])
    if last := _COUNT_LAST.fullmatch(lower):
        return last["card"], int(last["count"])
    return wanted, 1


def _of_card(card: Card, count: int) -> Machine:
    return Machine(f"{card.name} x{count}", card, count, card.link)


def _unknown(text: str, bare: str, known: Known) -> CommandError:
    """What to say of a name that is not known as it stands."""
    whole = _machine(bare, known)
    if whole is not None:
        cards = f"{whole.count} × {whole.card.name}"
        return CommandError(f"--hardware '{text}': {whole.name} is a whole machine ({cards}); say how many of them with --nodes")
    several = _beginning(_plain(bare), known.cards)
    if len(several) > 1:
        meant = ", ".join(f"{card.name} ({card.memory_gb:g} GB)" for card in several)
        return CommandError(f"--hardware '{text}' may mean several cards: {meant}. Say which")
    near = difflib.get_close_matches(bare.casefold().replace(" ", "-"), [*known.machines, *known.cards])
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return CommandError(
        f"--hardware '{text}' is not known{meant}\n"
        f"  machines: {_grouped(known.machines)} (with ml. before the name: SageMaker's price)\n"
        f"  cards, and how many ('h100-80g x8'): {', '.join(known.cards)}\n"
        "  anything else: describe it in a file of your own and give it with --hardware-file"
    )


def _grouped(names: Mapping[str, Machine]) -> str:
    """`g5.{xlarge,2xlarge}` for machines of one family."""
    families: dict[str, list[str]] = {}
    for name in names:
        family, dot, size = name.partition(".")
        families.setdefault(family + dot, []).append(size)
    return ", ".join(f"{family}{sizes[0]}" if len(sizes) == 1 else f"{family}{{{','.join(sizes)}}}" for family, sizes in families.items())
