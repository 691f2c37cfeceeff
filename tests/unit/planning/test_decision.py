"""The first sentence of a plan."""

from __future__ import annotations

from typing import Any

from azrecipe.hardware import GIB
from azrecipe.planning.decision import describe_comparison, describe_decision


def answer(
    verdict: str = "fits", most: float = 30.0, hours: float | None = 10.0, price: float | None = 20.0, **changes: Any
) -> dict[str, Any]:
    memory = {"least": (most - 2) * GIB, "most": most * GIB, "measuring": None, "measuring_most": None}
    loop = {"name": "full", "verdict": verdict, "per_device_train_batch_size": 14, "fitting_batch": 7, "memory": memory}
    bounds = None if hours is None else {"low": hours * 0.9, "middle": hours, "high": hours * 1.2}
    prices = {"on_demand": None if price is None else {"usd_per_hour": price}, "spot": None}
    return {"hardware": "2 × p4d", "refusal": "", "card": {"bytes": 40 * GIB}, "loops": [loop], "hours": bounds, "price": prices, **changes}


def test_what_fits_is_said_with_what_is_left_and_costs() -> None:
    assert describe_decision(answer()) == "fits at 14 with 10.0 GiB to spare; 10.0 (9.0–12.0) h, 200 (180–240) USD on 2 × p4d"
    assert describe_decision(answer(price=None)) == "fits at 14 with 10.0 GiB to spare; 10.0 (9.0–12.0) h, no price known on 2 × p4d"
    assert describe_decision(answer(hours=None)) == "fits at 14 with 10.0 GiB to spare, on 2 × p4d"


def test_what_does_not_fit_has_no_hours() -> None:
    text = describe_decision(answer("does not fit", 45.0, hours=None))
    assert text == "does not fit at 14: it needs 43.0 to 45.0 of 40.0 GiB; 7 surely fits, on 2 × p4d"
    assert describe_decision(answer("may fit", 41.0)).startswith("may fit at 14: it needs 39.0 to 41.0 of 40.0 GiB; 7 surely fits; 10.0")


def test_the_loop_that_fits_worst_is_named() -> None:
    both = answer()
    both["loops"] = [*both["loops"], {**answer("may fit", 41.0)["loops"][0], "name": "second"}]
    assert "(second)" in describe_decision(both)


def test_a_comparison_names_the_cheapest_and_the_fastest() -> None:
    slow, fast = answer(hardware="slow", price=10.0), answer(hardware="fast", hours=4.0, price=60.0)
    unfit = answer("does not fit", 50.0, hours=None, hardware="small")
    text = describe_comparison([slow, fast, unfit])
    assert text == "cheapest that fits: slow, 100 (90–120) USD; fastest that fits: fast, 4.0 (3.6–4.8) h"
    near = answer(hardware="near", hours=5.0, price=24.0)
    assert "not surely cheaper than near" in describe_comparison([slow, near])
    assert describe_comparison([unfit]) == "fits surely on none of these machines"
