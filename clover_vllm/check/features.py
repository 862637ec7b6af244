"""Every request feature of vLLM, as sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import cycle
from typing import Any

Json = dict[str, Any]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy", "zzz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}

FEATURES: dict[str, Json] = {
    "none": {},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.2},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "logit_bias": {"logit_bias": {"20": 6.0, "30": -50.0, "99": 5.0}},
    "bad_words": {"bad_words": ["a", "the", "e", "i", "o", "r", "s"]},
    "allowed_token_ids": {"allowed_token_ids": list(range(40, 120))},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": list(range(3, 160)), "ignore_eos": False},
    "stop": {"stop": ["a", "e", "B"]},
    "include_stop_str_in_output": {"stop": ["a", "e", "B"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": list(range(3, 40))},
    "ignore_eos": {"logit_bias": {"2": 7.0}, "ignore_eos": True},
    "eos": {"logit_bias": {"2": 7.0}, "ignore_eos": False},
    "repetition_detection": {
        "logit_bias": {"20": 9.0, "99": 9.0},
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
    },
    "n": {"n": 3},
    "logprobs": {"logprobs": 3},
    "logprobs of the sampled token": {"logprobs": 0},
    "logprobs with penalties": {"logprobs": 2, "repetition_penalty": 1.3},
    "flat_logprobs": {"logprobs": 2, "flat_logprobs": True},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "structured JSON schema": {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False},
    "structured regex": {"structured_outputs": {"regex": r"[a-f]{4}-\d{3,9}(x|yz)*"}, "ignore_eos": False},
    "structured choice": {
        "structured_outputs": {"choice": ["positive", "negative", "neither of them"]},
        "ignore_eos": False,
    },
    "structured JSON object": {"structured_outputs": {"json_object": True}, "ignore_eos": False},
    "structural tag": {
        "structured_outputs": {
            "structural_tag": json.dumps(
                {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
                    "triggers": ["<f>"],
                }
            )
        },
        "ignore_eos": False,
    },
    "structured grammar": {
        "structured_outputs": {"grammar": 'root ::= item ("," item)*\nitem ::= [0-9]+ | "(" root ")"'},
        "ignore_eos": False,
    },
    "thinking_token_budget": {"thinking_token_budget": 6},
}
KINDS: dict[str, Json] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.9, "seed": 5}}
SAMPLING = ("top_p", "top_k", "min_p", "n")
"""Features that change nothing of a greedy request; vLLM refuses the last for one."""


def in_both_kinds(features: Iterable[str]) -> list[tuple[str, str]]:
    """Features, each with both kinds but for what vLLM refuses."""
    return [(feature, kind) for feature in features for kind in KINDS if (feature, kind) != ("n", "greedy")]


def in_one_kind(features: Iterable[str]) -> list[tuple[str, str]]:
    """Features, each with one kind: seeds where they are about sampling, and the kinds in turn otherwise."""
    turns = cycle(KINDS)
    return [(feature, "seeded" if feature in SAMPLING else next(turns)) for feature in features]
