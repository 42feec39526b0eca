"""Tables and figures of docs/evidence.md, and the table of the README, from results/runs.csv.

    python -m bench.experiments.tables            # write them
    python -m bench.experiments.tables --check    # fail where they are not what the CSV says

A difference is arm minus baseline with the same seed, the mean over the seeds; ± is half of its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from bench.experiments.arms import (
    ALPHAS,
    EXPERIMENTS,
    PARTS_MEASURED,
    STEERED,
    STEERED_CLASSES,
    Experiment,
    Measures,
    mean_of_parts,
)
from bench.experiments.run import PACKAGES, RESULTS, Done, Job, finished, measures, tests_of, untrained

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
IMAGES = ROOT / "docs" / "images" / "evidence"

Measure = Callable[[Measures], float]


class Column(NamedTuple):
    """Of a table."""

    head: str
    of: Measure
    digits: int = 3
    scale: float = 1.0


def nll(key: str, head: str) -> Column:
    return Column(head, lambda found: found[f"nll/{key}" if key else "nll"])


def percent(key: str, head: str) -> Column:
    return Column(head, lambda found: found[key], 1, 100.0)


def probability(key: str, head: str) -> Column:
    return Column(head, lambda found: found[f"p/{key}" if key else "p"])


RIGHT = percent("exact/call", "calls word for word, %")
FORGOTTEN = nll("prose", "nll of other text")
MEAN_OF_PARTS = Column("mean of parts", mean_of_parts)
PARTS_OF_REPLIES = tuple(nll(part.removeprefix("nll/"), part.rpartition("/")[2]) for part in PARTS_MEASURED)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "rare_class": (
        RIGHT,
        probability("call/end", "p of a call's end"),
        nll("call/arguments", "nll of arguments"),
        nll("call", "nll of calls"),
        nll("maths", "nll of maths"),
    ),
    "controllers": (MEAN_OF_PARTS, *PARTS_OF_REPLIES),
    "ends_of_turns": (
        probability("end", "p of the end"),
        percent("ended/call", "calls that end, %"),
        percent("accepted/call", "calls that are right, %"),
        RIGHT,
        probability("", "p"),
        nll("", "nll"),
        FORGOTTEN,
    ),
    "unknown_ends": (nll("end", "nll of the end"), percent("ended/call", "calls that end, %"), nll("", "nll")),
    "dft_step_size": (RIGHT, probability("call", "p of calls"), probability("maths", "p of maths"), nll("", "nll"), FORGOTTEN),
}


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval of Student's t."""
    mean, count = statistics.mean(differences), len(differences)
    return mean, float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def against(jobs: Sequence[Job], base: Sequence[Job], done: Done, of: Measure) -> list[float]:
    """Per seed, one arm minus another."""
    ours, theirs = ({job.seed: of(measures(done[job])) for job in some} for some in (jobs, base))
    assert ours.keys() == theirs.keys(), f"{jobs[0].arm} and {base[0].arm} have other seeds"
    for one, other in ((job, twin) for job in jobs for twin in base if job.seed == twin.seed):
        for what in ("targets", "steps", *PACKAGES):
            assert done[one].get(what) == done[other].get(what), f"{one} and {other} differ in {what}"
    return [ours[seed] - theirs[seed] for seed in sorted(ours)]


def cell(column: Column, jobs: Sequence[Job], base: Sequence[Job], done: Done) -> str:
    """Mean, and unless it is the baseline's own the paired difference, in bold where its interval leaves out 0."""
    mean = statistics.mean(column.of(measures(done[job])) for job in jobs) * column.scale
    if list(jobs) == list(base):
        return f"{mean:.{column.digits}f}"
    difference, half = (round(value * column.scale, column.digits) for value in interval(against(jobs, base, done, column.of)))
    text = f"{difference:+.{column.digits}f} ± {half:.{column.digits}f}".replace("-", "−")
    return f"{mean:.{column.digits}f} ({f'**{text}**' if abs(difference) > half else text})"


def label(arm: str) -> str:
    """Its name, without what all arms of its experiment begin with."""
    return arm.removeprefix("turns: ").removeprefix("end: ")


