"""Two processes side by side on the CPU (gloo), each running the same function: what `accelerate launch --cpu` sets up, kept alive.

    ranks = Ranks(2)                                   # or the `ranks` fixture, one pair for the whole session
    first, second = ranks(train, settings)             # `axolotl train` on both; a `Report` from each
    first, second = ranks(my_function, 3, key=[...])   # any function of a module, in a process group

Importing Axolotl takes each process its fifteen seconds once, not once per case. `Ranks(fresh=True)` forks new ones for each call
from a process that has imported it: for hosts that leave half of the process changed.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tests.hosts import harness


@dataclass
class Report:
    """What a run left behind on one rank: the log, and the parameters it ended with (fp64, whole)."""

    history: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]
    state: dict[str, Any]
    """`stateful_callbacks` of the trainer's state."""

    def logged(self, key: str) -> list[float]:
        return [entry[key] for entry in self.history if key in entry]


def train(settings: dict[str, Any], before: Callable[[Any], None] | None = None) -> Report:
    """`axolotl train` on this rank; `before(trainer)` as in `harness.train`. Works on one rank, without a group, too."""
    parameters: dict[str, torch.Tensor] = {}

    def prepare(trainer: Any) -> None:
        if before is not None:
            before(trainer)
        trainer.add_callback(_Keep(parameters))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a rank of many: then a lone run's forward passes are the same, bit for bit
    try:
        run = harness.train(settings, prepare)
    finally:
        torch.set_num_threads(threads)
    return Report(run.history, parameters, dict(run.trainer.state.stateful_callbacks))


def train_with_deepspeed(settings: dict[str, Any]) -> Report:
    """`axolotl train` with DeepSpeed's engine on a CPU. Accelerate finds no backend for it where there is no accelerator, and would
    run DDP where it is told to use the CPU; this is the one thing it is helped with."""
    from accelerate.state import DistributedType, PartialState

    del os.environ["ACCELERATE_USE_CPU"]
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.NO)  # what it says on a GPU, with another name
    trainers: list[Any] = []
    report = train(settings, trainers.append)
    assert type(trainers[0].model_wrapped).__name__ == "DeepSpeedEngine"
    return report


class _Keep(harness.TrainerCallback):
    """The parameters at the end of training: saving, which comes next, may take the model apart."""

    def __init__(self, into: dict[str, torch.Tensor]) -> None:
        self._into = into

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad:
                self._into[name.removeprefix("module.")] = _whole(parameter).detach().double()


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):  # ZeRO-3 leaves each rank a part
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    whole: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().clone()


class Ranks:
    """`size` processes that wait for calls. A call that fails on any rank raises here, with that rank's traceback."""

    def __init__(self, size: int = 2, fresh: bool = False) -> None:
        self.size, self.fresh = size, fresh
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 300, **kwargs: Any) -> list[Any]:
        """What `function(*args, **kwargs)`, a function of a module, returned on each rank."""
        if not self._processes:
            self._start()
        port = _free_port()
        for pipe in self._pipes:
            pipe.send((port, function, args, kwargs))
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.size:
            # After a failure the others get a little time: they may be waiting for the one that failed.
            failed = any(kind == "error" for kind, _ in answers.values())
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers], 20 if failed else timeout)
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = ("error", f"rank {rank} died")
        errors = [f"rank {rank}: {answer}" for rank, (kind, answer) in sorted(answers.items()) if kind == "error"]
        if errors or len(answers) < self.size:
            self.stop()  # a process that lost its partner is of no use to the next test
            raise RuntimeError("\n".join(errors) or f"no answer from {self.size - len(answers)} ranks in {timeout} s")
        if self.fresh:
            self.stop()
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("forkserver" if self.fresh else "spawn")
        if self.fresh:
            context.set_forkserver_preload(["tests.hosts.warm"])
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
        ACCELERATE_MIXED_PRECISION="no",
    )
    harness.import_host()
    import axolotl.utils.trainer

    # It asks a CUDA build of torch whether two GPUs can talk, and there may be no driver to answer.
    axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
    while True:
        try:
            port, function, args, kwargs = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            answer = ("result", function(*args, **kwargs))
        except BaseException:
            answer = ("error", traceback.format_exc())
        _leave_group()  # also tells a partner that still waits for us
        pipe.send(answer)


def _leave_group() -> None:
    """The hosts keep the process group in singletons; the next call makes its own."""
    import axolotl.utils.distributed
    from accelerate.state import AcceleratorState, GradientState

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    axolotl.utils.distributed.distributed_state = None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
