"""The seam on heads and models of every build, against full logits; and what it leaves alone."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss import seam as seam_module
from dwl_plugin.loss.attach import attach
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.linear_cross_entropy import fused_cross_entropy
from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.shift import shift_left
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import Power
from tests.loss.test_every_model import SPECS, batch, build, difference, eager, gradients, ours, weighted_nll

with warnings.catch_warnings(action="ignore"):  # torchao's docstrings, where nothing compiled is kept
    import peft

DFT = LossSpec.named("dft")
WEIGHTED = SPECS["weighted"]


def llama() -> nn.Module:
    return build("LlamaForCausalLM")


def want(model: nn.Module, spec: LossSpec, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """From plain logits, before anything is attached."""
    ids, labels, class_ids = batch()
    logits = model(input_ids=ids, **inputs).logits
    loss = weighted_nll(logits, shift_left(labels), shift_left(class_ids), spec)
    return loss.detach(), gradients(model, loss)


def got(model: nn.Module, spec: LossSpec, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, labels, class_ids = batch()
    seam = Seam(model, lambda line: None)
    step = PendingLoss(spec, labels, class_ids if len(spec.weight) > 1 else None)
    try:
        with seam.armed(step):
            loss = model(input_ids=ids, labels=labels, **inputs).loss
    finally:
        seam.detach()
    return loss.detach(), gradients(model, loss)


def assert_exact(model: nn.Module, spec: LossSpec = WEIGHTED, tolerance: float = 1e-5, **inputs: Any) -> None:
    want_loss, want_gradients = want(model, spec, **inputs)
    got_loss, got_gradients = got(model, spec, **inputs)
    torch.testing.assert_close(got_loss, want_loss, rtol=tolerance, atol=0.0)
    error, name = difference(got_gradients, want_gradients)
    assert error <= tolerance, name


@pytest.fixture
def path_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two losses ran."""
    taken: list[str] = []
    for name in ("fused_cross_entropy", "module_cross_entropy"):
        real = getattr(seam_module, name)

        def spy(*args: Any, _name: str = name, _real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            taken.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(seam_module, name, spy)
    return taken


# heads


def with_lora(model: nn.Module) -> nn.Module:
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would not show
            nn.init.normal_(parameter, std=0.1)
    return model


def with_saved_head(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    nn.init.normal_(model.base_model.lm_head.modules_to_save["default"].weight, std=0.3)  # type: ignore[union-attr, index, operator]
    return model


def with_bias(model: nn.Module) -> nn.Module:
    old = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features)
    return model


def tied(model: nn.Module) -> nn.Module:
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def with_forward_hooks(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0] * 0.5,))
    model.lm_head.register_forward_hook(lambda head, args, logits: logits * 1.5)
    return model