def table(name: str, done: Done, columns: Sequence[Column] | None = None, baseline: str | None = None) -> list[str]:
    """The table of an experiment, the row before training first; differences are to its own baseline, or to another of its arms."""
    experiment, columns = EXPERIMENTS[name], columns or COLUMNS[name]
    before = measures(done[untrained(experiment)])
    out = [
        f"| | learning rate | {' | '.join(column.head for column in columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
        f"| before training | | {' | '.join(f'{column.of(before) * column.scale:.{column.digits}f}' for column in columns)} |",
    ]
    for arm in experiment.arms:
        by_lr: dict[float, list[Job]] = {}
        for job in tests_of(experiment, arm, done):
            by_lr.setdefault(job.lr, []).append(job)
        for lr, jobs in by_lr.items():
            base = tests_of(experiment, baseline or experiment.baseline, done)
            if experiment.wants is None:
                base = [job for job in base if job.lr == lr]
            cells = [cell(column, jobs, base, done) for column in columns]
            out.append(f"| `{label(arm)}` | {lr:g} | {' | '.join(cells)} |")
    return out


def steering_table(done: Done) -> list[str]:
    """Nll of the class and of the rest, α by α, against SFT; and SFT at the other rates that arms have, if it ran."""
    experiment = EXPERIMENTS["steering"]
    base = tests_of(experiment, "sft", done)
    out = ["| class | reduction | α | learning rate | nll of the class | nll of the rest |", "|---|---|---:|---:|---:|---:|"]
    for name in STEERED_CLASSES:
        arms = [(f"`{by}`", str(alpha), tests_of(experiment, arm, done)) for (of, alpha, by), arm in STEERED.items() if of == name]
        rates = sorted({jobs[0].lr for *_, jobs in arms} - {base[0].lr})
        others = [[job._replace(lr=lr) for job in base] for lr in rates]
        plain = [("`loss: nll`", "", jobs) for jobs in (base, *others) if all(job in done for job in jobs)]
        for by, alpha, jobs in (*plain, *arms):
            cells = " | ".join(cell(column, jobs, base, done) for column in steered_columns(name))
            out.append(f"| {name} | {by} | {alpha} | {jobs[0].lr:g} | {cells} |")
    return out


def steered_columns(name: str) -> tuple[Column, Column]:
    return nll(STEERED_CLASSES[name][1].removeprefix("nll/"), "class"), nll(f"without {name}", "rest")


SHOWN = {
    "`loss: nll`": ("steering", "sft"),
    "`loss: dwl`, `weighted_mean`, α 0.95 on answers": ("steering", "answer 0.95 weighted_mean"),
    "`loss: dwl`, `class_mean`, α 0.5 on answers": ("steering", "answer 0.5 class_mean"),
    "`loss: dwl`, `weighted_mean`, α 0.8 on arguments": ("steering", "arguments 0.8 weighted_mean"),
    "`loss: dwl`, `weighted_mean`, α 0.2 on arguments": ("steering", "arguments 0.2 weighted_mean"),
    "`loss: dft`": ("ends_of_turns", "turns: dft"),
    "`loss: dft`, `dft: {min_weight: 0.1}`": ("ends_of_turns", "turns: dft, min_weight 0.1"),
}
"""The rows of the README's table; both baselines are the same runs, `loss: nll`."""


def readme_table(done: Done) -> list[str]:
    columns = (nll("maths/answer", "nll of answers"), nll("call/arguments", "nll of arguments"), nll("", "nll of all"), RIGHT)
    out = [f"| | {' | '.join(column.head for column in columns)} |", f"|---|{'---:|' * len(columns)}"]
    for text, (name, arm) in SHOWN.items():
        jobs, base = (tests_of(EXPERIMENTS[name], some, done) for some in (arm, EXPERIMENTS[name].baseline))
        out.append(f"| {text} | {' | '.join(cell(column, jobs, base, done) for column in columns)} |")
    return out


def complete(experiment: Experiment, done: Done) -> bool:
    jobs = [job for arm in experiment.arms for job in tests_of(experiment, arm, done) or [None]]
    return None not in jobs and all(job in done for job in [untrained(experiment), *jobs])


def minutes(name: str, done: Done) -> list[str]:
    """How many runs an experiment took, and how long they would on two cores if nothing else needed them."""
    experiment = EXPERIMENTS[name]
    jobs = {untrained(experiment), *(job for arm in experiment.arms for job in tests_of(experiment, arm, done))}
    if experiment.wants is not None:
        jobs |= {job for job in done if job.split == "tune" and job.arm in experiment.arms and job.lr in experiment.lrs}
    seconds = sum(float(done[job]["seconds"]) for job in jobs)
    some = done[untrained(experiment)]
    versions = ", ".join(f"{package} {some[package]}" for package in ("axolotl", "torch", "transformers", "peft"))
    dates = sorted({done[job]["date"] for job in jobs})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return [f"{len(jobs)} runs, {seconds / 120:.0f} minutes on two cores ({some['device']}; {versions}; {when})."]


