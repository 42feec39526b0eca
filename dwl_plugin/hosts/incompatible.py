"""What cannot be combined with `loss:`, in one table; the README's is made from it.

Most change the objective itself. The rest make or cut up batches where no class ids follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dwl_plugin.config import LossName
from dwl_plugin.errors import Problem
from dwl_plugin.hosts.versions import release

__all__ = ["REFUSALS", "Refusal", "refusal_table", "refused", "shares_sequences"]

Config = Mapping[str, Any]


def _set(value: Any, _: Config) -> bool:
    return value not in (None, False, 0, 0.0, "", [], {})


def _cuts_in_forward(block: Any, _: Config) -> bool:
    """The sequence is cut up in front of the model's forward, after the collator."""
    return isinstance(block, Mapping) and (block.get("shard_in_collator") is False or block.get("load_balance") == "distflash")


def _classifies(value: Any, _: Config) -> bool:
    kinds = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "RewardModel")
    return isinstance(value, str) and any(kind in value for kind in kinds)


def _in_pieces(cfg: Config) -> bool:
    block = cfg.get("context_parallel")
    sizes = [cfg.get("context_parallel_size"), cfg.get("sequence_parallel_degree")]
    sizes += [block.get("size")] if isinstance(block, Mapping) else []
    return any(isinstance(size, int) and size > 1 for size in sizes)


def shares_sequences(cfg: Config) -> bool:
    """Whether ranks share sequences by DeepSpeed's sequence parallelism (ALST)."""
    return _set(cfg.get("deepspeed"), cfg) and _in_pieces(cfg)


def _streams_in_pieces(value: Any, cfg: Config) -> bool:
    """One process reads the stream and hands whole batches out, so the collator cannot cut them."""
    accelerator = cfg.get("accelerator_config")
    dispatches = not isinstance(accelerator, Mapping) or accelerator.get("dispatch_batches") is not False
    return _set(value, cfg) and _in_pieces(cfg) and dispatches


@dataclass(frozen=True)
class Refusal:
    """A key of the host that is refused beside `loss:` where `when(its value, the config)`; `instead` is what to do.

    `name` is what the README calls it, where that is not the key.
    """

    key: str
    why: str
    instead: str = "delete one of the two lines"
    when: Callable[[Any, Config], bool] = _set
    name: str = ""


_OWN_LOADER = "its batches come from a data loader of its own, without class ids"
_LANGUAGE_MODEL = "write `AutoModelForCausalLM`, or delete this line"
_CUT_LATE = "the sequence is cut up after the collator, and class ids are not cut with it"


def _plugin(module: str, why: str, name: str) -> Refusal:
    def is_used(plugins: Any, _: Config) -> bool:
        return isinstance(plugins, (list, tuple)) and any(module in str(plugin) for plugin in plugins)

    return Refusal("plugins", why, when=is_used, name=name)


def _stream(key: str) -> Refusal:
    instead = "add `accelerator_config: {dispatch_batches: false}`"
    name = f"`{key}` with `context_parallel_size` and batches that are dispatched"
    return Refusal(key, _CUT_LATE, instead, _streams_in_pieces, name)


REFUSALS: tuple[Refusal, ...] = (
    Refusal("use_dft", "both weight every token by its probability", "delete `use_dft`; `loss: dft` is the same objective"),
    Refusal(
        "use_eaft",
        "it weights tokens by entropy, a different objective",
        "delete `use_eaft`; `loss: dwl` with `dwl: {token_loss: eaft}` is it, divided by ln k as published",
    ),
    Refusal("liger_use_token_scaling", "Liger's fused loss would scale tokens a second time"),
    Refusal("label_smoothing_factor", "it smooths the targets of the loss that `loss` replaces"),
    Refusal("label_smoothing", "it smooths the targets of the loss that `loss` replaces"),
    Refusal("orpo_alpha", "ORPO computes its own loss"),
    Refusal("rl", "preference and reinforcement learning compute their own loss"),
    Refusal("reward_model", "a reward model has no next-token loss"),
    Refusal("process_reward_model", "a process reward model has no next-token loss"),
    Refusal("model_type", "a classifier predicts no tokens", _LANGUAGE_MODEL, _classifies, "`model_type` of a classifier"),
    Refusal("type_of_model", "a classifier predicts no tokens", _LANGUAGE_MODEL, _classifies, "`type_of_model` of one"),
    Refusal("diffusion", "a diffusion model has no next-token loss"),
    Refusal("diffusion_lm", "a diffusion model has no next-token loss"),
    Refusal("diffusion_decision", "a diffusion model has no next-token loss"),
    Refusal("kd_trainer", "distillation computes its own loss"),
    Refusal("kd_ce_alpha", "distillation computes its own loss"),
    Refusal("ebft", "EBFT computes its own loss"),
    Refusal("hatchery", "hatchery trains on a remote machine with its own loss"),
    Refusal("llmcompressor", "llm_compressor replaces the trainer's loss"),
    _plugin("integrations.kd.", "distillation computes its own loss", "the kd plugin"),
    _plugin("integrations.diffusion", "a diffusion model has no next-token loss", "the diffusion plugins"),
    _plugin("integrations.hatchery", "hatchery trains on a remote machine with its own loss", "the hatchery plugin"),
    _plugin("integrations.llm_compressor", "llm_compressor replaces the trainer's loss", "the llm_compressor plugin"),
    Refusal("do_bench_eval", _OWN_LOADER, "run the benchmark on the finished model"),
    Refusal(
        "deepspeed",
        "Axolotl cuts its sequences up after the collator before 0.21",
        "leave `deepspeed` out, or install Axolotl 0.21",
        when=lambda _, cfg: shares_sequences(cfg) and release("axolotl") < (0, 21),
        name="`deepspeed` with `context_parallel_size` before Axolotl 0.21",
    ),
    Refusal(
        "context_parallel",
        _CUT_LATE,
        "leave `shard_in_collator` on, and `load_balance` at `auto`",
        when=_cuts_in_forward,
        name="`context_parallel` with `shard_in_collator: false` or `load_balance: distflash`",
    ),
    _stream("streaming"),
    _stream("pretraining_dataset"),
)


def refused(cfg: Config, loss: LossName) -> Iterator[Problem]:
    """One problem per key of `cfg` that cannot stand beside `loss:`."""
    for refusal in REFUSALS:
        value = cfg.get(refusal.key)
        if value is not None and refusal.when(value, cfg):
            yield Problem(refusal.key, f"cannot be combined with `loss: {loss}`: {refusal.why}", value, hint=refusal.instead)


def refusal_table() -> str:
    """Markdown: what is refused, by reason."""
    reasons: dict[str, list[str]] = {}
    for refusal in REFUSALS:
        reasons.setdefault(refusal.why, []).append(refusal.name or f"`{refusal.key}`")
    rows = [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]
    return "\n".join(["| refused beside `loss:` | because |", "|---|---|", *rows])
