"""Hardware is found by the names that people use; its figures have sources; a file of one's own is laid over ours and checked."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from azrecipe import hardware
from azrecipe.errors import CommandError, RecipeError
from azrecipe.hardware import Card, Link, Machine, Network, Price, build_machine_of_device, find_machine
from azrecipe.recipe import schema
from tests.conftest import ROOT, write

SHIPPED = ROOT / "hardware" / "hardware.yaml"


@pytest.mark.parametrize(
    ("text", "card", "count"),
    [
        ("p5.48xlarge", "h100-80g", 8),
        ("P4D.24xlarge", "a100-40g", 8),
        ("ml.p4de.24xlarge", "a100-80g", 8),
        ("p6-b200.48xlarge", "b200", 8),
        ("g5.12xlarge", "a10g", 4),
        ("g6e.xlarge", "l40s", 1),
        ("h100-80g x8", "h100-80g", 8),
        ("8x h100", "h100-80g", 8),
        ("8 H100", "h100-80g", 8),
        ("8×h200", "h200", 8),
        ("A100-40G x 8", "a100-40g", 8),
        ("a100 80gb x4", "a100-80g", 4),
        ("rtx 4090", "rtx-4090", 1),
        ("RTX4090 x2", "rtx-4090", 2),
        ("rtx4090x2", "rtx-4090", 2),
        ("2x4090", "rtx-4090", 2),
        ("3090 x2", "rtx-3090", 2),
        ("NVIDIA H100 80GB HBM3", "h100-80g", 1),
        ("NVIDIA A100 80GB PCIe x2", "a100-80g-pcie", 2),
        ("NVIDIA GeForce RTX 3090", "rtx-3090", 1),
        ("L4", "l4", 1),
        ("A10", "a10", 1),
        ("mi300x x8", "mi300x", 8),
        ("Standard_ND96isr_H100_v5", "h100-80g", 8),
        ("8x_H100-SXM_SECURE", "h100-80g", 8),
        ("BM.GPU.MI355X.8", "mi355x", 8),
        ("a3-ultragpu-8g", "h200", 8),
        ("lumi-g", "mi250x-gcd", 8),
    ],
)
def test_a_machine_is_found_by_the_names_that_people_use(text: str, card: str, count: int) -> None:
    machine = find_machine(text)
    assert (machine.card.name, machine.count) == (card, count)
    assert machine.link.gb_per_s > 0


def test_every_name_that_ships_finds_its_own() -> None:
    known = hardware.load_catalog()
    for name in known.machines:
        assert find_machine(name).name == name
        assert find_machine(f"ml.{name}").name == f"ml.{name}"
    for card in known.cards.values():
        for name in (card.name, *card.aliases):
            assert find_machine(f"{name} x2") == Machine(f"{card.name} x2", card, 2, card.bridge or card.link)


def test_a_bridge_joins_as_many_cards_as_it_has_places() -> None:
    two, four, eight = (find_machine(f"h200-nvl x{count}").link for count in (2, 4, 8))
    assert two == four == Link("nvlink", 450, 4)
    assert eight == Link("pcie", 64)
    assert find_machine("h100-nvl x4").link == Link("pcie", 64)


def test_what_a_card_computes_in_is_said() -> None:
    known = hardware.load_catalog().cards
    without = {name for name, card in known.items() if not card.bf16}
    assert without == {"t4", "v100-16g", "v100-32g"}
    assert all(known[name].fp16_tflops and known[name].bf16_tflops == known[name].fp32_tflops for name in without)
    assert all(card.capability for card in known.values())
    assert {card.link.kind for card in known.values() if (card.capability or "").startswith("gfx")} == {"infinity_fabric"}


def test_a_network_says_what_it_is() -> None:
    known = hardware.load_catalog().machines.values()
    networks = [machine.network for machine in known if machine.network]
    assert {network.kind for network in networks} == {"efa", "infiniband", "roce", "slingshot", "ethernet"}
    assert all((network.kind == "efa") == bool(network.efa_interfaces) for network in networks)
    assert all(network.gpudirect_rdma for network in networks if network.kind in ("infiniband", "roce", "slingshot"))
    assert {machine.provider for machine in known} == {"aws", "gcp", "azure", "lambda", "coreweave", "nebius", "runpod", "oci", "eurohpc"}
    assert all((machine.billed_in == "node_hours") == (machine.provider == "eurohpc") for machine in known)


def test_sagemaker_has_a_price_of_its_own_or_none() -> None:
    rented, managed = find_machine("p5.48xlarge"), find_machine("ml.p5.48xlarge")
    assert rented.price and managed.price
    assert managed.price.usd_per_hour > rented.price.usd_per_hour
    assert replace(managed, name=rented.name, price=rented.price, spot=rented.spot) == rented
    assert find_machine("ml.p6-b200.48xlarge").price is None, "EC2's price is not taken for SageMaker's"


def test_a_price_is_replaced_in_one_step() -> None:
    assert replace(find_machine("h100 x8"), price=Price(20.0)).price == Price(20.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("p5.42xlarge", "did you mean p5.4xlarge or p5.48xlarge or p5e.48xlarge?"),
        ("h1000", "did you mean h100-"),
        ("rtx 4070 x2", "'rtx 4070 x2' is not known"),
        ("a100", "may mean several cards: a100-40g (40 GB), a100-80g (80 GB), "),
        ("a100 x8", "may mean several cards: a100-40g (40 GB), "),
        ("p5.48xlarge x2", "p5.48xlarge is a whole machine (8 × h100-80g); say how many of them with --nodes"),
        ("h100 x0", "one machine has 1 to 16 cards"),
        ("h100 x64", "one machine has 1 to 16 cards; say how many machines with --nodes"),
        ("", "'' is not known"),
        ("x8", "'x8' is not known"),
    ],
)
def test_a_name_that_is_unknown_or_unclear_is_refused_with_what_there_is(text: str, told: str) -> None:
    with pytest.raises(CommandError) as caught:
        find_machine(text)
    assert told in str(caught.value)
    if "not known" in told or "did you mean" in told:
        assert "g5.{xlarge,2xlarge," in str(caught.value) and "rtx-5090" in str(caught.value) and "--hardware-file" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80g-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10", "a10"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("NVIDIA A16", None),
    ],
)
def test_the_cards_of_this_machine_are_known_by_the_name_that_cuda_gives(device: str, card: str | None) -> None:
    memory = 50 * 2**30
    machine = build_machine_of_device(device, 4, memory)
    if card is None:
        assert machine is None
        return
    assert machine is not None
    assert (machine.card.name, machine.count, machine.card.total_memory_gib) == (card, 4, 50.0), "the memory that it has counts"


def test_the_file_that_ships_keeps_its_own_rules() -> None:
    hardware.load_catalog(SHIPPED)  # laid over itself, so checked as a user's file is


def test_every_figure_has_its_source_and_every_price_its_day() -> None:
    known = hardware.load_catalog()
    keys = set(re.findall(r"^  ([a-z0-9-]+): ", SHIPPED.read_text(encoding="utf-8").partition("cards:")[0], re.MULTILINE))
    for card in known.cards.values():
        assert card.source and card.memory_source and (card.devices or card.name == "h100-96g")
        assert not {card.source, card.memory_source} & keys, "a key stands for what it names"
        assert card.total_memory_gib * 2**30 < card.memory_gb * 1.08e9 and card.total_memory_gib > 0.9 * card.memory_gb
        assert card.fp32_tflops < (card.fp16_tflops or card.bf16_tflops)
    prices = [p for machine in known.machines.values() for p in (machine.price, machine.spot) if p] + list(known.sagemaker_prices.values())
    assert len(prices) > len(known.machines)
    assert all(p.region and p.source and p.as_of for p in prices)
    for machine in known.machines.values():
        assert machine.source and machine.provider
        if machine.provider == "aws":
            assert machine.network and machine.vcpus and machine.memory_gib and machine.local_disk_gb
        assert machine.spot is None or (machine.price and machine.spot.usd_per_hour < machine.price.usd_per_hour)
        assert machine.billed_in == "usd" or machine.price is None
    unpriced = [name for name, machine in known.machines.items() if machine.price is None and machine.billed_in == "usd"]
    assert [name for name in unpriced if known.machines[name].provider not in ("gcp", "azure")] == ["p5e.48xlarge"]


def test_the_schema_has_the_fields_of_the_dataclasses() -> None:
    def below(*path: str) -> set[str]:
        at: Any = schema.load_schema("hardware")
        for step in path:
            at = at[step]
        return set(at["properties"])

    def names(kind: Any) -> set[str]:
        return {f.name for f in fields(kind)}

    card, machine = ("properties", "cards", "additionalProperties"), ("properties", "machines", "additionalProperties")
    assert below(*card) == names(Card) - {"name"}
    assert below(*machine) - {"prices"} == names(Machine) - {"name", "price", "spot"}
    assert below(*card, "properties", "link") == below(*machine, "properties", "link") == names(Link)
    assert below(*card, "properties", "bridge") == names(Link)
    assert below(*machine, "properties", "network") == names(Network)
    assert below("$defs", "price") == names(Price)


@pytest.mark.usefixtures("project")
def test_a_file_of_ones_own_adds_machines_and_changes_prices() -> None:
    path = write(
        "mine.yaml",
        """\