# Figures


def figure(draw: Callable[[Any, Any], None], width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """In the style of all figures: this package's numbers in `OURS`, what they are compared with in ink."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from dwl_plugin.cli.plots import STYLE

    with style.context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        draw(made, made.subplots(rows, columns, squeeze=False))
    return made


def differences_figure(name: str, done: Done, columns: Sequence[Column]) -> Any:
    """An arm a line: every seed's difference to the baseline, their mean and its interval."""
    from dwl_plugin.cli.plots import INK, OURS

    experiment = EXPERIMENTS[name]
    base = tests_of(experiment, experiment.baseline, done)
    arms = [arm for arm in experiment.arms if arm != experiment.baseline]

    def draw(_: Any, axes: Any) -> None:
        for panel, column in zip(axes[0], columns, strict=True):
            for at, arm in enumerate(reversed(arms)):
                found = [value * column.scale for value in against(tests_of(experiment, arm, done), base, done, column.of)]
                mean, half = interval(found)
                panel.plot(found, [at] * len(found), "o", color=OURS, alpha=0.45, markersize=4, linewidth=0)
                panel.errorbar(mean, at, xerr=half, color=OURS, marker="d", markersize=6, elinewidth=1.5, capsize=3)
            panel.axvline(0, color=INK, linewidth=0.8)
            panel.set_title(f"{column.head}, against {label(experiment.baseline)}")
            panel.set_yticks(range(len(arms)), [label(arm) for arm in reversed(arms)])
            panel.set_ylim(-0.6, len(arms) - 0.4)
        for panel in axes[0][1:]:
            panel.set_yticklabels([])

    return figure(draw, 1.6 + 2.8 * len(columns), 0.7 + 0.27 * len(arms), columns=len(columns))


def steering_figure(done: Done) -> Any:
    """What α gives the class and takes from the rest, against `loss: nll`: a front for each reduction, the others' in grey."""
    from dwl_plugin.cli.plots import INK, OURS

    experiment = EXPERIMENTS["steering"]
    base = tests_of(experiment, experiment.baseline, done)
    fronts = list(dict.fromkeys((name, reduction) for name, _, reduction in STEERED))
    found = {
        point: [interval(against(tests_of(experiment, arm, done), base, done, column.of)) for column in steered_columns(point[0])]
        for point, arm in STEERED.items()
    }

    def draw(_: Any, axes: Any) -> None:
        first: dict[str, Any] = {}
        for panel, (name, reduction) in zip(axes.flat, fronts, strict=True):
            if first.setdefault(name, panel) is not panel:
                panel.sharex(first[name])
                panel.sharey(first[name])
            panel.margins(0.24, 0.1)
            for other in (*(other for other in fronts if other[0] == name and other[1] != reduction), (name, reduction)):
                points = [(alpha, both) for (of, alpha, by), both in found.items() if (of, by) == other]
                (xs, x_halves), (ys, y_halves) = (zip(*(both[at] for _, both in points), strict=True) for at in (0, 1))
                if other[1] != reduction:
                    panel.plot(xs, ys, color=INK, alpha=0.15)
                    continue
                panel.errorbar(xs, ys, y_halves, x_halves, color=OURS, marker="o", markersize=4, elinewidth=0.6, capsize=2)
                for (alpha, _), x, y in zip(points, xs, ys, strict=True):
                    if alpha in ALPHAS[::2]:
                        aside = {"xytext": (-4, 4), "ha": "right"} if alpha == max(ALPHAS) else {"xytext": (4, 4)}
                        panel.annotate(f"α {alpha}", (x, y), textcoords="offset points", fontsize=8, **aside)
            panel.axvline(0, color=INK, linewidth=0.6)
            panel.axhline(0, color=INK, linewidth=0.6)
            panel.set_title(f"{name}\n{reduction}")
        for row in axes:
            row[0].set_ylabel("nll of the rest − SFT's")
        for panel in axes[-1]:
            panel.set_xlabel("nll of the class − SFT's")

    return figure(draw, 9.8, 5.6, rows=2, columns=len(fronts) // 2)


def step_size_figure(done: Done) -> Any:
    """Over the learning rate, every seed a dot; and what is forgotten against what is learned."""
    from dwl_plugin.cli.plots import INK, look_of

    experiment = EXPERIMENTS["dft_step_size"]
    *over_lr, learned, forgotten = columns = COLUMNS["dft_step_size"]
    before = measures(done[untrained(experiment)])

    def draw(made: Any, axes: Any) -> None:
        *panels, last = axes[0]
        for index, arm in enumerate(experiment.arms):
            look = look_of(index - 1, plain=arm == experiment.baseline)
            by_lr = [[measures(done[job]) for job in tests_of(experiment, arm, done) if job.lr == lr] for lr in experiment.lrs]
            values = {column: [[column.of(found) * column.scale for found in some] for some in by_lr] for column in columns}
            means = {column: [statistics.mean(some) for some in lists] for column, lists in values.items()}
            for panel, column in zip(panels, over_lr, strict=True):
                panel.plot(experiment.lrs, means[column], marker="o", markersize=4, label=label(arm), **look)
                for lr, some in zip(experiment.lrs, values[column], strict=True):
                    panel.plot([lr] * len(some), some, "o", color=look["color"], alpha=0.3, markersize=3, linewidth=0)
            last.plot(means[learned], means[forgotten], marker="o", markersize=4, **look)
        point = learned.of(before), forgotten.of(before)
        last.plot(*point, marker="*", markersize=11, color=INK, linewidth=0)
        last.annotate("before", point, textcoords="offset points", xytext=(8, -3), fontsize=8)
        for panel, column in zip(panels, over_lr, strict=True):
            panel.set_xscale("log")
            panel.set_xticks(experiment.lrs, [f"{lr:g}" for lr in experiment.lrs])
            panel.minorticks_off()
            panel.set_xlabel("learning rate")
            panel.set_title(column.head)
        last.set_title(forgotten.head)
        last.set_xlabel("nll of the targets")
        made.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(experiment.arms))

    return figure(draw, 9.2, 2.9, columns=len(over_lr) + 1)


def figures(done: Done) -> dict[str, Any]:
    made: dict[str, Callable[[], Any]] = {
        "steering": lambda: steering_figure(done),
        "rare_class": lambda: differences_figure("rare_class", done, (RIGHT, nll("call/arguments", "nll of arguments"))),
        "dft_step_size": lambda: step_size_figure(done),
        "ends_of_turns": lambda: differences_figure("ends_of_turns", done, COLUMNS["ends_of_turns"][:3]),
        "controllers": lambda: differences_figure("controllers", done, COLUMNS["controllers"][::5]),
    }
    return {name: draw() for name, draw in made.items() if complete(EXPERIMENTS[name], done)}


def blocks(done: Done) -> dict[str, list[str]]:
    """What stands between `<!-- evidence: NAME -->` and `<!-- end of evidence -->`."""
    out = {}
    for name, experiment in EXPERIMENTS.items():
        if complete(experiment, done):
            made = steering_table(done) if name == "steering" else table(name, done)
            out[name] = [*minutes(name, done), "", *made]
    if "controllers" in out:
        arguments, *_, words, _ = PARTS_OF_REPLIES
        out["against_a_constant"] = table("controllers", done, (MEAN_OF_PARTS, arguments, words), "class_mean")
    if all(name in out for name, _ in SHOWN.values()):
        out["readme"] = readme_table(done)
    return out


def filled(text: str, made: dict[str, list[str]]) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- evidence: {name} -->\n{chr(10).join(made[name])}\n<!-- end of evidence -->" if name in made else match.group()

    return re.sub(r"<!-- evidence: (\w+) -->\n.*?<!-- end of evidence -->", fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not what the CSV says")
    options = parser.parse_args()
    done = finished(RESULTS / "runs.csv")
    made = blocks(done)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if filled(text, made) != text:
            if options.check:
                sys.exit(f"{page.relative_to(ROOT)} is not what {parser.prog} makes of the CSV; run it")
            page.write_text(filled(text, made), encoding="utf-8")
    if not options.check:
        from dwl_plugin.cli.plots import to_image

        IMAGES.mkdir(parents=True, exist_ok=True)
        for name, drawn in figures(done).items():
            (IMAGES / f"{name}.png").write_bytes(to_image(drawn, ".png"))


if __name__ == "__main__":
    main()
