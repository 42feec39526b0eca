"""What cannot be combined with `loss:`, in one table: each of these changes the objective itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dwl_plugin.config import LossName
from dwl_plugin.errors import Problem

__all__ = ["REFUSALS", "Refusal", "refused"]


def _set(value: Any) -> bool:
    return value not in (None, False, 0, 0.0, "", [], {})


@dataclass(frozen=True)
class Refusal:
    """A key of the host that is refused beside `loss:` where `when(value)`; `instead` is what to do."""

    key: str
    why: str
    instead: str = "delete one of the two lines"
    when: Callable[[Any], bool] = _set


def _plugin(name: str) -> Callable[[Any], bool]:
    return lambda plugins: isinstance(plugins, (list, tuple)) and any(name in str(plugin) for plugin in plugins)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "use_dft", "both weight every token by its probability", "delete `use_dft`; `loss: dft` is the same objective"
    ),
    Refusal("use_eaft", "it weights tokens by entropy, a different objective"),
    Refusal("liger_use_token_scaling", "Liger's fused loss would scale tokens a second time"),
    Refusal("label_smoothing_factor", "it smooths the targets of the loss that `loss` replaces"),
    Refusal("label_smoothing", "it smooths the targets of the loss that `loss` replaces"),
    Refusal("orpo_alpha", "ORPO computes its own loss"),
    Refusal("rl", "preference and reinforcement learning compute their own loss"),
    Refusal("reward_model", "a reward model has no next-token loss"),
    Refusal("process_reward_model", "a process reward model has no next-token loss"),
    Refusal("diffusion", "a diffusion model has no next-token loss"),
    Refusal("kd_trainer", "distillation computes its own loss"),
    Refusal("kd_ce_alpha", "distillation computes its own loss"),
    Refusal("ebft", "EBFT computes its own loss"),
    Refusal("hatchery", "hatchery trains on a remote machine with its own loss"),
    Refusal("llmcompressor", "llm_compressor replaces the trainer's loss"),
    Refusal("plugins", "distillation computes its own loss", when=_plugin("integrations.kd.")),
    Refusal("plugins", "a diffusion model has no next-token loss", when=_plugin("integrations.diffusion")),
    Refusal("plugins", "hatchery trains on a remote machine with its own loss", when=_plugin("integrations.hatchery")),
    Refusal("plugins", "llm_compressor replaces the trainer's loss", when=_plugin("integrations.llm_compressor")),
)


def refused(cfg: Mapping[str, Any], loss: LossName) -> Iterator[Problem]:
    """One problem per key of `cfg` that cannot stand beside `loss:`."""
    for refusal in REFUSALS:
        value = cfg.get(refusal.key)
        if value is not None and refusal.when(value):
            yield Problem(
                refusal.key, f"cannot be combined with `loss: {loss}`: {refusal.why}", value, hint=refusal.instead
            )
