"""What people train for: the loss of each, in YAML with its comments, and data to begin with."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PURPOSES", "Purpose"]


@dataclass(frozen=True)
class Purpose:
    """`dataset` is an entry of `datasets` without its dash; `tokens` is the `sequence_len` that such data wants."""

    what: str
    watch: str
    loss: str
    dataset: str
    tokens: int = 2048
    epochs: int = 1
    thinks: bool = False
    """Whether the replies of the data begin with <think>…</think>."""


_MATHS = """\
path: HuggingFaceTB/smoltalk
name: metamathqa-50k
split: train
type: chat_template"""


def _hermes(name: str) -> str:
    return f"""\
path: NousResearch/hermes-function-calling-v1
name: {name}
split: train
type: chat_template
field_messages: conversations
message_property_mappings: {{role: from, content: value}}"""


PURPOSES = {
    "measure": Purpose(
        "plain SFT, with nll and p of each class of tokens beside `loss`. It trains exactly as without the plugin.",
        "eval_nll and eval_dwl/nll/*: which class the loss is in, and which one still falls. A weight is for later.",
        """\
loss: nll                    # the host's own loss, measured
dwl:
  pack: numbers              # which classes: a pack (`dwl packs list`), or `classes:` of your own""",
        _MATHS,
    ),
    "dft": Purpose(
        "Dynamic Fine-Tuning (arXiv 2508.05629): a token's loss is multiplied by the model's own probability of it, so that "
        "improbable tokens pull less.",
        "`nll`, which compares with plain SFT, where `loss` does not; dwl/p should rise. Where the end of a turn is not learned, "
        "raise min_weight.",
        """\
loss: dft
dft:
  exponent: 1.0              # 1 is DFT, 0 is plain cross-entropy
  min_weight: 0.1            # no token counts less: keeps what the model does not expect yet""",
        _MATHS,
    ),
    "numbers": Purpose(
        "getting figures right: results of a calculation count for four words, other numbers for two.",
        "eval_dwl/nll/result and number against the same run with `loss: nll`, eval_dwl/nll/rest for what the words pay.",
        """\
loss: dwl
dwl:
  pack: numbers
  alpha: {result: 4, number: 2, rest: 1}           # of one token each; only their ratios matter
  reduction: weighted_mean                         # keeps the size of SFT's loss, and so the learning rate""",
        _MATHS,
    ),
    "answers": Purpose(
        "the final answer of a worked solution, in its usual notations, which is a few tokens of hundreds.",
        "eval_dwl/nll/answer against the same run with `loss: nll`, eval_dwl/nll/rest for what the solution pays.",
        """\
loss: dwl
dwl:
  pack: math_answer
  alpha: {answer: 8, marker: 2, rest: 1}           # of one token each; only their ratios matter
  reduction: weighted_mean                         # keeps the size of SFT's loss, and so the learning rate""",
        _MATHS,
    ),
    "reasoning": Purpose(
        "long reasoning traces: a token of the answer counts for three of the trace, which has most of the tokens.",
        "eval_dwl/nll/rest, which is the answer, against the same run with `loss: nll`; eval_dwl/nll/thinking should fall almost "
        "as far as there.",
        """\
loss: dwl
dwl:
  pack: reasoning                                  # the tags of the common model families
  alpha: {thinking: 1, tags: 2, rest: 3}           # of one token each; only their ratios matter
  reduction: weighted_mean                         # keeps the size of SFT's loss, and so the learning rate""",
        """\
path: open-r1/OpenR1-Math-220k
name: default
split: train[:10%]
type: chat_template""",
        tokens=8192,
        thinks=True,
    ),
    "tool-calls": Purpose(
        "calls of functions among other replies: a token of a call counts for two of the text beside it, the whole call with the "
        "end of its turn.",
        "calls that come out right, against the same run with `loss: nll`, which no weight has bettered (docs/evidence.md); "
        "eval_dwl/nll/rest for what other replies pay. Where replies are calls and nothing else, this is plain SFT.",
        """\
loss: dwl
dwl:
  pack: [tool_call, end_of_turn]
  alpha: {arguments: 2, name: 2, syntax: 2, end_of_turn: 2, control: 1, rest: 1}
  reduction: weighted_mean                         # only ratios of α matter; the learning rate keeps its meaning""",
        _hermes("func_calling_singleturn"),
        tokens=4096,
        epochs=2,
    ),
    "json": Purpose(
        "structured output among other text: a token of JSON counts for two of the text beside it, all of it with the end of its "
        "turn.",
        "what parses and is right, against the same run with `loss: nll`; eval_dwl/nll/string and number for the values. Where "
        "replies are JSON and nothing else, this is plain SFT.",
        """\
loss: dwl
dwl:
  pack: [json, end_of_turn]
  alpha: {key: 2, string: 2, number: 2, literal: 2, syntax: 2, end_of_turn: 2, control: 1, rest: 1}
  reduction: weighted_mean                         # only ratios of α matter; the learning rate keeps its meaning""",
        _hermes("json_mode_singleturn"),
        tokens=4096,
        epochs=2,
    ),
    "code": Purpose(
        "code in answers: the code itself counts for two, comments and the prose around it for one.",
        "eval_dwl/nll/code against the same run with `loss: nll`, eval_dwl/nll/rest for what the prose pays.",
        """\
loss: dwl
dwl:
  pack: code                                       # fenced code, in Markdown
  alpha: {comment: 1, code: 2, fence: 1, rest: 1}  # of one token each; only their ratios matter
  reduction: weighted_mean                         # keeps the size of SFT's loss, and so the learning rate""",
        """\
path: HuggingFaceTB/smoltalk
name: self-oss-instruct
split: train
type: chat_template""",
    ),
    "data-weights": Purpose(
        "data that says itself what counts: `weight` of a row, a message or a content part multiplies the loss of its tokens.",
        "dwl/factor, the mean of the factors; eval_nll against the same run with `loss: nll` and without data_weights.",
        """\
loss: dwl
dwl:
  data_weights: true         # `weight` of rows, messages and content parts; `token_weight` of tokenised rows
  reduction: weighted_mean   # only ratios of factors matter; the learning rate keeps its meaning""",
        """\
path: ./rows.jsonl           # {"weight": 0.5, "messages": [...]}, one a line
type: chat_template""",
        tokens=4096,
    ),
}