sources: {shop: https://example.org/prices}
cards:
  my-gpu: {memory_gb: 64, total_memory_gib: 63.5, bf16_tflops: 300, tf32_tflops: 150, fp32_tflops: 20, memory_gb_per_s: 1600,
           link: {kind: pcie, gb_per_s: 32}, devices: [X64]}
  rtx-4090: {total_memory_gib: 47.5}
machines:
  my-box: {card: my-gpu, count: 2, network: {gbit_per_s: 25}}
  p5.48xlarge: {prices: {on_demand: 30, spot: {usd_per_hour: 12.5, source: shop}}}
  p4d.24xlarge: {prices: {on_demand: null}}
""",
    )
    box, p5, p4 = find_machine("my-box", path), find_machine("p5.48xlarge", path), find_machine("p4d.24xlarge", path)
    assert (box.card.memory_gb, box.count, box.network, box.price) == (64, 2, Network(25), None)
    assert find_machine("my gpu x8", path).count == 8
    assert p5.price == Price(30.0), "the old price's day is gone with it"
    assert p5.spot == Price(12.5, source="https://example.org/prices")
    assert p5.network == find_machine("p5.48xlarge").network
    assert find_machine("ml.p5.48xlarge", path) == find_machine("ml.p5.48xlarge")
    assert p4.price is None
    assert find_machine("rtx 4090", path).card == replace(find_machine("rtx 4090").card, total_memory_gib=47.5)


@pytest.mark.usefixtures("project")
def test_every_problem_of_a_file_of_ones_own_is_told_at_its_place() -> None:
    path = write(
        "mine.yaml",
        """\
machines:
  my box: {card: h200, count: 8}
  other: {card: h200, cont: 8}
  p5.48xlarge: {prices: {on_demand: free, spot: {usd_per_hour: -1, as_of: today}}, network: 400}
machine: {}
""",
    )
    with pytest.raises(RecipeError) as caught:
        find_machine("p5.48xlarge", path)
    text = str(caught.value)
    for expected in [
        "mine.yaml:2:3: 'my box' is no name to use here: ",
        "mine.yaml:3:3: machines.other: missing key 'count': How many cards it has",
        "mine.yaml:3:23: unknown key 'cont'; did you mean 'count'? Allowed here: ",
        'mine.yaml:4:37: machines.p5.48xlarge.prices.on_demand must be a number or a mapping, not text ("free")',
        "mine.yaml:4:64: machines.p5.48xlarge.prices.spot.usd_per_hour = -1 is too small: it must be above 0",
        'mine.yaml:4:75: machines.p5.48xlarge.prices.spot.as_of = "today" must be a day, as in 2026-01-31',
        "mine.yaml:4:93: machines.p5.48xlarge.network must be a mapping, not a whole number (400)",
        "mine.yaml:5:1: unknown key 'machine'; did you mean 'machines'? Allowed here: ",
    ]:
        assert expected in text, f"{expected}\n{text}"
    places = [(p.location.line, p.location.column) for p in caught.value.problems]
    assert places == sorted(places)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "machines: {a: {card: h2000, count: 1}}",
            "mine.yaml:1:22: machines.a.card: there is no card 'h2000'; did you mean 'h200'? Cards: ",
        ),
        ("machines: {H100: {card: h200, count: 1}}", "mine.yaml:1:12: the name 'H100' is taken: "),
        ("- p5", "mine.yaml:1:1: a hardware file is a mapping with the keys machines, cards, sources"),
        ("", "mine.yaml:1:1: a hardware file is a mapping"),
        ("machines: {a: 1, a: 2}", "mine.yaml:1:18: duplicate key 'a'"),
        ("machines: [", "mine.yaml:1:12: the text ends inside a list"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text: str, told: str) -> None:
    path = write("mine.yaml", text)
    with pytest.raises(RecipeError) as caught:
        find_machine("p5.48xlarge", path)
    assert told in str(caught.value)


@pytest.mark.usefixtures("project")
def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(CommandError, match=r"--hardware-file nowhere\.yaml: No such file"):
        find_machine("p5.48xlarge", Path("nowhere.yaml"))
