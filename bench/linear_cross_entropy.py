"""Forward and backward of the head and its loss: ours beside what a user would otherwise run.

    uv run --group bench python bench/linear_cross_entropy.py                    # the table of bench/RESULTS.md
    uv run --group bench python bench/linear_cross_entropy.py --shape 1024,2304,262144 --softcap 30 --reps 5
    uv run --group bench python bench/linear_cross_entropy.py --figure bench/linear_cross_entropy.png
    uv run --group bench python bench/linear_cross_entropy.py --tables bench/RESULTS.md --shape 2048,576,49152 --dtype float32 \\
        --ignored 0.6 --figure bench/linear_cross_entropy.png                    # the figure again, from what was measured
    uv run --group bench python bench/linear_cross_entropy.py --errors           # of the gradients in bf16

Time: the methods take turns in one process, `--reps` rounds after a warm-up, and every figure is the median of the rounds' ratios
to ours. Memory: a process per method, the peak of its resident set above what it held before the call (on CUDA: of what the
allocator held). `torch's own` is given its best chunk size and only the targets; the full-logits methods see every row, as users
run them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
IGNORED = -100
REFERENCE = "ours, nll"
UNWEIGHTED = ("F.cross_entropy", "TRL chunked_nll", "Apple CCE, compiled", "torch F.linear_cross_entropy, 256 rows", "Liger fused")


@dataclass(frozen=True)
class Case:
    """One row of a table: N tokens, hidden size H, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int
    ignored: float
    dtype: str
    trained: bool
    softcap: float | None

    def __str__(self) -> str:
        cap = f", softcap {self.softcap:g}" if self.softcap else ""
        head = "trained" if self.trained else "frozen"
        return f"{self.tokens:,} × {self.hidden} × {self.vocab:,}, {self.ignored:.0%} ignored, {self.dtype}, {head} head{cap}"

    def differing(self, first: Case) -> str:
        """What a legend says of it: the head, and where another case has something else."""
        said = [f"{'trained' if self.trained else 'frozen'} head"]
        said += [self.dtype] if self.dtype != first.dtype else []
        return ", ".join(said + ([f"{self.ignored:.0%} ignored"] if self.ignored != first.ignored else []))


Results = dict[Case, dict[str, tuple[float, float, float]]]
"""Case -> method -> seconds, ratio of its time to ours, MiB."""

MARKERS = (("o", True), ("o", False), ("s", True), ("s", False))
"""Of a figure's cases; filled or not."""


def tensors(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.tokens, case.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(case.vocab, case.hidden, device=device) * 0.05).to(dtype).requires_grad_(case.trained)
    targets = torch.randint(0, case.vocab, (case.tokens,), device=device)
    targets[torch.rand(case.tokens, device=device) < case.ignored] = IGNORED
    return hidden, weight, targets


