"""How do several processes train one model? The one door to `torch.distributed`, and to Ray (`ray_cluster`).

`torchrun --nproc_per_node=N -m effnet train ...` starts N processes of the same command; `joined` lets them find each
other (NCCL between GPUs, gloo otherwise) and every function here does nothing in a process that is alone. Each process
holds the whole model and sees its share of every batch. What must be the same everywhere is summed, in three places:
the gradients (`sum_gradients`, once a step, one message), the moments of batch norm (`SharedNorm`, so that N processes
normalise by the statistics of the whole batch, as one would), and what a step reports (`total`).

Sums are explicit instead of `DistributedDataParallel`: then a step is the same few lines for one process, many, and
accumulated micro-batches, and the weighted mean over the whole batch stays exact when shares weigh differently. The
price: gradients travel after the backward pass, not during it.
"""

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous

from effnet.value import UsageError

T = TypeVar("T")

NO_RAY = "--engine ray needs ray, which is not installed: pip install 'effnet[cluster]'"


class Lost(UsageError):
    """Another process of the run is gone."""


class Elsewhere(UsageError):
    """What the first process refused; it says so itself."""


# --- who is here ----------------------------------------------------------------------------------------------------


def world() -> int:
    """The number of processes that train together; 1 for a process that is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0. Number 0 writes the files and talks to people."""
    return dist.get_rank() if world() > 1 else 0


def local_world() -> int:
    """How many of the processes share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def restarts() -> int:
    """How often `torchrun` has started these processes anew because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined(device: str) -> Generator[str]:
    """Within, the processes that `torchrun` started are one group; yields this one's device (`cuda` -> `cuda:1`).

    A process that nobody started so stays alone. `UsageError` for more processes on a machine than it has GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UsageError(f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}.")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    with _talking():
        store, number, count = _own_store()
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _own_store() -> tuple[dist.Store, int, int]:
    """The store in which these processes find each other, this one's number, and how many there are.

    `torchrun` (torch 2.13) keeps one store over restarts, with the addresses of the dead in it. So process 0 draws a
    name for this start, and the others ask for it, each under a word of its own that no dead one could have used.
    """
    store, number, count = next(rendezvous("env://"))
    word = uuid.uuid4().hex
    if number:
        store.set(f"asks/{number}", word)
        name = store.get(f"told/{word}").decode()  # waits for it
        store.add(f"here/{name}", 1)
        return dist.PrefixStore(name, store), number, count
    end = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"here/{word}", 0) < count - 1:
        for asking in (f"asks/{other}" for other in range(1, count)):
            if store.check([asking]):
                store.set(f"told/{store.get(asking).decode()}", word)
        if time.monotonic() > end:
            raise RuntimeError("not all of them came")
        time.sleep(0.01)
    return dist.PrefixStore(word, store), number, count


@contextmanager
def _talking() -> Generator[None]:
    """What the network says when a peer has died becomes one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise Lost(f"process {rank()} lost the others of this run ({reason:.200}).") from error


