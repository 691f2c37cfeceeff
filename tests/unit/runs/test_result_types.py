"""The types of result.json and plan.json say what their schemas say."""

from __future__ import annotations

import json
from typing import Any, get_type_hints, is_typeddict

import pytest

from azrecipe.runs import result_types
from tests.conftest import ROOT
from tests.result_schemas import list_problems

RESULT: dict[str, Any] = json.loads((ROOT / "schema" / "result.json").read_text(encoding="utf-8"))
PLAN: dict[str, Any] = json.loads((ROOT / "schema" / "plan.json").read_text(encoding="utf-8"))
DEFINITIONS = RESULT["$defs"]
CANDIDATE_KINDS = {"asked_vocab_size", "pre_tokenizer", "asked_new_tokens", "added", "merges", "dropped_for_protection", "unused"}
TYPES = {
    "MetricEstimate": DEFINITIONS["estimate"],
    "ResamplingSettings": DEFINITIONS["resamples"],
    "ValidationSize": DEFINITIONS["validation_set"],
    "CandidateResult": DEFINITIONS["candidate"],
    "TokenizerResult": DEFINITIONS["tokenizer"],
    "PhaseResult": DEFINITIONS["phase"],
    "SourceResult": DEFINITIONS["source"],
    "MixResult": DEFINITIONS["pretrain"]["properties"]["data_end"]["properties"]["mixes"]["items"],
    "DataEnd": DEFINITIONS["pretrain"]["properties"]["data_end"],
    "PretrainResult": DEFINITIONS["pretrain"],
    "BeforeAndAfter": DEFINITIONS["before_and_after"],
    "SftTrainingResult": DEFINITIONS["sft"]["properties"]["training"],
    "SftResult": DEFINITIONS["sft"],
    "MergedModelSource": DEFINITIONS["merge"]["properties"]["models"]["additionalProperties"],
    "MergeResult": DEFINITIONS["merge"],
    "ModelResult": DEFINITIONS["model"],
    "EvaluateResult": DEFINITIONS["evaluate"],
    "RankedCell": DEFINITIONS["pipeline"]["properties"]["ranking"]["items"],
    "UnfinishedCell": DEFINITIONS["pipeline"]["properties"]["unfinished"]["items"],
    "ComparisonResult": DEFINITIONS["pipeline"],
    "PlannedLoopEstimate": PLAN["properties"]["loops"]["items"],
    "RunPlan": PLAN,
}


def test_every_type_has_its_schema() -> None:
    assert {name for name, value in vars(result_types).items() if is_typeddict(value)} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_type_has_the_keys_of_its_schema(name: str) -> None:
    # The annotations are texts, so that NotRequired is not known to the class itself.
    hints, schema = get_type_hints(getattr(result_types, name), include_extras=True), TYPES[name]
    assert set(hints) == set(schema["properties"]) - CANDIDATE_KINDS
    required = {key for key, hint in hints.items() if "NotRequired" not in str(hint)}
    assert required == set(schema["required"])


def test_a_wrong_result_is_noticed() -> None:
    result = {
        "stage": "sft",
        "method": "sft",
        "adapter": "lora",
        "parameters": -1,
        "new_tokens": [],
        "data": {},
        "definitions": {},
        "more": 1,
    }
    problems = "\n".join(list_problems("result/sft", result))
    assert "'training' is a required property" in problems
    assert "-1 is less than the minimum" in problems
    assert "'more' was unexpected" in problems
    assert list_problems("result", result)
