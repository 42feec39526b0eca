"""Mistakes that people make in a config, and what has to be said of each: where it is, what is wrong, and what to write."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AFTER_LOADING", "AT_ONCE", "HINTED", "Mistake"]

_HEAD = """\
base_model: model
plugins:
  - dwl_plugin.DWLPlugin
datasets:
  - path: rows.jsonl
    type: chat_template
"""


class Mistake(NamedTuple):
    """`text` stands below a head of six lines; `path`, `cause` and `remedy` have to be in the one message about it."""

    name: str
    text: str
    path: str
    cause: str
    remedy: str
    head: str = _HEAD
    overrides: str = ""

    @property
    def config(self) -> str:
        return self.head + self.text


CLASSES = r"""loss: dwl
dwl:
  classes:
    number: {regex: '\d+'}
    ending: {tokens: ['<|im_end|>']}
"""
ALPHA = "  alpha: {number: 4, ending: 2, rest: 1}\n"
TO = "to: {number: 1, ending: 1, rest: 1}"


def _class(text: str) -> str:
    return f"loss: dwl\ndwl:\n  classes:\n{text}\n"


def _of_dwl(text: str) -> str:
    return f"{CLASSES}{ALPHA}  {text}\n"


def _plugins(name: str) -> str:
    return _HEAD.replace("dwl_plugin.DWLPlugin", name)


YAML = "train.yml"
AT_ONCE = [
    # what is no YAML
    Mistake(
        "an escape in double quotes",
        _class(r'    number: {regex: "\d+"}'),
        YAML,
        "in double quotes a backslash begins an escape",
        r"write `number: {regex: '\d+'}`",
    ),
    Mistake(
        "too little indentation",
        CLASSES.replace("    ending", "   ending"),
        YAML,
        "not as far in as the line that it belongs to (line 11, column 4)",
        "write `    ending: {tokens: ['<|im_end|>']}`, as far in as line 10",
    ),
    Mistake(
        "too much indentation",
        _class("    number:\n      regex: '[0-9]+'\n        group: 0"),
        YAML,
        "line 12:         group: 0",
        "write `      group: 0`, as far in as line 11",
    ),
    Mistake("a tab", "loss: dwl\ndwl:\n\tclasses: {}\n", YAML, "a tab: YAML is indented by blanks alone", "write `  classes: {}`"),
    Mistake(
        "a colon in a pattern",
        _class(r"    answer: {regex: Answer: \d+}"),
        YAML,
        "between `{` and `}` a text with one of",
        r"write `answer: {regex: 'Answer: \d+'}`",
    ),
    Mistake(
        "a colon in a pattern of its own line",
        _class("    answer:\n      regex: Answer: 1"),
        YAML,
        "has `: ` in it",
        "write `regex: 'Answer: 1'`",
    ),
    Mistake(
        "a pattern that begins with a bracket",
        _class("    number:\n      regex: [0-9]+"),
        YAML,
        "begins with a bracket",
        "write `regex: '[0-9]+'`",
    ),
    Mistake(
        "a pattern with braces",
        _class(r"    number: {regex: \d{2}}"),
        YAML,
        "stands in quotes",
        r"write `number: {regex: '\d{2}'}`",
    ),
    Mistake("a percent sign", _class("    percent: {tokens: [%]}"), YAML, "`%@`", "write `percent: {tokens: ['%']}`"),
    Mistake("a star", _class("    word:\n      regex: *x"), YAML, "begins with one of `*&|>!`", "write `regex: '*x'`"),
    Mistake("a greater-than", _class("    more:\n      regex: >x"), YAML, "begins with one of", "write `regex: '>x'`"),
    Mistake(
        "a quote in quotes",
        _class("    it:\n      regex: 'it's'"),
        YAML,
        "begins with a bracket or a quote",
        "write `regex: 'it''s'`",
    ),
    Mistake("no blank after a colon", "loss:dwl\ndwl: {}\n", YAML, "a blank is missing after the colon", "write `loss: dwl`"),
    Mistake(
        "a quote that is not closed",
        _class("    number: {regex: 'x}"),
        YAML,
        "that begins here is not closed",
        "write `number: {regex: 'x'}`",
    ),
    Mistake(
        "a brace that is not closed",
        _class("    number: {regex: 'x'\n  alpha: {number: 1, rest: 1}"),
        YAML,
        "the `{` that begins here is not closed (line 10, column 13)",
        "write `    number: {regex: 'x'}`",
    ),
    # what YAML reads as something else
    Mistake(
        "a backspace",
        _class(r'    word: {regex: "\b[A-Z]+\b"}'),
        "dwl.classes.word.regex",
        r"a backspace in it, which is what YAML makes of `\b` in double quotes",
        r"write `regex: '\b[A-Z]+\b'`",
    ),
    Mistake(
        "a list for a pattern",
        _class("    number:\n      regex: [0-9]"),
        "dwl.classes.number.regex",
        "is a text",
        "write `regex: '[0-9]'`",
    ),
    Mistake(
        "a comment for a pattern",
        _class(r"    answer:\n      regex: #### (\d+)".replace(r"\n", "\n")),
        "dwl.classes.answer.regex",
        "an unquoted `#` starts a YAML comment",
        "in single quotes, such as `'#### (.+)'`",
    ),
    Mistake(
        "no blank after a selector",
        _class(r"    number:\n      regex:'\d+'".replace(r"\n", "\n")),
        "dwl.classes.number",
        "a mapping with one selector",
        r"write `number: {regex: '\d+'}`",
    ),
    Mistake("a class named on", _class("    on: {regex: 'x'}"), "dwl.classes", "reads yes, no, on, off as booleans", "`'on':`"),
    # lists and scalars for mappings
    Mistake(
        "alpha as a list",
        f"{CLASSES}  alpha: [4, 2, 1]\n",
        "dwl.alpha",
        "a mapping from each class to its number",
        "write `alpha: {number: 4, ending: 2, rest: 1}`",
    ),
    Mistake(
        "alpha with dashes",
        f"{CLASSES}  alpha:\n    - number: 4\n    - ending: 2\n    - rest: 1\n",
        "dwl.alpha",
        "a mapping from each class to its number",
        "write `alpha: {number: 4, ending: 2, rest: 1}`",
    ),
    Mistake(
        "classes as a list",
        _class(f"    - number: {{regex: 'a'}}\n    - ending: {{tokens: ['<|im_end|>']}}\n{ALPHA}"),
        "dwl.classes",
        "a mapping from names to selectors",
        "leave the dashes out: write `classes: {number: {regex: a}, ending: {tokens: ['<|im_end|>']}}`",
    ),
    Mistake(
        "classes with names inside",
        _class("    - name: number\n      regex: 'a'\n  alpha: {number: 4, rest: 1}"),
        "dwl.classes",
        "a mapping from names to selectors",
        "write `classes: {number: {regex: a}}`",
    ),
    Mistake(
        "classes as names alone",
        f"loss: dwl\ndwl:\n  classes: [number, ending]\n{ALPHA}",
        "dwl.classes",
        "a mapping from names to selectors",
        r"write `classes: {number: {regex: '\d+'}}`",
    ),
    Mistake(
        "a pattern for a class",
        _class(r"    number: '\d+'"),
        "dwl.classes.number",
        "a mapping with one selector",
        r"write `number: {regex: '\d+'}`",
    ),
    Mistake("dft: true", "loss: dft\ndft: true\n", "dft", "a mapping of options", "delete this line: `loss: dft` is enough"),
    Mistake("dft: 0.5", "loss: dft\ndft: 0.5\n", "dft", "a mapping of options", "write `dft: {exponent: 0.5}`"),
    Mistake("dwl: true", "loss: dwl\ndwl: true\n", "dwl", "a mapping, with `classes` below it", "write `dwl: {classes: {number:"),
    Mistake(
        "a schedule by its name",
        _of_dwl("schedule: cosine"),
        "dwl.schedule",
        "a mapping with a `type`",
        f"write `schedule: {{type: cosine, {TO}}}`",
    ),
    Mistake(
        "one text for between",
        _class("    think: {between: <think>}"),
        "dwl.classes.think.between",
        "two texts, the opening and the closing one",
        "write `between: ['<think>', '</think>']`",
    ),
    Mistake(
        "a text for tokens",
        _class("    ending: {tokens: <|im_end|>}"),
        "dwl.classes.ending.tokens",
        "is a list",
        "write `tokens: ['<|im_end|>']`",
    ),
    # names of losses and of the plugin
    Mistake("loss: DWL", (CLASSES + ALPHA).replace("loss: dwl", "loss: DWL"), "loss", "not a known value", "write `loss: dwl`"),
    Mistake("loss: Dwl", (CLASSES + ALPHA).replace("loss: dwl", "loss: Dwl"), "loss", "(got 'Dwl')", "write `loss: dwl`"),
    Mistake("loss: sft", "loss: sft\n", "loss", "not a known value", "write `loss: nll`"),
    Mistake("loss: ce", "loss: ce\n", "loss", "not a known value", "write `loss: nll`"),
    Mistake(
        "loss: ce above alpha", (CLASSES + ALPHA).replace("loss: dwl", "loss: ce"), "loss", "a known", "write `loss: dwl`, whose"
    ),
    Mistake("loss: cross_entropy", "loss: cross_entropy\n", "loss", "not a known value", "write `loss: nll`"),
    Mistake(
        "loss: focal", "loss: focal\n", "loss", "not a known value", "write `loss: dwl`, and below it `dwl: {token_loss: focal}`"
    ),
    *(
        Mistake(
            f"plugins: {name}", CLASSES + ALPHA, "plugins[0]", "not the name of this plugin", "write `- dwl_plugin.DWLPlugin`", head
        )
        for name in ("dwl_plugin.DwlPlugin", "dwl_plugin", "axolotl_dwl.DWLPlugin", "dwl_plugin.DWLPlugn")
        for head in [_plugins(name)]
    ),
    Mistake(
        "plugins without a dash",
        CLASSES + ALPHA,
        "plugins",
        "is a list",
        "write `plugins: [dwl_plugin.DWLPlugin]`",
        _HEAD.replace("plugins:\n  - ", "plugins: "),
    ),
    # numbers by class
    Mistake(
        "a class misspelt in alpha",
        f"{CLASSES}  alpha: {{nubmer: 4, ending: 2, rest: 1}}\n",
        "dwl.alpha.nubmer",
        "no such class",
        "did you mean `number`?",
    ),
    Mistake(
        "a class misspelt in schedule.to",
        _of_dwl("schedule: {type: linear, to: {nubmer: 1, ending: 1, rest: 1}}"),
        "dwl.schedule.to.nubmer",
        "no such class",
        "did you mean `number`?",
    ),
    Mistake(
        "a class without alpha",
        f"{CLASSES}  alpha: {{number: 4, rest: 1}}\n",
        "dwl.alpha",
        "missing: ending",
        "write `alpha: {number: 4, ending: 1, rest: 1}`",
    ),
    Mistake(
        "a negative alpha",
        f"{CLASSES}  alpha: {{number: -4, ending: 2, rest: 1}}\n",
        "dwl.alpha.number",
        "cannot be negative",
        "write `number: 0` to leave the class out",
    ),
    Mistake(
        "alpha of no class",
        f"{CLASSES}  alpha: {{number: 4, ending: 2, reasoning: 3, rest: 1}}\n",
        "dwl.alpha.reasoning",
        "no such class",
        "name it under `classes`, or delete this number",
    ),
    Mistake(
        "a word for a number",
        f"{CLASSES}  alpha: {{number: four, ending: 2, rest: 1}}\n",
        "dwl.alpha.number",
        "a number is needed",
        "write `number: 1`",
    ),
    Mistake("no schedule.to", _of_dwl("schedule: {type: cosine}"), "dwl.schedule.to", "is required", f"write `{TO}`"),
    # classes
    Mistake(
        "two selectors",
        _class("    number: {regex: x, tokens: ['1']}"),
        "dwl.classes.number",
        "has one selector, this one has tokens and regex",
        "write `number: {any: [{regex: x}, {tokens: ['1']}]}`",
    ),
    Mistake("an empty class", f"{CLASSES}    think:\n", "dwl.classes.think", "is empty", r"write `think: {regex: '\d+'}`"),
    Mistake(
        "a pattern that does not compile",
        _class("    number: {regex: '(x'}"),
        "dwl.classes.number.regex",
        "missing )",
        "close what",
    ),
    Mistake(
        "regexp", _class("    number: {regexp: 'x'}"), "dwl.classes.number", "there is no selector", "write `number: {regex: x}`"
    ),
    Mistake(
        "an option misspelt",
        _class("    number: {regex: 'x', allow_emtpy: true}"),
        "dwl.classes.number.allow_emtpy",
        "unknown key",
        "did you mean `allow_empty`?",
    ),
    Mistake(
        "a name with a dash",
        _class("    my-number: {regex: 'x'}"),
        "dwl.classes",
        "made of letters, digits and _",
        "write `my_number:`",
    ),
    Mistake(
        "a class named rest",
        _class("    rest: {regex: 'x'}"),
        "dwl.classes.rest",
        "the class of unclaimed tokens",
        "choose another name",
    ),
    # schedules and positions
    Mistake(
        "a schedule misspelt",
        _of_dwl(f"schedule: {{type: cosin, {TO}}}"),
        "dwl.schedule.type",
        "not a known schedule",
        "mean `cosine`?",
    ),
    Mistake(
        "percent in words",
        _of_dwl(f"schedule: {{type: cosine, {TO}, start: 10 percent}}"),
        "dwl.schedule.start",
        "is not a position",
        "write `start: 10%`",
    ),
    Mistake(
        "a fraction",
        _of_dwl(f"schedule: {{type: cosine, {TO}, start: 0.1}}"),
        "dwl.schedule.start",
        "a share of the run or a step?",
        "write `start: 10%`",
    ),
    Mistake(
        "more than the run",
        _of_dwl(f"schedule: {{type: cosine, {TO}, end: 110%}}"),
        "dwl.schedule.end",
        "past the end of the run",
        "write `end: 100%`",
    ),
    Mistake(
        "percent without a sign",
        _of_dwl(f"schedule: {{type: cosine, {TO}, start: 100, end: 90}}"),
        "dwl.schedule.end",
        "must come after `start`",
        "write `end: 90%`",
    ),
    Mistake(
        "a schedule and a controller",
        _of_dwl(f"schedule: {{type: cosine, {TO}}}\n  controller: {{type: dwa}}"),
        "dwl.controller",
        "`dwl.schedule` moves α already",
        "delete `dwl.controller` or `dwl.schedule`",
    ),
    # other values
    Mistake("reduction: mean", _of_dwl("reduction: mean"), "dwl.reduction", "not a known value", "write `reduction: token_mean`"),
    Mistake("token_loss: DFT", _of_dwl("token_loss: DFT"), "dwl.token_loss", "not a known value", "write `token_loss: dft`"),
    Mistake(
        "token_loss: ce",
        _class("    a: {regex: x, token_loss: ce}"),
        "dwl.classes.a.token_loss",
        "not a known value",
        "write `token_loss: nll`",
    ),
    Mistake(
        "a number in quotes", 'loss: dft\ndft: {exponent: "1"}\n', "dft.exponent", "it stands in quotes", "write `exponent: 1`"
    ),
    Mistake("a pack misspelt", "loss: dwl\ndwl:\n  pack: reasonning\n", "dwl.pack", "no such pack", "did you mean `reasoning`?"),
    Mistake(
        "a member misspelt",
        _class("    number: {pack: numbers.rezult}"),
        "dwl.classes.number.pack",
        "the pack numbers has no member rezult",
        "did you mean `result`?",
    ),
    # keys in the wrong place
    Mistake("dwl without loss", (CLASSES + ALPHA).replace("loss: dwl\n", ""), "dwl", "without `loss`", "add the line `loss: dwl`"),
    Mistake("loss: dwl alone", "loss: dwl\n", "dwl", "needs a `dwl` block", r"write `dwl: {classes: {number: {regex: '\d+'}}}`"),
    Mistake("dwl under loss: dft", _of_dwl("").replace("loss: dwl", "loss: dft"), "dwl.alpha", "no effect", "write `loss: dwl`"),
    Mistake(
        "alpha at the top level",
        f"{CLASSES}alpha: {{number: 4, ending: 2, rest: 1}}\n",
        "alpha",
        "`alpha` at the top level",
        "move it below `dwl`, as far in as `classes`: write `alpha: {number: 4, ending: 2, rest: 1}`",
    ),
    Mistake(
        "classes and alpha at the top level",
        "loss: dwl\nclasses:\n  number: {regex: 'a'}\nalpha: {number: 4, rest: 1}\n",
        "classes",
        "`classes` and `alpha` at the top level",
        "write `dwl: {classes: {number: {regex: a}}, alpha: {number: 4, rest: 1}}`",
    ),
    Mistake(
        "alpha among the classes",
        f"{CLASSES}  {ALPHA}",
        "dwl.classes.alpha",
        "among the classes, one level too deep",
        "write `alpha: {number: 4, ending: 2, rest: 1}`",
    ),
    Mistake(
        "dft inside dwl",
        _of_dwl("token_loss: dft\n  dft: {exponent: 0.5}"),
        "dwl.dft",
        "stands at the top level",
        "write `dft: {exponent: 0.5}`",
    ),
    # files and the environment
    Mistake(
        "a path misspelt",
        CLASSES + ALPHA,
        "datasets[0].path",
        "there is no such file",
        "write `path: rows.jsonl`",
        _HEAD.replace("rows.jsonl", "rosw.jsonl"),
    ),
    Mistake(
        "data without a path",
        CLASSES + ALPHA,
        "datasets[0]",
        "has no `path`",
        "write `path: rows.jsonl`",
        _HEAD.replace("path:", "file:"),
    ),
    Mistake(
        "blanks in an override",
        CLASSES + ALPHA,
        "DWL_OVERRIDES",
        "a blank ends an override",
        "write DWL_OVERRIDES=\"'dwl.alpha={number: 1, ending: 2, rest: 1}'\"",
        overrides="dwl.alpha={number: 1, ending: 2, rest: 1}",
    ),
    Mistake(
        "a backslash without quotes in an override",
        CLASSES + ALPHA,
        "DWL_OVERRIDES",
        "a backslash outside of quotes is dropped",
        "write DWL_OVERRIDES=\"'dwl.classes.number.regex=\\d+'\"",
        overrides="loss=dwl dwl.classes.number.regex=\\d+",
    ),
]
"""Of these nothing but the file has to be known."""

AFTER_LOADING = [
    Mistake(
        "a text of several tokens",
        _class("    think: {tokens: ['<think>']}"),
        "dwl.classes.think.tokens[0]",
        "not one token of this tokenizer; it becomes '<', 'think', '>'",
        "write `regex: '<think>'` in place of `tokens`",
    ),
    Mistake(
        "a class that is nowhere",
        f"{CLASSES}    never: {{regex: zebra}}\n",
        "dwl.classes.never",
        "matches nothing",
        "allow_empty: true",
    ),
    Mistake(
        "a share without its sign",
        _of_dwl(f"schedule: {{type: cosine, {TO}, start: 80}}") + "max_steps: 20\n",
        "dwl.schedule.start",
        "is step 80, and this run ends at step 20",
        "write `start: 80%`",
    ),
]
"""Of these the tokenizer or the rows have to be known."""

HINTED = [
    Mistake(
        "a class twice",
        CLASSES + "    number: {regex: '[0-9]+'}\n" + ALPHA,
        "`dwl.classes.number`",
        "stands twice, in lines 10 and 12",
        "Delete the other, or give it another name",
    ),
    Mistake(
        "a pattern with a comment behind it",
        _class("    answer:\n      regex: x #### y"),
        "`dwl.classes.answer.regex`",
        "the `#` behind it in line 11 begins a comment",
        "write `regex: 'x #### y'`",
    ),
]
"""What may be meant, and then trains: a hint, and no problem."""
