"""What is not allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwl_plugin.loss.chunked import module_cross_entropy
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from dwl_plugin.loss.tokens import Targets
from tests.loss.cases import random_case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, 6, dtype=torch.long)}, r"targets must have the leading shape of hidden, \(3, 7\)"),
        ({"targets": torch.zeros(3, 7)}, "targets must be integer token ids, got torch.float32"),
        ({"targets": torch.full((3, 7), 211)}, r"targets must be -100 \(ignored\) or in \[0, 211\), got 211"),
        ({"targets": torch.full((3, 7), -1)}, "got -1"),
        ({"hidden": torch.zeros(3, 7, 5)}, r"weight must be floating \(V, H\) with the H of hidden"),
        ({"hidden": torch.zeros(3, 7, 24, dtype=torch.long)}, "hidden must be floating"),
        ({"weight": torch.zeros(24)}, "weight must be floating"),
        ({"weight": torch.zeros(0, 24)}, "weight must have at least one row"),
        ({"bias": torch.zeros(210)}, r"bias must be floating \(211,\)"),
        ({"min_weight": -0.1}, "min_weight must be a finite number of at least 0.*got -0.1"),
        ({"min_weight": torch.full((3, 7), -0.5)}, "min_weight must be finite and at least 0, got -0.5"),
        ({"exponent": -1.0}, "exponent must be a finite number of at least 0.*got -1.0"),
        ({"exponent": float("nan")}, "exponent must be a finite number.*got nan"),
        ({"exponent": "1"}, "exponent must be a finite number.*got '1'"),
        ({"exponent": torch.zeros(7)}, r"exponent must have the shape of targets, \(3, 7\), got \(7,\)"),
        ({"token_weight": torch.ones(3)}, r"token_weight must have the shape of targets, \(3, 7\), got \(3,\)"),
        ({"token_weight": 2.0}, "token_weight must be None or a tensor"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0, got 0.0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number, got inf"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    case = random_case(3, 7, ignored=0.0)
    arguments: dict[str, Any] = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_module_path_refuses_an_empty_chunk() -> None:
    case = random_case(3, 7)
    with pytest.raises(ValueError, match="chunk_tokens must be a positive integer or None, got 0"):
        module_cross_entropy(case.hidden, lambda h: h @ case.weight.T, Targets(case.targets), chunk_tokens=0)
