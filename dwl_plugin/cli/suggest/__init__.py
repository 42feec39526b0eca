"""`dwl suggest`: what the data, its template and perhaps the model speak for, as a block to paste.

In order: `counting` looks for every pack in the rows, `rules` makes a proposal of the counts, `block` writes it as YAML, and `edit`
puts that into the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwl_plugin.cli.analysis import LookedAt, analyse, looking
from dwl_plugin.cli.check import print_findings
from dwl_plugin.cli.config_file import read_config
from dwl_plugin.cli.first_look import Findings, Raw, Teller
from dwl_plugin.cli.output import Console, number, print_json, say, say_list, table_of_classes
from dwl_plugin.cli.preflight import ClassProbabilities, load_model, measure, summarise
from dwl_plugin.cli.progress import progress
from dwl_plugin.cli.suggest.block import block_lines
from dwl_plugin.cli.suggest.counting import Matches, Structure, matches_in, structure_of
from dwl_plugin.cli.suggest.edit import write_into
from dwl_plugin.cli.suggest.rules import PACKS, Proposal, against, choose, own_classes, propose, weights_of
from dwl_plugin.config import Block, parse
from dwl_plugin.errors import DWLError
from dwl_plugin.hosts.axolotl_data import data_set_names
from dwl_plugin.hosts.plugin_line import LINE, names_plugin
from dwl_plugin.loss.reduction import class_weight_table
from dwl_plugin.run.dataset_check import labeller_of
from dwl_plugin.values import REST

__all__ = ["PACKS", "suggest"]

_ALPHA_COLUMNS = (("α, if\nasked for", "share\nthen"), ("α", "share of\nthe weight"))
P_ROWS = 64
"""Of the rows counted, on which p is measured: a pass of the model through each."""


def suggest(
    console: Console, config: Path, samples: int, trust: bool, with_model: bool, weigh: str, write: bool, as_json: bool
) -> int:
    """The whole command; the exit status."""
    tell = Teller(None if as_json else console)
    found, seen = analyse(config, samples, trust, to_run=with_model, spread=True, change=_with_a_loss, tell=tell)
    if found.problems or found.dangers or seen is None or seen.block is None:
        print_findings(console, found, seen, as_json, tell)
        return found.status
    with progress(f"Every pack is looked for in {len(seen.rows.samples):,} rows"):
        matches, structure = matches_in(seen), structure_of(seen.tokenizer, seen.rows.samples)
    chosen, left_out = choose(matches, own_classes(seen.raw, seen.block))
    stays = seen.block.loss == "dwl" and not weigh
    one_token = {row.name: row.weight.one_token for row in seen.figures if row.weight is not None}
    proposal = against(seen.raw, seen.block, one_token, matches) if stays else propose(matches, chosen, seen.raw, weigh=weigh)
    measured: list[ClassProbabilities] | None = None
    if with_model:
        with looking(found, trust):
            measured = _measured(seen, proposal, config.parent)
        if measured is None:
            print_findings(console, found, seen, as_json, tell)
            return found.status
        if not stays:
            proposal = propose(matches, chosen, seen.raw, {row.name: row.mean for row in measured}, weigh)
    parse(proposal.keys, config.parent)  # what is proposed is a config
    written, _ = read_config(config)
    is_new = any(repr(written.get(key)) != repr(proposal.keys.get(key)) for key in Block.model_fields) or not names_plugin(written)
    lines = block_lines(proposal, matches.rows)
    advice = [*_ends(matches, structure), *proposal.advice]
    if as_json:
        print_json(console, _as_dict(found, matches, structure, proposal, advice, left_out, measured, lines))
    else:
        alpha = _alpha(proposal, weigh, config.parent)
        _print_counts(console, seen, matches, structure, proposal, measured, alpha)
        say_list(console, "Packs that are not in the block", [] if stays else left_out)
        say_list(console, "What follows (in brackets: sections of docs/evidence.md)", advice)
        say_list(console, "Hints", found.hints)
        say_list(console, "Not looked at", found.unseen)
        packs = dict.fromkeys(
            entry.key.pack for entry in proposal.classes if entry.name in alpha and entry.key.pack != "end_of_turn"
        )
        _print_block(console, config, lines, proposal, [] if stays or weigh else list(packs), is_new, not names_plugin(written))
    if write and is_new:
        write_into(config, written, lines, proposal.keys)
        say(Console(stderr=True) if as_json else console, f"Written into {config}.")
    return found.status


def _with_a_loss(raw: Raw) -> Raw:
    """A config that has nothing of ours, as one that trains plain SFT through us."""
    plugins = raw.get("plugins")
    if any(raw.get(key) is not None for key in Block.model_fields) or not isinstance(plugins, (list, type(None))):
        return raw
    return raw | {"loss": "nll"} | ({} if names_plugin(raw) else {"plugins": [*(plugins or ()), LINE]})


def _measured(seen: LookedAt, proposal: Proposal, folder: Path) -> list[ClassProbabilities]:
    """p by class of the proposal and, last, of all targets, in rows from all over those counted."""
    block = parse(proposal.keys, folder)
    assert block is not None
    rows = seen.rows.samples[:: max(1, len(seen.rows.samples) // P_ROWS)][:P_ROWS]
    labeller = labeller_of(block, seen.tokenizer, data_set_names(seen.cfg, block))
    part = replace(seen, block=block, labeller=labeller, rows=replace(seen.rows, samples=rows))
    return summarise(part.class_names, *measure(load_model(part), part))


def _ends(matches: Matches, structure: Structure) -> Iterator[str]:
    """Where ends of turns are not trained, of which a model never learns to stop."""
    ends = matches.claimed(matches.of_pack("end_of_turn")[:1])
    count = sum(found.tokens for found in ends.values())
    if ends and count < structure.turns:
        which = f"{structure.turns - count:,} of {structure.turns:,} turns have no trained end: they are cut by `sequence_len`, or"
        yield f"{which} the template's end is masked (`train_on_eos`, `eot_tokens`)"


def _print_counts(
    console: Console,
    seen: LookedAt,
    matches: Matches,
    structure: Structure,
    proposal: Proposal,
    measured: Sequence[ClassProbabilities] | None,
    alpha: Mapping[str, tuple[str, str]],
) -> None:
    of = "" if seen.rows.total is None else f" of {seen.rows.total:,}"
    say(console, f"{matches.targets:,} target tokens, in {structure.turns:,} turns of {matches.rows:,}{of} rows", "bold")
    if structure.control:
        told = ", ".join(f"{token} {count:,}" for token, count in list(structure.control.items())[:8])
        say(console, f"The tokenizer's own tokens among them: {told}")
    if structure.tags:
        told = ", ".join(
            f"{tag} ({found.tokens} tokens, in {found.rows:,} rows)" for tag, found in list(structure.tags.items())[:8]
        )
        say(console, f"Marks that are no tokens of their own: {told}")
    table = table_of_classes("")
    table.title = None
    weighed = proposal.keys["loss"] == "dwl"
    columns = ["tokens", "share", "rows", *(["mean p", "of the loss"] if measured else []), *_ALPHA_COLUMNS[weighed]]
    for name in columns if alpha else columns[:-2]:
        table.add_column(name, justify="right")
    nll = {row.name: row.tokens * row.nll if row.tokens else 0.0 for row in measured or ()}
    p = {row.name: row.mean for row in measured or ()}
    for name, key, found in [*((e.name, str(e.key), e.found) for e in proposal.classes), (REST, REST, None)]:
        tokens = proposal.counts[-1] if found is None else found.tokens
        cells = [f"{tokens:,}", f"{tokens / matches.targets:.1%}", "" if found is None else f"{found.rows:,}"]
        if measured:
            cells += [number(p[name]), f"{nll[name] / max(nll['all'], 1e-9):.1%}"]
        if alpha:
            cells += alpha.get(name, ("–", "–"))
        table.add_row(key, *cells)
    if measured:
        table.add_section()
        table.add_row("all", f"{matches.targets:,}", "", "", number(p["all"]), "", *(["", ""] if alpha else []))
    console.print(table)
    if alpha and not weighed:
        say(console, "α and share of the weight: not proposed, but what --weigh with the pack of that row would write.")
    console.print()


def _alpha(proposal: Proposal, weigh: str, folder: Path) -> dict[str, tuple[str, str]]:
    """α of each class, and its share of the weight: as proposed; where nothing is weighed, under the `--weigh` of its own pack."""
    if proposal.keys["loss"] == "dwl" and not weigh:
        block = parse(proposal.keys, folder)
        assert block is not None
        counts = (*proposal.counts, sum(proposal.counts), 1)
        table = class_weight_table(block.reduction, block.class_names, block.alpha, counts)
        return {row.name: (number(row.alpha), f"{row.weight_share:.1%}") for row in table}
    shown: dict[str, tuple[str, str]] = {}
    for pack in [weigh] if weigh else dict.fromkeys(entry.key.pack for entry in proposal.classes if entry.key.pack):
        with suppress(DWLError):  # there is nothing to weigh against
            alpha, table = weights_of(proposal.classes, proposal.counts, pack)
            own = {entry.name for entry in proposal.classes if entry.key.pack == pack}
            shown |= {row.name: (f"{alpha[row.name]:g}", f"{row.weight_share:.1%}") for row in table if weigh or row.name in own}
    return shown


def _print_block(
    console: Console, config: Path, lines: Sequence[str], proposal: Proposal, packs: list[str], is_new: bool, needs_plugin: bool
) -> None:
    if not is_new:
        say(console, f"There is nothing to write into {config}.", "bold")
        return
    if proposal.keys["loss"] == "nll":
        say(console, "Nothing here speaks for weighting: train plain, with these classes to measure.", "bold")
    elif proposal.keys["loss"] == "dft":
        say(console, "Nothing here speaks for weighting classes; DFT with a floor is worth a run beside plain SFT.", "bold")
    say(console, f"To paste into {config}, or --write:")
    console.print()
    for line in [*(["plugins:", f"  - {LINE}", ""] if needs_plugin else []), *lines]:
        say(console, line)
    console.print()
    if packs:
        say(console, f"Nothing in the data tells what matters to you. If one of these does: --weigh {' or '.join(packs)}")


def _as_dict(
    found: Findings,
    matches: Matches,
    structure: Structure,
    proposal: Proposal,
    advice: Sequence[str],
    left_out: Sequence[str],
    measured: Sequence[ClassProbabilities] | None,
    lines: Sequence[str],
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "config": str(found.path),
        "status": found.status,
        "rows": matches.rows,
        "targets": matches.targets,
        "turns": structure.turns,
        "control_tokens": structure.control,
        "tags": {tag: found._asdict() for tag, found in structure.tags.items()},
        "matches": {str(key): matches.found(tokens_N)._asdict() for key, tokens_N in matches.matched.items() if key.pack},
        "classes": [{"name": entry.name, "is": str(entry.key), **entry.found._asdict()} for entry in proposal.classes],
        "left_out": list(left_out),
        "proposal": proposal.keys,
        "reasons": {line.key: line.why for line in proposal.why},
        "advice": list(advice),
        "hints": found.hints,
        "block": "\n".join(lines) + "\n",
    }
    if measured is not None:
        out["p"] = {row.name: {"tokens": row.tokens, "mean_p": row.mean, "nll": row.nll} for row in measured}
    return out
