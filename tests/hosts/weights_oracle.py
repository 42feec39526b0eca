"""What a step of a run has to come to, from the rows as their author wrote them. Nothing here imports the package.

Each template is written out once more as pieces of text with what the row says of them. From there on it is characters, bytes and
tokens: a token has what is said of the character in which it ends. The mask is the host's own (`samples_of_the_host`). Then fp64,
full logits, one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from transformers import TrainerCallback

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Said:
    """What the data says of a character."""

    factor: float = 1.0
    marks: frozenset[str] = frozenset()

    def also(self, thing: Row, weight: str = "weight") -> Said:
        """With what a row, a message or a content part says on top."""
        factor, mark = thing.get(weight), thing.get("mark")
        marks = [] if mark is None else mark if isinstance(mark, list) else [mark]
        return Said(self.factor * (1.0 if factor is None else factor), self.marks | set(map(str, marks)))


Pieces = list[tuple[str, Said]]


# text


@dataclass(frozen=True)
class Turn:
    role: str
    said: Said
    content: Pieces
    thought: Pieces = field(default_factory=list)
    calls: Sequence[Row] = ()

    def own(self, text: str) -> tuple[str, Said]:
        return text, self.said


def turns_of(row: Row, weight: str = "weight") -> list[Turn]:
    said, messages = Said().also(row, weight), row["messages"]

    def parts(own: Said, content: Any) -> Pieces:
        if isinstance(content, list):
            return [(part["text"], own.also(part, weight)) for part in content]
        return [] if content is None else [(content, own)]

    turns = []
    if row.get("system") is not None and messages[0]["role"] != "system":
        turns.append(Turn("system", said, [(row["system"], said)]))
    for message in messages:
        own = said.also(message, weight)
        thought = parts(own, message.get("reasoning_content"))
        turns.append(Turn(message["role"], own, parts(own, message["content"]), thought, message.get("tool_calls") or ()))
    return turns


def joined(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


def trimmed(pieces: Pieces) -> Pieces:
    """What is left of the joined text without white space around it."""
    whole = joined(pieces)
    first, last = len(whole) - len(whole.lstrip()), len(whole.rstrip())
    ends = list(accumulate(len(text) for text, _ in pieces))
    out = []
    for end, (text, said) in zip(ends, pieces, strict=True):
        begin = end - len(text)
        out.append((text[max(first - begin, 0) : max(min(last, end) - begin, 0)], said))
    return out


def chatml(turns: Sequence[Turn]) -> Iterator[tuple[str, Said]]:
    for turn in turns:
        yield turn.own(f"<|im_start|>{turn.role}\n")
        yield from turn.content
        yield turn.own("<|im_end|>\n")


def llama3(turns: Sequence[Turn]) -> Iterator[tuple[str, Said]]:
    yield "<|im_start|>", Said()  # this tokenizer's bos
    for turn in turns:
        yield turn.own(f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n")
        yield from trimmed(turn.content)
        yield turn.own("<|eot_id|>")


def gemma(turns: Sequence[Turn]) -> Iterator[tuple[str, Said]]:
    yield "<|im_start|>", Said()
    for turn in turns:
        yield turn.own(f"<start_of_turn>{'model' if turn.role == 'assistant' else turn.role}\n")
        yield from trimmed(turn.content)
        yield turn.own("<end_of_turn>\n")


def phi_3(turns: Sequence[Turn]) -> Iterator[tuple[str, Said]]:
    yield "<|im_start|>", Said()
    for turn in turns:
        if turn.role != "assistant":
            yield turn.own(f"<|{turn.role}|>\n")
        yield from turn.content
        yield turn.own("<|end|>\n" + ("<|assistant|>\n" if turn.role == "user" else ""))


def exaone(turns: Sequence[Turn]) -> Iterator[tuple[str, Said]]:
    if turns[0].role != "system":
        yield "[|system|][|endofturn|]\n", Said()
    for turn in turns:
        yield turn.own(f"[|{turn.role}|]")
        yield from turn.content
        yield turn.own("\n" if turn.role == "user" else "[|endofturn|]\n")


CALLS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>\n{% endif %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\n<call>' }}{{ call['function']['name'] }}"
    "({{ call['function']['arguments'] }}){% endfor %}<|im_end|>\n{% endfor %}"
)


def calls(turns: Sequence[Turn]) -> Iterator[tuple[str, Said]]:
    for turn in turns:
        yield turn.own(f"<|im_start|>{turn.role}\n")
        if joined(turn.thought):
            yield turn.own("<think>")
            yield from turn.thought
            yield turn.own("</think>\n")
        yield from turn.content
        for call in turn.calls:
            yield turn.own(f"\n<call>{call['function']['name']}({call['function']['arguments']})")
        yield turn.own("<|im_end|>\n")


TEMPLATES: dict[str, Callable[[Sequence[Turn]], Iterator[tuple[str, Said]]]] = {
    "chatml": chatml,
    "llama3": llama3,
    "gemma": gemma,
    "phi_3": phi_3,
    "exaone": exaone,
    "calls": calls,
}
ADDED_TOKENS = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]
ADDED_TOKENS += ["<|user|>", "<|system|>", "<|assistant|>", "[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]", "[|tool|]"]
ENDS_OF_TURN = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "[|endofturn|]"]


def pieces_of(row: Row, template: str, weight: str = "weight") -> Pieces:
    return list(TEMPLATES[template](turns_of(row, weight)))


# tokens


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}


LETTERS = _letters()


def bytes_of(tokenizer: Any, token: int) -> bytes:
    text = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.added_tokens_decoder:
        return bytes(text, "utf-8")
    return bytes(LETTERS[letter] for letter in text)


@dataclass(frozen=True)
class Sample:
    """A row as tokens: what the host trains of it, and what the data says."""

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]
    said: tuple[Said, ...]
    data_set: str = ""

    def cut(self, begin: int, end: int) -> Sample:
        return replace(self, ids=self.ids[begin:end], is_target=self.is_target[begin:end], said=self.said[begin:end])


def said_of_tokens(tokenizer: Any, ids: Sequence[int], pieces: Pieces) -> list[Said]:
    """What is said of the character in which each token ends."""
    text = joined(pieces)
    said_of_bytes = [said for text, said in pieces for _ in text.encode()]
    token_bytes = [bytes_of(tokenizer, token) for token in ids]
    assert b"".join(token_bytes) == text.encode()
    return [said_of_bytes[end - 1] for end in accumulate(map(len, token_bytes))]


def tokens_of(tokenizer: Any, row: Row, template: str, jinja: str, weight: str = "weight") -> tuple[list[int], list[Said]]:
    """Ids, and what is said of each; the pieces are held to the template itself."""
    pieces = pieces_of(row, template, weight)
    text = joined(pieces)
    names = ("role", "content", "reasoning_content", "tool_calls")
    plain = [
        dict(zip(names, (turn.role, joined(turn.content), joined(turn.thought), turn.calls), strict=True))
        for turn in turns_of(row, weight)
    ]
    rendered = tokenizer.apply_chat_template(plain, chat_template=jinja, tokenize=False)
    assert text == rendered, (text, rendered)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, said_of_tokens(tokenizer, ids, pieces)


# loss

Classes = Callable[[int, Said, str], str]
"""(token, what is said of it, its data set) -> its class."""


@dataclass(frozen=True)
class Objective:
    reduction: str
    alpha: Mapping[str, float]
    """class -> weight; sums to 1, unless the loss knows no weights."""
    class_of: Classes
    exponent: float = 0.0
    """A token pays −sg(p)^exponent·log p."""


@dataclass(frozen=True)
class Target:
    nll: torch.Tensor
    factor: float
    name: str
    sample: int
    exponent: float

    @property
    def paid(self) -> torch.Tensor:
        """|v|·−sg(p)^a·log p, or, of a negative factor, |v|·−log(1 − p)."""
        if self.factor < 0:
            return self.factor * torch.log1p(-torch.exp(-self.nll))
        return self.factor * torch.exp(-self.exponent * self.nll.detach()) * self.nll


def loss_of(targets: Sequence[Target], objective: Objective) -> torch.Tensor:
    """Of a whole optimizer step."""
    targets = [target for target in targets if target.factor != 0]
    total = torch.zeros((), dtype=torch.float64)
    alpha, reduction = objective.alpha, objective.reduction
    if reduction == "class_mean":
        present = sorted({target.name for target in targets})
        share = sum(alpha[name] for name in present) / sum(alpha.values())
        for name in present:
            own = [target for target in targets if target.name == name]
            mass = sum(abs(target.factor) for target in own)
            total = total + alpha[name] / share * sum((target.paid for target in own), torch.zeros(())) / mass
        return total
    if reduction in ("sample_mean", "sample_sqrt"):
        power = 1.0 if reduction == "sample_mean" else 0.5
        sizes = {s: sum(target.sample == s for target in targets) for s in {target.sample for target in targets}}
        below = 0.0
        for target in targets:
            own = sizes[target.sample] ** -power
            total = total + alpha[target.name] * own * target.paid
            below += own * abs(target.factor)
        return total / below
    for target in targets:
        total = total + alpha[target.name] * target.paid
    return (
        total
        / {
            "token_mean": len(targets),
            "weighted_mean": sum(alpha[target.name] * abs(target.factor) for target in targets),
            "sequence_mean_token_sum": len({target.sample for target in targets}),
        }[reduction]
    )


class Oracle:
    """Of the samples that a run may be fed."""

    def __init__(self, samples: Iterable[Sample], objective: Objective) -> None:
        self.objective = objective
        self.by_ids = {sample.ids: sample for sample in samples}
        self.lengths = sorted({len(ids) for ids in self.by_ids}, reverse=True)
        self.met: list[Sample] = []

    def samples_in(self, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[int, Sample]]:
        """Where each sample of a row of a batch begins; whatever is behind them is padding."""
        at, found = 0, []
        while sample := next((self.by_ids[known] for n in self.lengths if (known := tuple(ids[at : at + n])) in self.by_ids), None):
            found.append((at, sample))
            at += len(sample.ids)
        assert found
        assert set(labels[at:]) <= {-100}, "not padding, and no row of the data"
        return found

    def targets(self, model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[Target]:
        """Each sample by itself; where the host trains the first token of one on what stands before it in its row, the row."""
        out: list[Target] = []
        seen = 0
        for batch in batches:
            for index, row in enumerate(batch["input_ids"].tolist()):
                found = self.samples_in(row, batch["labels"][index].tolist())
                self.met += [sample for _, sample in found]
                joined = any(sample.is_target[0] for at, sample in found if at)
                whole = _log_p(model, {key: batch[key][index : index + 1] for key in _INPUTS & batch.keys()}) if joined else None
                for at, sample in found:
                    log_p = _log_p(model, {"input_ids": torch.tensor([sample.ids])}) if whole is None else whole[at:]
                    for t, (token, is_target) in enumerate(zip(sample.ids, sample.is_target, strict=True)):
                        if not is_target or (t == 0 and (at == 0 or self.objective.reduction.startswith("sample_"))):
                            continue
                        before = whole[at - 1] if t == 0 and whole is not None else log_p[t - 1]
                        said = sample.said[t]
                        name = self.objective.class_of(token, said, sample.data_set)
                        out.append(Target(-before[token], said.factor, name, seen, self.objective.exponent))
                    seen += 1
        return out

    def loss(self, model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        return loss_of(self.targets(model, batches), self.objective)


_INPUTS = {"input_ids", "attention_mask", "position_ids"}


def _log_p(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits[0]
    assert logits.dtype == torch.float64
    return logits.log_softmax(-1)


class Watch(TrainerCallback):
    """Put on a trainer: holds the loss and all gradients of each step to the oracle's, before the step is taken."""

    def __init__(self, oracle: Oracle, rel: float = 1e-6) -> None:
        self.oracle, self.rel = oracle, rel
        self.batches: list[dict[str, torch.Tensor]] = []
        self.ours: list[float] = []
        self.steps: list[float] = []
        self.worst = 0.0

    def join(self, trainer: Any) -> None:
        trainer.model.double()
        samples, loss = trainer.get_batch_samples, trainer.compute_loss

        def get_batch_samples(*args: Any) -> Any:
            out = samples(*args)
            self.batches, self.ours = [dict(batch) for batch in out[0]], []
            return out

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            out = loss(*args, **kwargs)
            self.ours.append(float((out[0] if isinstance(out, tuple) else out).detach()))
            return out

        trainer.get_batch_samples, trainer.compute_loss = get_batch_samples, compute_loss
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        loss, expected = loss_and_gradients(model, self.oracle, self.batches)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        self.worst = max(self.worst, distance(sum(self.ours), loss), worst_gradient(gradients, expected))
        assert self.worst <= self.rel, (sum(self.ours), loss, worst_gradient(gradients, expected))
        self.steps.append(loss)


def loss_and_gradients(
    model: Any, oracle: Oracle, batches: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = oracle.loss(model, batches)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return float(loss.detach()), found


def distance(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b else abs(a)


def worst_gradient(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest |difference| of a parameter beside its largest gradient."""
    assert ours.keys() == expected.keys()
    assert any(bool(gradient.any()) for gradient in expected.values())
    return max(
        float((ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)) for name, gradient in expected.items()
    )


# the host


def samples_of_the_host(settings: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Ids and mask of each row as Axolotl prepares it without us."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.utils.dict import DictDefault

    meta = load_datasets(cfg=load_cfg(DictDefault(settings)), cli_args=TrainerCliArgs())
    return [
        (tuple(int(token) for token in row["input_ids"]), tuple(int(label) != -100 for label in row["labels"]))
        for row in meta.train_dataset
    ]