def builders(case: Case, device: str) -> dict[str, Callable[[], Loss]]:
    """Name -> how to get its mean loss over targets; a peer is imported when it is built."""
    cap = case.softcap
    token_weight = torch.linspace(0.5, 1.5, case.tokens, device=device)
    exponents = torch.linspace(0.0, 1.0, case.tokens, device=device)

    def mean(targets: torch.Tensor) -> torch.Tensor:
        return (targets != IGNORED).sum()

    def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, weight)
        return cap * torch.tanh(logits / cap) if cap else logits

    def outputs(h: torch.Tensor, w: torch.Tensor) -> Any:
        return type("Outputs", (), {"logits": logits_of(h, w)[None]})()

    def unshifted(t: torch.Tensor) -> torch.Tensor:
        return F.pad(t, (1, 0), value=IGNORED)[None, :-1].clone()  # these losses shift by themselves

    def ours(**options: Any) -> Loss:
        from dwl_plugin import linear_cross_entropy

        return lambda h, w, t: linear_cross_entropy(h, w, t, softcap=cap, **options).loss / mean(t)

    def paying(*names: str) -> Loss:
        """Objectives side by side, each on its share of the tokens."""
        from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term, TokenLoss

        every: dict[str, TokenLoss] = {
            "nll": Power(),
            "threshold": Power(1.0, 0.0, 0.7),
            "focal": Focal(2.0),
            "eaft": EntropyGate(1.0, 20),
        }
        turn = torch.arange(case.tokens, device=device) % len(names)
        return ours(terms=[Term(every[name], (turn == k).float()) for k, name in enumerate(names)])

    def anchored() -> Loss:
        from dwl_plugin.loss.anchor import Anchor

        base = torch.randn(case.tokens, case.hidden, device=device).to(getattr(torch, case.dtype))
        return ours(exponent=1.0, anchor=Anchor(torch.full_like(token_weight, 0.05), base))

    def matmuls() -> Loss:
        """The products that no method can do without, in tiles as ours, and nothing else."""

        @torch.no_grad()
        def multiply(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> None:
            rows = h[(t != IGNORED).nonzero().squeeze(1)]
            grad_h, grad_w = torch.zeros_like(rows), torch.empty_like(w) if case.trained else None
            for start in range(0, len(w), 1024):
                tile = w[start : start + 1024]
                logits = rows @ tile.t()
                grad_h.addmm_(logits, tile)
                if grad_w is not None:
                    torch.mm(logits.t(), rows, out=grad_w[start : start + 1024])

        return lambda h, w, t: (multiply(h, w, t), h[:1].sum())[1]

    def stock() -> Loss:
        return lambda h, w, t: F.cross_entropy(logits_of(h, w).float(), t)

    def full() -> Loss:
        return lambda h, w, t: (F.cross_entropy(logits_of(h, w).float(), t, reduction="none") * token_weight).sum() / mean(t)

    def full_compacted() -> Loss:
        def loss(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            rows = (t != IGNORED).nonzero().squeeze(1)
            nll = F.cross_entropy(logits_of(h[rows], w).float(), t[rows], reduction="none")
            return (nll * token_weight[rows]).sum() / rows.numel()

        return loss

    def trl_dft() -> Loss:
        from trl.trainer.sft_trainer import dft_loss

        return lambda h, w, t: dft_loss(outputs(h, w), unshifted(t))

    def trl_chunked() -> Loss:
        from trl.trainer.sft_trainer import _chunked_cross_entropy_loss

        return lambda h, w, t: _chunked_cross_entropy_loss(h, w, 256, shift_labels=t, final_logit_softcapping=cap)[0]

    def axolotl_dft() -> Loss:
        from axolotl.monkeypatch.loss.dft import dft_loss

        return lambda h, w, t: dft_loss(outputs(h, w), unshifted(t))

    def axolotl_eaft() -> Loss:
        from axolotl.monkeypatch.loss.eaft import eaft_loss

        return lambda h, w, t: eaft_loss(outputs(h, w), unshifted(t))

    def apple() -> Loss:
        from cut_cross_entropy import linear_cross_entropy as cce

        return lambda h, w, t: cce(h, w, t, softcap=cap, impl="cce" if device == "cuda" else "torch_compile")

    def torchs(chunk: int) -> Loss:
        from torch.nn import LinearCrossEntropyOptions

        def loss(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            rows = (t != IGNORED).nonzero().squeeze(1)
            options = LinearCrossEntropyOptions(batch_chunk_size=chunk)
            return F.linear_cross_entropy(h[rows], w, t[rows], options=options)

        return loss

    def liger() -> Loss:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        return lambda h, w, t: fused(h, w, t, softcap=cap)

    weighted = {"token_weight": token_weight, "exponent": exponents, "min_weight": 0.01}
    found: dict[str, Callable[[], Loss]] = {
        "ours, nll": ours,
        "ours, dft": lambda: ours(exponent=1.0),
        "ours, weights, exponents, floor": lambda: ours(**weighted),
        "ours, dft with a threshold": lambda: paying("threshold"),
        "ours, focal": lambda: paying("focal"),
        "ours, eaft": lambda: paying("eaft"),
        "ours, four objectives by class": lambda: paying("nll", "threshold", "focal", "eaft"),
        "ours, asft without its base's forward": anchored,
        "the matmuls alone, torch.mm": matmuls,
        "F.cross_entropy": stock,
        "full logits, weighted": full,
        "full logits, targets only": full_compacted,
        "TRL dft_loss": trl_dft,
        "TRL chunked_nll": trl_chunked,
        "Axolotl dft_loss": axolotl_dft,
        "Axolotl eaft_loss": axolotl_eaft,
        "Apple CCE, compiled": apple,
    }
    if hasattr(F, "linear_cross_entropy") and not cap:
        for chunk in (64, 256, 1024):
            found[f"torch F.linear_cross_entropy, {chunk} rows"] = lambda chunk=chunk: torchs(chunk)
    if device == "cuda":
        found["Liger fused"] = liger
    return found


def methods(case: Case, device: str, only: Sequence[str]) -> dict[str, Loss]:
    """Name -> loss. A method that this machine or these versions lack is left out by name."""
    found = {}
    for name, build in builders(case, device).items():
        if name == REFERENCE or not only or any(part in name for part in only):
            try:
                found[name] = build()
            except ImportError as error:
                print(f"left out: {name} ({error})", file=sys.stderr)
    return found


def step(loss: Loss, tensors_: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, weight, targets = tensors_
    hidden.grad = weight.grad = None
    loss(hidden, weight, targets).backward()


def seconds(case: Case, every: dict[str, Loss], reps: int, device: str) -> dict[str, list[float]]:
    data, names = tensors(case, device), list(every)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        step(every[name], data)
    for _ in range(reps):
        for name in names:
            wait()
            start = time.perf_counter()
            step(every[name], data)
            wait()
            taken[name].append(time.perf_counter() - start)
    return taken


def extra_memory(case: Case, name: str, device: str) -> float:
    """MiB that one call adds at its peak, in this process. What it compiles or tunes is made before."""
    data, loss = tensors(case, device), builders(case, device)[name]()
    # A whole call would leave memory behind that the system has not got back yet; a GPU's is counted by its allocator.
    whole = device == "cuda" or "compiled" in name
    warm = case if whole else Case(16, case.hidden, 512, 0.0, case.dtype, case.trained, case.softcap)
    step(builders(warm, device)[name](), tensors(warm, device))
    data[0].grad = data[1].grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, data)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _resident("VmRSS")
    step(loss, data)
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def measure(case: Case, reps: int, device: str, only: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """name -> (seconds, ratio of its time to ours, MiB)."""
    taken = seconds(case, methods(case, device, only), reps, device)
    reference = taken[REFERENCE]
    found = {}
    for name in taken:
        command = [sys.executable, __file__, "--memory-of", name, "--case", json.dumps(asdict(case))]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        memory = float(child.stdout.split()[-1]) if child.returncode == 0 else float("nan")
        ratio = statistics.median(a / b for a, b in zip(taken[name], reference, strict=True))
        found[name] = (statistics.median(taken[name]), ratio, memory)
    return found


def error_table(device: str) -> str:
    """Relative errors of bf16 gradients against fp64 on the same inputs, over logits of one to twenty nats."""
    tokens, width, vocab, spreads = 512, 576, 8192, (0.05, 0.2, 0.7)
    case = Case(tokens, width, vocab, 0.0, "bfloat16", True, None)
    cells: dict[str, list[str]] = {}
    for spread in spreads:
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        weight = (torch.randn(vocab, width, device=device) * spread).bfloat16().requires_grad_()
        likely = (hidden @ weight.t()).argmax(1).detach()
        coin = torch.rand(tokens, device=device) < 0.5
        targets = torch.where(coin, likely, torch.randint(0, vocab, (tokens,), device=device))
        exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        F.cross_entropy(exact[0] @ exact[1].t(), targets).backward()
        for name, loss in methods(case, device, UNWEIGHTED).items():
            step(loss, (hidden, weight, targets))
            for got, want in zip((hidden, weight), exact, strict=True):
                error = (got.grad.double() - want.grad).norm() / want.grad.norm()
                cells.setdefault(name, []).append(f"{error.item():.1e}")
    heads = [f"{tensor}, {spread:g}" for spread in spreads for tensor in ("∂hidden", "∂W")]
    lines = [f"| spread of W: | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()])


def table(case: Case, found: dict[str, tuple[float, float, float]]) -> str:
    ours = found[REFERENCE]
    lines = [f"### {case}", "", "| | ms | time, × ours | extra MiB | memory, × ours |", "|---|---:|---:|---:|---:|"]
    for name, (duration, ratio, memory) in found.items():
        lines.append(f"| {name} | {duration * 1e3:,.0f} | {ratio:.2f} | {memory:,.1f} | {memory / ours[2]:.2f} |")
    return "\n".join(lines) + "\n"


def read(text: str) -> Results:
    """What `table` wrote: of each case the first table in `text`."""
    results: Results = {}
    for block in text.split("### ")[1:]:
        head, _, body = block.partition("\n")
        found = HEAD.fullmatch(head)
        if found is None:
            continue
        tokens, hidden, vocab = (int(number.replace(",", "")) for number in found.group(1, 2, 3))
        cap = None if found["cap"] is None else float(found["cap"])
        case = Case(tokens, hidden, vocab, int(found["ignored"]) / 100, found["dtype"], found["head"] == "trained", cap)
        rows = [line.strip("| ").split(" | ") for line in body.splitlines() if re.match(r"\| \S.* \| [\d,]+ \| [\d.]+ \|", line)]
        numbers = {name: tuple(float(cell.replace(",", "")) for cell in cells[:3]) for name, *cells in rows}
        results.setdefault(case, {name: (ms / 1e3, ratio, mib) for name, (ms, ratio, mib) in numbers.items()})
    return results


HEAD = re.compile(
    r"([\d,]+) × ([\d,]+) × ([\d,]+), (?P<ignored>\d+)% ignored, (?P<dtype>\w+), (?P<head>frozen|trained) head"
    r"(?:, softcap (?P<cap>[\d.]+))?"
)


def figure(results: Results, path: Path) -> None:
    """Time and memory of every method, a row each, ours in its colour; a marker for each case."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from dwl_plugin.cli.plots import INK, OURS, STYLE, to_image

    def shown(name: str) -> bool:
        return not name.startswith(("the matmuls", "ours, ")) or name in (REFERENCE, "ours, weights, exponents, floor")

    names = [name for name in next(iter(results.values())) if shown(name)][::-1]
    colours = [OURS if name.startswith("ours") else INK for name in names]
    first = next(iter(results))
    with style.context(STYLE):
        drawn = Figure(figsize=(10, 0.27 * len(names) + 1.1), layout="constrained")
        panels = drawn.subplots(1, 2, sharey=True)
        for panel, column, label in zip(panels, (1, 2), ("time, × ours", "extra peak memory, MiB"), strict=True):
            for (case, found), (marker, is_full) in zip(results.items(), MARKERS, strict=False):
                for row, (name, colour) in enumerate(zip(names, colours, strict=True)):
                    look = {"color": colour, "markerfacecolor": colour if is_full else "none"}
                    panel.plot(found[name][column] if name in found else float("nan"), row, marker, markersize=7, **look)
                panel.plot([], [], marker, color=INK, markerfacecolor=INK if is_full else "none", label=case.differing(first))
            panel.set(xscale="log", xlabel=f"{label}, logarithmic", yticks=range(len(names)), yticklabels=names)
            panel.xaxis.set(major_locator=LogLocator(subs=(1.0, 2.0, 5.0)), major_formatter="{x:g}")
        for tick, colour in zip(panels[0].get_yticklabels(), colours, strict=True):
            tick.set(color=colour, fontweight="bold" if colour == OURS else "normal")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
        drawn.suptitle(
            f"Head and loss, forward and backward: {first.tokens:,} tokens, {first.ignored:.0%} of them ignored, "
            f"H = {first.hidden}, V = {first.vocab:,}, {first.dtype}",
            x=0.01,
            ha="left",
            fontsize=9,
            fontweight="bold",
        )
        path.write_bytes(to_image(drawn, path.suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="tokens,H,V; may be given again", default=None)
    parser.add_argument("--ignored", type=float, nargs="*", default=[0.6, 0.0])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--head", nargs="*", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--softcap", type=float, default=None)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=(), help="parts of the methods' names; ours is always there")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--errors", action="store_true", help="only how exact each method's bf16 gradients are")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--tables", type=Path, help="measure nothing: the figure of what tables of the last time say")
    options = parser.parse_args()
    if options.memory_of:
        print(extra_memory(Case(**json.loads(options.case)), options.memory_of, options.device))
        return
    if options.errors:
        print(error_table(options.device))
        return
    shapes = options.shape or ["2048,576,49152", "2048,896,151936"]
    stored = None if options.tables is None else read(options.tables.read_text(encoding="utf-8"))
    results: Results = {}
    for shape in shapes:
        tokens, hidden, vocab = (int(part) for part in shape.split(","))
        for dtype in options.dtype:
            for ignored in options.ignored:
                for head in options.head:
                    case = Case(tokens, hidden, vocab, ignored, dtype, head == "trained", options.softcap)
                    if stored is not None:
                        results[case] = stored[case]
                        continue
                    results[case] = measure(case, options.reps, options.device, options.only)
                    print(table(case, results[case]), flush=True)
    if options.figure:
        figure(results, options.figure)


if __name__ == "__main__":
    main()
