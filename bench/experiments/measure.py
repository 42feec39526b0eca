"""What a trained model is worth on rows it has not seen: token by token, by code that knows nothing of the package.

A token belongs to the part of the reply in which its first character stands, so every arm is measured by the same parts, whatever
classes it was trained with.

Suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.experiments.data import Row


def spans(row: Row) -> Iterator[tuple[int, int, str]]:
    """Begin, end and part of the stretches of a reply; the first that holds a character wins.

    Of a call: its arguments, and the syntax around them. Of a solution: the answer after ####, the other numbers, and words.
    """
    if row.kind == "call":
        found = re.search(r'"arguments": (\{.*\})\}\n</tool_call>$', row.reply, re.S)
        assert found, row.reply
        yield *found.span(1), "arguments"
        yield 0, len(row.reply), "syntax"
    else:
        yield *re.search(r"#### (.+)$", row.reply).span(1), "answer"  # type: ignore[union-attr]
        for found in re.finditer(r"\d[\d,.]*", row.reply):
            yield *found.span(), "number"
        yield 0, len(row.reply), "words"


class Bench:
    """A model and its tokenizer, in evaluation."""

    def __init__(self, model: Any, tokenizer: Any, end: str, dtype: torch.dtype, tokens: int = 2048) -> None:
        self.model = model.to(dtype).eval()  # adapters too, as they are served
        self.inner = self.model.get_base_model()
        self.tokenizer, self.tokens = tokenizer, tokens
        self.end = tokenizer.convert_tokens_to_ids(end)
        self.device = next(model.parameters()).device

    def _log_p(self, batch: Sequence[Sequence[int]], first: Sequence[int]) -> list[torch.Tensor]:
        """log p (T, V) of the tokens of each row from its `first` on; padded to the right, which causal attention does not see."""
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[self.end] * (longest - len(row))] for row in batch], device=self.device)
        seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=self.device)
        with torch.no_grad():
            hidden = self.inner.model(input_ids=ids, attention_mask=seen)[0]
            before = [hidden[place, at - 1 : len(row) - 1] for place, (row, at) in enumerate(zip(batch, first, strict=True))]
            return [self.inner.lm_head(rows).float().log_softmax(-1) for rows in before]

    def _batches(self, sequences: Sequence[Sequence[int]], tokens: int = 0) -> Iterator[list[int]]:
        """Numbers of sequences, the longest first, up to `tokens` with their padding."""
        batch: list[int] = []
        for number in sorted(range(len(sequences)), key=lambda n: (-len(sequences[n]), n)):
            if batch and (len(batch) + 1) * len(sequences[batch[0]]) > (tokens or self.tokens):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def replies(self, rows: Sequence[Row]) -> dict[str, float]:
        """Per part `nll/<kind>/<part>` in nats and `p/<kind>/<part>`, and over kinds, ends, all but a part, and all targets;
        `exact/<kind>`: the share of replies of which every token is the most likely one: greedy decoding writes just them."""
        prompts = [self.prompt(row) for row in rows]
        cut = [self.reply(row) for row in rows]
        sequences = [[*prompt, *ids, self.end] for prompt, (ids, _) in zip(prompts, cut, strict=True)]
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        exact: dict[str, list[bool]] = defaultdict(list)
        for batch in self._batches(sequences):
            found = self._log_p([sequences[number] for number in batch], [len(prompts[number]) for number in batch])
            for number, log_p in zip(batch, found, strict=True):
                targets = torch.tensor(sequences[number][len(prompts[number]) :], device=self.device)
                nll = -log_p.gather(-1, targets[:, None])[:, 0]
                kind = rows[number].kind
                exact[kind].append(bool((log_p.argmax(-1) == targets).all()))
                for part, value in zip([*cut[number][1], "end"], nll.double().tolist(), strict=True):
                    without = [f"/without {one}" for one in ("arguments", "answer") if part != one]
                    for key in ("", f"/{kind}", f"/{kind}/{part}", *without, *(["/end"] if part == "end" else [])):
                        sums[key][0] += value
                        sums[key][1] += math.exp(-value)
                        sums[key][2] += 1
        out = {f"nll{key}": total / count for key, (total, _, count) in sums.items()}
        out |= {f"p{key}": p / count for key, (_, p, count) in sums.items()}
        return out | {f"exact/{kind}": sum(found) / len(found) for kind, found in exact.items()}

    def text(self, texts: Sequence[str]) -> float:
        """Mean nll of a token of plain text, in nats."""
        sequences = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        total = count = 0.0
        for batch in self._batches(sequences):
            found = self._log_p([sequences[number] for number in batch], [1] * len(batch))
            for number, log_p in zip(batch, found, strict=True):
                targets = torch.tensor(sequences[number][1:], device=self.device)
                total -= float(log_p.gather(-1, targets[:, None]).double().sum())
                count += len(targets)
        return total / count

    def reply(self, row: Row) -> tuple[list[int], list[str]]:
        """Token ids of a reply, without what ends it, and the part of each."""
        encoded = self.tokenizer(row.reply, add_special_tokens=False, return_offsets_mapping=True)
        stretches = list(spans(row))
        parts = []
        for begin, end in encoded["offset_mapping"]:
            blanks = end - begin - len(row.reply[begin:end].lstrip(" "))  # they belong to the word that follows
            at = min(begin + blanks, end - 1)
            parts.append(next(part for first, last, part in stretches if first <= at < last))
        return encoded["input_ids"], parts

    def prompt(self, row: Row) -> list[int]:
        ids = self.tokenizer.apply_chat_template(row.messages()[:1], add_generation_prompt=True, tokenize=True)
        return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)

    def decode(self, rows: Sequence[Row], at_most: int) -> list[tuple[str, bool]]:
        """What greedy decoding answers, and whether it ended by itself within `at_most` tokens."""
        out: list[tuple[str, bool]] = [("", False)] * len(rows)
        self.inner.set_attn_implementation("eager")  # one token at a time, torch's own attention is many times slower on a CPU
        prompts = [self.prompt(row) for row in rows]
        for batch in self._batches(prompts, 16 * self.tokens):  # a step costs the same for few rows as for many
            longest = max(len(prompts[number]) for number in batch)
            ids = torch.tensor([[self.end] * (longest - len(prompts[n])) + prompts[n] for n in batch], device=self.device)
            seen = torch.tensor([[0] * (longest - len(prompts[n])) + [1] * len(prompts[n]) for n in batch], device=self.device)
            with torch.no_grad():
                decoded = self.model.generate(
                    input_ids=ids,
                    attention_mask=seen,
                    max_new_tokens=at_most,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    eos_token_id=self.end,
                    pad_token_id=self.end,
                )
            for number, tokens in zip(batch, decoded[:, longest:].tolist(), strict=True):
                ended = self.end in tokens
                kept = tokens[: tokens.index(self.end)] if ended else tokens
                out[number] = self.tokenizer.decode(kept, skip_special_tokens=False), ended
        return out


def is_accepted(row: Row, text: str) -> bool:
    """Whether a reply is the call that was asked for, with values that the leaderboard accepts, or ends in the right number."""
    if row.kind == "maths":
        found = re.search(r"#### (.+)$", text.strip())
        return bool(found) and found.group(1).replace(",", "").strip() == row.reply.split("#### ")[1].replace(",", "").strip()
    found = re.fullmatch(r"<tool_call>\n?(.*?)\n?</tool_call>", text.strip(), re.S)
    try:
        call = json.loads(found.group(1)) if found else None
    except json.JSONDecodeError:
        return False
    if not isinstance(call, dict) or call.get("name") != row.group or not isinstance(call.get("arguments"), dict):
        return False
    accepted, given = row.accepted or {}, call["arguments"]
    required = {name for name, values in accepted.items() if "" not in values}
    return required <= given.keys() <= accepted.keys() and all(_is_one_of(value, accepted[name]) for name, value in given.items())


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    """Numbers by value, strings without regard to case, blanks and punctuation, as the leaderboard compares them."""
    return any(_plain(value) == _plain(right) for right in accepted)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
    if isinstance(value, bool):
        return ("truth", value)
    if isinstance(value, (int, float)):
        return float(value)
    return [_plain(part) for part in value] if isinstance(value, list) else value