@contextmanager
def ray_cluster() -> Generator[Any]:
    """Within, the package `ray` is connected: to the cluster that `RAY_ADDRESS` names, else to one made here for it.

    Who is connected already stays so. `UsageError` where ray is not installed, or no cluster answers.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError(NO_RAY) from None
    started_here = not ray.is_initialized()
    if started_here:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # "local": not the cluster that somebody else has left running on this machine
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if "RAY_ADDRESS" not in os.environ:
            options |= {"address": "local", "include_dashboard": False}
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            place = os.environ.get("RAY_ADDRESS", "this machine")
            raise UsageError(f"no Ray cluster answers at {place}: {' '.join(str(error).split()):.200}") from None
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


def last_line(error: Exception) -> str:
    """What an error of Ray comes down to: above its last line stand the traces of other machines."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _knock(address: str) -> None:
    """`OSError` where nobody listens at HOST:PORT: Ray (2.60) itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


# --- what is said to the others -------------------------------------------------------------------------------------


def first(compute: Callable[[], T]) -> T:
    """What `compute` returns in process 0, in all of them. Its `UsageError` ends them all, said by process 0 alone."""
    if world() == 1:
        return compute()
    said: list[Any] = [None, None]
    refused: UsageError | None = None
    if rank() == 0:
        try:
            said[0] = compute()
        except UsageError as error:
            said[1], refused = str(error), error
    with _talking():
        dist.broadcast_object_list(said, src=0)
    if refused is not None:
        raise refused
    if said[1] is not None:
        raise Elsewhere(said[1])
    return said[0]


def gathered(value: T) -> list[T]:
    """Every process's `value`, in their order, in process 0; nothing in the others."""
    if world() == 1:
        return [value]
    found: list[Any] | None = [None] * world() if rank() == 0 else None
    with _talking():
        dist.gather_object(value, found, dst=0)
    return found or []


def total(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor that each of them has; every process gets the same bits."""
    if world() == 1:
        return values
    summed = values.clone()
    with _talking():
        dist.all_reduce(summed)
    return summed


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over all processes; all of them in one message."""
    if world() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = total(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, part in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def spread(model: nn.Module) -> None:
    """Gives every process the weights and statistics of process 0."""
    if world() == 1:
        return
    with _talking():
        for tensor in model.state_dict().values():
            whole = tensor.contiguous()  # channels last is not a form that is sent
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


# --- batch norm over all shares -------------------------------------------------------------------------------------


class SharedNorm(nn.BatchNorm2d):
    """Batch norm by the mean and variance of the whole batch; in evaluation and alone it is `BatchNorm2d`.

    The processes add up pixels, sums and squared sums in float64; backward, the two sums of the gradient. Without
    gradients nothing is learned together (`optim.renew_norms`): then each process counts for itself. PyTorch's own
    `SyncBatchNorm` refuses CPUs; this is plain tensor arithmetic, the same on every device.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if world() == 1 or not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        with torch.no_grad():
            pixels = input.numel() // input.shape[1]
            variance, mean = torch.var_mean(input.float(), (0, 2, 3), correction=0)
            variance, mean = variance.double(), mean.double()
            mine = torch.cat([mean * pixels, (variance + mean * mean) * pixels, mean.new_tensor([pixels])])
            sums, squares, count = total(mine).split([len(mean), len(mean), 1])
            mean = sums / count
            variance = (squares / count - mean * mean).clamp_(min=0)
            self._remember(mean, variance * count / (count - 1).clamp_(min=1))
            rstd = torch.rsqrt(variance + self.eps)
        return _Normalise.apply(input, self.weight, self.bias, mean.float(), rstd.float(), count.float())

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics, as PyTorch does; `variance` is the unbiased one."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.float(), momentum)
        self.running_var.lerp_(variance.float(), momentum)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias, where mean and rstd are of all processes' x: the backward knows that.

    Computed in float32; x and y, and what is kept of x for the backward pass, are in the type of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd, count)
        scale = weight * rstd
        return torch.addcmul(_on_maps(bias - mean * scale), x.float(), _on_maps(scale)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        grad = grads[0].float()
        normal = (x.float() - _on_maps(mean)) * _on_maps(rstd)
        mine = torch.cat([grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))])
        grad_bias, grad_weight = mine.split(len(mean))  # of this share: they are summed with all gradients
        ours, along = (total(mine.double()) / count).float().split(len(mean))
        grad_x = _on_maps(weight * rstd) * (grad - _on_maps(ours) - normal * _on_maps(along))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None


def _on_maps(vector: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return vector[None, :, None, None]


def share_norms(model: nn.Module) -> None:
    """Makes every batch norm of `model` a `SharedNorm`, in place, if there is more than one process."""
    for module in model.modules() if world() > 1 else ():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedNorm  # the same tensors, hooks and name; only `forward` is another