def wrapped_before(model: nn.Module) -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Halves(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 0.5

    add_hook_to_module(model.lm_head, Halves())
    return model


class CastHead(nn.Linear):
    """As an adapter library leaves a head in fp32 over hidden states in bf16."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.to(self.weight.dtype))


def frozen(model: nn.Module) -> nn.Module:
    model.lm_head.requires_grad_(False)
    return model


HEADS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "bias": (with_bias, "fused_cross_entropy"),
    "tied": (tied, "fused_cross_entropy"),
    "frozen": (frozen, "fused_cross_entropy"),
    "forward hooks": (with_forward_hooks, "fused_cross_entropy"),
    "modules_to_save": (with_saved_head, "fused_cross_entropy"),
    "LoRA": (with_lora, "module_cross_entropy"),
    "wrapped before us": (wrapped_before, "module_cross_entropy"),
}


@pytest.mark.parametrize("name", HEADS)
def test_any_head_gives_the_loss_and_gradients_of_full_logits(name: str, path_taken: list[str]) -> None:
    change, path = HEADS[name]
    assert_exact(change(llama()))
    assert path_taken == [path]


def test_disabled_adapters_are_not_used() -> None:
    model = with_saved_head(llama())
    model.base_model.model.model.embed_tokens.weight.requires_grad_(True)  # something to differentiate
    with model.disable_adapter():
        assert_exact(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_is_exact(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    dense = model.lm_head
    if bits == 4:
        head = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, quant_type="nf4")
        head.weight = bnb.nn.Params4bit(dense.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    else:
        head = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, bias=False, has_fp16_weights=False)
        head.weight = bnb.nn.Int8Params(dense.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    model.lm_head = head.to("cpu")
    with warnings.catch_warnings(action="ignore"):  # 8 bit: that it multiplies in fp16
        if bits == 8:
            # Its activations are quantised row by row, so a chunk of rows gives what all rows give; but only to its rounding.
            assert_exact(model, tolerance=2e-3)
        else:
            assert_exact(model)


def test_hidden_states_in_bf16_under_a_head_in_fp32() -> None:
    model = llama().to(torch.bfloat16)
    dense = model.lm_head
    model.lm_head = CastHead(dense.in_features, dense.out_features, bias=False)
    assert_exact(model, tolerance=2e-2)


@pytest.mark.parametrize("change", [llama, lambda: with_lora(llama())], ids=["dense", "LoRA"])
def test_autocast_to_bf16(change: Callable[[], nn.Module]) -> None:
    model = change()
    with torch.autocast("cpu", torch.bfloat16):
        want_loss, want_gradients = want(model, WEIGHTED)
        got_loss, got_gradients = got(model, WEIGHTED)
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-3, atol=0.0)
    assert difference(got_gradients, want_gradients)[0] <= 2e-2


# sharded heads


def shard(model: nn.Module, mode: str, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    if mode != "with the model":
        fully_shard(model.get_output_embeddings(), mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_sharded(rank: int, world: int, port: int, modes: list[str]) -> None:
    """Each rank takes some of the rows; their gradients together are those of all rows on one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
        for mode in modes:
            model = with_lora(llama()).get_base_model() if mode == "LoRA on it" else llama()
            model.lm_head.requires_grad_(mode != "frozen")
            ids, labels, class_ids = batch()
            loss, alone = got(model, WEIGHTED)
            targets = (shift_left(labels) != -100).sum()
            shard(model, mode, mesh)
            mine = slice(rank * len(ids) // world, (rank + 1) * len(ids) // world)
            seam = Seam(model, print)
            seen: list[ForwardMetrics] = []
            pending = PendingLoss(WEIGHTED, labels[mine], class_ids[mine], denominator=targets, on_tokens=seen.append)
            with seam.armed(pending):
                loss_here = model(input_ids=ids[mine], labels=labels[mine]).loss
            loss_here *= world  # in place, as transformers does
            assert len(seen[0].factors_KN) == len(WEIGHTED.terms)
            model.zero_grad()
            loss_here.backward()
            torch.distributed.all_reduce(mean := loss_here.detach() / world)
            torch.testing.assert_close(mean, loss)
            whole = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
            assert difference(whole, alone)[0] <= 1e-5, mode
    finally:
        torch.distributed.destroy_process_group()


SHARDED = ["with the model", "on its own", "frozen", "LoRA on it"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.filterwarnings("default")  # torch's, about a process group of one
def test_fsdp2_on_one_rank(path_taken: list[str]) -> None:
    check_sharded(0, 1, free_port(), SHARDED)
    assert path_taken == ["fused_cross_entropy"] * 6 + ["module_cross_entropy"] * 2


@pytest.mark.slow
def test_fsdp2_on_two_ranks() -> None:
    torch.multiprocessing.spawn(check_sharded, args=(2, free_port(), SHARDED), nprocs=2)


@pytest.mark.filterwarnings("default")
def test_a_tensor_parallel_weight_is_gathered() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = llama()
    want_loss, want_gradients = want(model, WEIGHTED)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        loss, got_gradients = got(model, WEIGHTED)
        got_gradients["lm_head.weight"] = got_gradients["lm_head.weight"].full_tensor()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(loss, want_loss)
    assert difference(got_gradients, want_gradients)[0] <= 1e-5


# models


def test_gradient_checkpointing() -> None:
    model = llama()
    model.gradient_checkpointing_enable()
    assert_exact(model)


def test_shift_labels_are_not_shifted_again() -> None:
    model = llama()
    ids, labels, class_ids = batch()
    want_loss, want_gradients = want(model, WEIGHTED)
    seam = Seam(model, print)
    step = PendingLoss(WEIGHTED, labels, shift_left(class_ids), shifted=True)
    with seam.armed(step):
        loss = model(input_ids=ids, labels=labels, shift_labels=shift_left(labels)).loss
    torch.testing.assert_close(loss.detach(), want_loss)
    assert difference(gradients(model, loss), want_gradients)[0] <= 1e-5


def test_class_ids_of_a_model_that_shifts_labels_itself_are_shifted_too() -> None:
    model = llama()
    ids, labels, class_ids = batch()
    want_loss, _ = want(model, WEIGHTED)
    seam = Seam(model, print)
    with seam.armed(PendingLoss(WEIGHTED, labels, class_ids)):  # as GIT does: shift_labels that are not the host's
        loss = model(input_ids=ids, labels=labels, shift_labels=shift_left(labels)).loss
    torch.testing.assert_close(loss.detach(), want_loss)


def test_labels_in_an_unknown_order_with_classes_stop_the_run() -> None:
    model = llama()
    ids, labels, class_ids = batch()
    seam = Seam(model, print)
    with pytest.raises(LossNotTakenError, match="cannot be matched"), seam.armed(PendingLoss(WEIGHTED, labels, class_ids)):
        model(input_ids=ids, labels=labels, shift_labels=shift_left(labels).flip(0))


def test_a_denominator_divides_the_sum() -> None:
    model = llama()
    ids, labels, _ = batch()
    targets = int((labels[:, 1:] != -100).sum())
    seam = Seam(model, print)
    with seam.armed(PendingLoss(LossSpec(), labels, denominator=torch.tensor(7))):
        loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss * 7 / targets, model(input_ids=ids).logits.new_tensor(_plain(model, ids, labels)))


def got_back(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The gradients that come back into a fused loss."""
    seen: list[float] = []

    def fused(*args: Any, **kwargs: Any) -> Any:
        out = fused_cross_entropy(*args, **kwargs)
        out.loss.register_hook(lambda gradient: seen.append(float(gradient)))
        return out

    monkeypatch.setattr(seam_module, "fused_cross_entropy", fused)
    return seen


def test_a_denominator_is_brought_to_the_loss_unless_it_is_a_mere_number() -> None:
    """A vector of one on a CPU divides nothing on a GPU."""
    seam, elsewhere = Seam(llama(), print), torch.ones(3, dtype=torch.bool, device="meta")
    for shape, device in (((1,), "meta"), ((), "cpu")):
        seam.arm(PendingLoss(LossSpec(), denominator=torch.full(shape, 7)))
        denominator = seam._denominator(elsewhere, 1)
        assert isinstance(denominator, torch.Tensor)
        assert denominator.device.type == device


@pytest.mark.parametrize("denominator", [None, 7, 7.0, torch.tensor(7)], ids=["targets", "int", "float", "tensor"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ProphetNetForCausalLM"])
def test_gradients_of_the_fused_loss_are_scaled_by_nothing_afterwards(
    name: str, denominator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, weights = got_back(monkeypatch), list[torch.Tensor]()
    model = build(name)
    ids, labels, class_ids = batch()
    on_tokens = lambda tokens: weights.append(tokens.weight_C)  # noqa: E731
    with Seam(model, print).armed(PendingLoss(WEIGHTED, labels, class_ids, denominator=denominator, on_tokens=on_tokens)):
        model(input_ids=ids, labels=labels).loss.backward()
    assert seen == [1.0]
    assert weights[0].tolist() == torch.tensor(WEIGHTED.weight).tolist(), "metrics see the weights of the config"


def _plain(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> float:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1), shift_left(labels).flatten()).item()


def test_a_denominator_counts_each_target_once_however_many_streams_predict_it() -> None:
    model = build("ProphetNetForCausalLM")
    ids, labels, class_ids = batch()
    seam = Seam(model, print)
    with seam.armed(PendingLoss(WEIGHTED, labels, class_ids)):
        mean = model(input_ids=ids, labels=labels).loss
    with seam.armed(PendingLoss(WEIGHTED, labels, class_ids, denominator=(labels != -100).sum())):
        torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, mean)


def test_tokens_reach_the_metrics_with_their_class_and_weight() -> None:
    model = llama()
    ids, labels, class_ids = batch()
    seen: list[ForwardMetrics] = []
    seam = Seam(model, print)
    step = PendingLoss(WEIGHTED, labels, class_ids, on_tokens=seen.append)
    with seam.armed(step):
        model(input_ids=ids, labels=labels)
    nll, classes = seen[0].nll_N, seen[0].members.ids_N
    weight = (seen[0].weight_C[:, None] * seen[0].factors_KN[seen[0].term_C]).gather(0, classes.clamp(min=0)[None])[0]
    targets = shift_left(labels).flatten()
    logits = model(input_ids=ids).logits.flatten(0, 1)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none").detach())
    assert torch.equal(classes, torch.where(targets == -100, -100, shift_left(class_ids).flatten()))
    floor_of_first = (0.3 * (-nll).exp().clamp(min=0.05))[classes == 0]
    torch.testing.assert_close(weight[classes == 0], floor_of_first)
    torch.testing.assert_close(weight[classes == 1], torch.full_like(weight[classes == 1], 1.7))


def test_logits_to_keep_without_labels_is_as_before() -> None:
    model = llama().eval()
    ids, _, _ = batch()
    before = model(input_ids=ids, logits_to_keep=3).logits
    handle = attach(model)
    assert torch.equal(model(input_ids=ids, logits_to_keep=3).logits, before)
    handle.detach()


# a loss that is not ours is never silent


class Meddling(nn.Module):
    """A model whose own loss is `loss_of(logits, targets)`."""

    def __init__(self, loss_of: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.head, self.loss_of = nn.Embedding(97, 16), nn.Linear(16, 97), loss_of
        self.loss_function = lambda *a, **k: None

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(self.embed(input_ids))
        loss = None if labels is None else self.loss_of(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


def shifted_loss(logits: Any, labels: torch.Tensor, **options: Any) -> Any:
    return F.cross_entropy(logits[:, :-1].reshape(-1, 97), labels[:, 1:].reshape(-1), **options)


OWN_LOSSES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "slices": shifted_loss,
    "true logits": lambda z, y: shifted_loss(torch.where(torch.ones(97).bool(), z, torch.zeros(())), y),
    "vocabulary second": lambda z, y: F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:]),
    "log_softmax": lambda z, y: F.nll_loss(z.log_softmax(-1)[:, :-1].reshape(-1, 97), y[:, 1:].reshape(-1)),
    "sum over its own count": lambda z, y: shifted_loss(z, y, reduction="sum") / (y[:, 1:] != -100).sum(),
    "shifted labels, padded": lambda z, y: F.cross_entropy(z.view(-1, 97), shift_left(y).view(-1)),
}


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_model_that_calls_a_loss_itself_gets_ours(name: str) -> None:
    torch.manual_seed(0)
    assert_exact(Meddling(OWN_LOSSES[name]))


FOREIGN_LOSSES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "label smoothing": lambda z, y: shifted_loss(z, y, label_smoothing=0.1),
    "class weights": lambda z, y: shifted_loss(z, y, weight=torch.ones(97)),
    "per token": lambda z, y: shifted_loss(z, y, reduction="none").mean(),
    "no cross-entropy": lambda z, y: z.logsumexp(-1).mean(),
}


@pytest.mark.parametrize("name", FOREIGN_LOSSES)
def test_a_loss_that_is_more_than_a_cross_entropy_stops_the_run(name: str) -> None:
    ids, labels, _ = batch()
    model = Meddling(FOREIGN_LOSSES[name])
    seam = Seam(model, lambda line: None)
    with pytest.raises(LossNotTakenError, match="did not compute"), seam.armed(PendingLoss(DFT, labels)):
        model(ids, labels)
    seam.detach()
    handle = attach(model, say=lambda line: None)
    with pytest.raises(LossNotTakenError, match="did not compute"):
        model(ids, labels)
    model(ids)
    handle.detach()


def test_a_sum_that_the_model_divides_itself_is_refused_where_a_host_counts() -> None:
    ids, labels, _ = batch()
    model = Meddling(OWN_LOSSES["sum over its own count"])
    seam = Seam(model, lambda line: None)
    with pytest.raises(LossNotTakenError), seam.armed(PendingLoss(DFT, labels, denominator=torch.tensor(40))):
        model(ids, labels)


def test_computing_the_logits_is_said_once_by_name() -> None:
    said: list[str] = []
    ids, labels, _ = batch()
    handle = attach(Meddling(OWN_LOSSES["true logits"]), say=said.append)
    for _ in range(3):
        handle.seam.model(ids, labels)
    assert [line for line in said if "Meddling uses `where`" in line] == said[:1]
    assert len(said) == len(set(said))


def test_a_model_without_an_output_head_is_refused() -> None:
    with pytest.raises(LossNotTakenError, match="no output head"):
        attach(nn.Linear(2, 2))


# attach and detach


def test_attach_is_the_loss_of_the_model_and_dft_that_of_its_paper() -> None:
    model = llama()
    for name, spec in (("nll", LossSpec()), ("dft", DFT), (LossSpec((0.5,), (Power(0.3, 0.1),)),) * 2):
        ids, labels, class_ids = batch()
        logits = model(input_ids=ids).logits
        loss = weighted_nll(logits, shift_left(labels), torch.zeros_like(class_ids), spec)
        want_loss, want_gradients = loss.detach(), gradients(model, loss)
        handle = attach(model, name)
        for call in (
            functools.partial(model, input_ids=ids, labels=labels),
            functools.partial(model, ids, None, None, None, None, labels),
        ):
            out = call()
            torch.testing.assert_close(out.loss.detach(), want_loss)
            assert difference(gradients(model, out.loss), want_gradients)[0] <= 1e-5
        handle.detach()


def test_attach_honours_num_items_in_batch() -> None:
    model = llama()
    ids, labels, _ = batch()
    plain = model(input_ids=ids, labels=labels, num_items_in_batch=50).loss
    handle = attach(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels, num_items_in_batch=50).loss, plain)
    handle.detach()


def test_attach_takes_one_class() -> None:
    with pytest.raises(ValueError, match="one class"):
        attach(llama(), WEIGHTED)
    with pytest.raises(ValueError, match="'nll', 'dft'"):
        attach(llama(), "nnl")


def test_label_free_forwards_and_generation_are_left_alone() -> None:
    model = llama().eval()
    ids, labels, _ = batch()
    logits = model(input_ids=ids).logits
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    handle = attach(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    model(input_ids=ids, labels=labels)
    assert torch.equal(model(input_ids=ids).logits, logits)
    handle.detach()


def state(model: nn.Module) -> list[Any]:
    return [
        (name, sorted(map(str, module.__dict__)), module.forward, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("change", [lambda m: m, wrapped_before, with_lora, with_saved_head])
def test_detach_leaves_no_trace_and_attaching_again_works(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(llama())
    ids, labels, _ = batch()
    before, loss = state(model), model(input_ids=ids, labels=labels).loss
    for _ in range(2):
        handle = attach(model)
        torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, loss)
        handle.detach()
        handle.detach()
        assert state(model) == before


def test_a_second_seam_takes_the_place_of_the_first() -> None:
    model = llama()
    before = state(model)
    first, second = Seam(model, print), Seam(model, print)
    first.detach()  # too late to matter
    ids, labels, _ = batch()
    with second.armed(PendingLoss(DFT, labels)):
        model(input_ids=ids, labels=labels)
    second.detach()
    assert state(model) == before


def test_an_exception_in_the_forward_disarms() -> None:
    model = llama()
    ids, labels, _ = batch()
    handle = attach(model)
    with pytest.raises(IndexError):
        model(input_ids=ids + 1000, labels=labels)
    assert isinstance(model(input_ids=ids).logits, torch.Tensor)
    handle.detach()


def test_a_copy_of_an_attached_model_stands_on_its_own() -> None:
    model = llama()
    handle = attach(model, "dft")
    twin = copy.deepcopy(model)
    nn.init.normal_(twin.lm_head.weight, std=0.2)
    handle.detach()
    ids, labels, class_ids = batch()
    loss = twin(input_ids=ids, labels=labels).loss
    logits = twin(input_ids=ids).logits
    torch.testing.assert_close(loss, weighted_nll(logits, shift_left(labels), torch.zeros_like(class_ids), DFT))
    loss.backward()
    assert model.lm_head.weight.grad is None
    assert twin.lm_head.weight.grad is not None


def test_an_attached_model_saves_what_it_saved_before(tmp_path: Path) -> None:
    model = llama()
    names = set(model.state_dict())
    handle = attach(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    handle.detach()
    ids, _, _ = batch()
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_host_reads_num_items_in_batch_off_the_loss_function() -> None:
    model = llama()
    seam = Seam(model, print)
    assert "num_items_in_batch" in inspect.signature(model.loss_function).parameters
    assert seam.replaced == "ForCausalLMLoss"


def test_inactive_the_loss_is_the_models_own() -> None:
    model = llama()
    ids, labels, _ = batch()
    before = model(input_ids=ids, labels=labels).loss
    Seam(model, print)
    assert torch.equal(model(input_ids=ids, labels=labels).loss, before)


def test_the_language_model_inside_a_wrapper_may_compute_the_loss() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = llama()
            self.loss_function = self.language_model.loss_function

        def get_output_embeddings(self) -> nn.Module:
            return self.language_model.lm_head

        def forward(self, **inputs: Any) -> Any:
            return self.language_model(**inputs)

    assert_exact(Wrapper())


@pytest.fixture
def compiler() -> Iterator[dict[str, Any]]:
    """What the compiler counts; it starts with nothing, and keeps nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at what it is handed
@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "BloomForCausalLM"])
def test_a_compiled_model_is_exact_and_one_graph_which_ends_where_the_loss_begins(name: str, compiler: dict[str, Any]) -> None:
    model = build(name)
    want_loss, want_gradients = eager(model, WEIGHTED)
    compiled = torch.compile(model, backend="eager")
    ids, labels, class_ids = batch()
    compiled(input_ids=ids, labels=labels)
    stock = compiler["stats"]["unique_graphs"]
    assert not compiler["graph_break"]
    seam = Seam(model, print)
    others = labels.clone()
    others[:, 5:] = -100
    moved = replace(WEIGHTED, objective=tuple(Power(0.1 * c) for c in range(len(WEIGHTED.weight))))
    for spec, targets, denominator in ((moved, labels, 7), (WEIGHTED, others, None), (WEIGHTED, labels, torch.tensor(10))):
        with seam.armed(PendingLoss(spec, targets, class_ids, denominator=denominator)):
            loss = compiled(input_ids=ids, labels=targets).loss
    loss = loss * 10 / (shift_left(labels) != -100).sum()
    torch.testing.assert_close(loss.detach(), want_loss)
    assert difference(gradients(model, loss), want_gradients)[0] <= 1e-5
    assert compiler["stats"]["unique_graphs"] == 2 * stock, "one for the stock loss, and one for ours whatever moves"
    (why,) = compiler["graph_break"]
    assert "function Seam._loss_function" in why


def test_ours_says_nothing_where_nothing_is_computed_in_full() -> None:
    assert ours(llama(), DFT)[2] == []
