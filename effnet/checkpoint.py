"""How is a trained network kept? One safetensors file: raw tensors, and a JSON header that says all the rest.

The header's metadata has three entries. `effnet`: one JSON document (Network, Preprocess, labels, recipe, metrics,
versions, extra). `sha256`: the digest of the whole file, computed with these 64 digits as zeros. `format`: "pt", as the
other users of safetensors write it. Nothing here is ever unpickled.

A file is replaced in one step: written beside its place, flushed to the disk, renamed. Whatever happens on the way
(full disk, kill, power), the name holds the old file or the new one. Should the disk itself have damaged the file,
`load` notices by the digest and takes the previous one, saying so.

Names of tensors: the model's weights are bare state-dict keys (`stem.conv.weight`); training state has a prefix
(`optimizer/`, `ema/`, `raw/`).
"""

import contextlib
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from effnet.files import FileError, reason, write_atomically
from effnet.network import Model, build, checked_labels
from effnet.spec import Network, Preprocess
from effnet.value import UsageError

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
DIGEST_KEY, NO_DIGEST = b'"sha256":"', b"0" * 64
TORN = "it was cut off or damaged"


class CheckpointError(FileError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class ForeignError(CheckpointError):
    """A good safetensors file that this package did not write."""


class CheckpointWarning(UserWarning):
    """A previous checkpoint was used in place of a damaged one."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What one file holds. `preprocess` is what the weights expect, `labels` names the outputs in order.

    `recipe`, `metrics`, `versions` and `extra` are plain JSON values. `tensors`: the weights under bare names, training
    state under `prefix/`.
    """

    network: Network
    preprocess: Preprocess
    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...] | None = None
    recipe: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels is not None:
            checked_labels(self.labels, self.network.head.classes)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's own tensors: those whose name has no prefix."""
        return {name: tensor for name, tensor in self.tensors.items() if "/" not in name}

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors stored under `prefix/`, without it.

        >>> from effnet.families import get
        >>> b0 = get("efficientnet_b0")
        >>> kept = Checkpoint(network=b0, preprocess=b0.preprocess, tensors={"ema/stem.conv.weight": torch.zeros(1)})
        >>> list(kept.state("ema")), list(kept.weights)
        (['stem.conv.weight'], [])
        """
        start = f"{prefix}/"
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}


# --- between a model and a checkpoint -------------------------------------------------------------------------------


def from_model(
    model: Model,
    *,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """The checkpoint of `model` as it is now. `state`: further tensors, each under `prefix/name`.

    The tensors are the model's own, not copies: save before training goes on. `UsageError` for a state without prefix.
    """
    bare = [name for name in state or {} if "/" not in name]
    if bare:
        raise UsageError(f"training state needs a prefix such as optimizer/; {some(bare)} has none.")
    return Checkpoint(
        network=model.network,
        preprocess=model.preprocess,
        labels=model.labels,
        recipe=recipe,
        metrics=metrics or {},
        versions=versions(),
        extra=extra or {},
        tensors=model.state_dict() | dict(state or {}),
    )


def to_model(checkpoint: Checkpoint) -> Model:
    """The model that a checkpoint describes, in evaluation mode. `UsageError` lists the weights that do not match."""
    with torch.device("meta"):  # nothing is initialised that would be overwritten
        model = build(checkpoint.network.replace(preprocess=checkpoint.preprocess))
    weights = checkpoint.weights
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    refuse_mismatch(expected, weights, f"the checkpoint of {checkpoint.network.name}")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(dtypes[name], copy=True) for name, tensor in weights.items()}, assign=True)
    model.labels = checkpoint.labels
    return model.eval()


def versions() -> dict[str, str]:
    """The versions that wrote a file, by package."""
    try:
        own = metadata.version("effnet")
    except metadata.PackageNotFoundError:  # run from a source folder
        own = "source"
    return {
        "effnet": own,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def refuse_mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], what: str) -> None:
    """Raises `UsageError` unless `found` has exactly the `expected` names and shapes; lists both sides.

    `what`: the words for what was found ("the file x.pth").
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {tuple(found[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems = (("missing", missing), ("not expected", unknown), ("of another shape", reshaped))
    if any(names for _, names in problems):
        listed = "; ".join(f"{len(names)} {word}: {some(names)}" for word, names in problems if names)
        raise UsageError(f"{what} does not fit: {listed}.")


def some(names: Collection[str], count: int = 5) -> str:
    """The first few of `names`, for a message.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    listed = ", ".join(list(names)[:count])
    return listed if len(names) <= count else f"{listed} and {len(names) - count} more"


# --- writing --------------------------------------------------------------------------------------------------------


def save(path: str | Path, checkpoint: Checkpoint, *, keep_previous: bool = False) -> None:
    """Writes `checkpoint` to `path` in one step; with `keep_previous` the file that was there becomes `PATH.previous`.

    Raises `FileError` if the disk does not take it; the file that was there is then untouched.
    """
    path = Path(path)
    document = json.dumps(_document(checkpoint))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}

    def write(temporary: Path) -> None:
        header = {"format": "pt", "effnet": document, "sha256": NO_DIGEST.decode()}
        write_tensors(temporary, _unshared(tensors), header)
        _seal(temporary)

    keep = keep_previous and _is_whole(path)  # a damaged file must not take the place of a good previous one
    write_atomically(path, write, previous=previous_path(path) if keep else None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file; a disk that does not take it is an `OSError`, as for any other file."""
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata=dict(header))
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def _document(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything but the tensors, as JSON takes it."""
    return {
        "version": FORMAT_VERSION,
        "network": checkpoint.network.to_dict(),
        "preprocess": checkpoint.preprocess.to_dict(),
        "labels": checkpoint.labels,
        "recipe": checkpoint.recipe,
        "metrics": dict(checkpoint.metrics),
        "versions": dict(checkpoint.versions),
        "extra": dict(checkpoint.extra),
    }


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what shares memory with a tensor before it (an EMA at its start): the format has no links."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _seal(path: Path) -> None:
    """Writes the file's digest over the zeros that stand for it in the header."""
    with path.open("r+b") as file:
        header = read_header(file, path)
        digest = file_digest(file, header)
        file.seek(8 + header.index(DIGEST_KEY + NO_DIGEST) + len(DIGEST_KEY))
        file.write(digest.encode())


def previous_path(path: Path) -> Path:
    """Where `save(keep_previous=True)` leaves the file it replaces."""
    return path.with_name(f"{path.name}.previous")


# --- reading --------------------------------------------------------------------------------------------------------


def load(path: str | Path, *, fallback: bool = True) -> Checkpoint:
    """Reads a checkpoint and checks its digest.

    Where that fails, `PATH.previous` is read instead, if there is one and `fallback` is on, with a `CheckpointWarning`
    that names both. Raises `CheckpointError` when neither can be used, `UsageError` for a format from the future.
    """
    path = Path(path)
    previous = previous_path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        first = error
    if not fallback or not previous.exists():
        raise first
    try:
        checkpoint = _load(previous)
    except CheckpointError as second:
        raise CheckpointError(f"{first} The previous one cannot be used either: {second}") from second
    warnings.warn(f"{first} Using {previous} instead.", CheckpointWarning, stacklevel=2)
    return checkpoint


def _load(path: Path) -> Checkpoint:
    with _opened(path) as file:  # once: another process may replace the file meanwhile
        document = read_document(file, path)
        file.seek(0)
        tensors = safetensors.torch.load(file.read())
    version = document.pop("version", None)
    if version != FORMAT_VERSION:
        raise UsageError(f"{path} has format {version}; this effnet reads format {FORMAT_VERSION}. Update effnet.")
    labels = document.pop("labels")
    return Checkpoint(
        network=Network.from_dict(document.pop("network")),
        preprocess=Preprocess.from_dict(document.pop("preprocess")),
        labels=None if labels is None else tuple(labels),
        tensors=tensors,
        **document,
    )


@contextlib.contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    """The file, for reading; what the system refuses is a `CheckpointError`."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}.") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}.") from error


def read_document(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Everything but the tensors, after the digest of the whole file was checked."""
    header = read_header(file, path)
    entries = _metadata(header)
    if entries is None:
        raise CheckpointError(f"{path} is damaged: its header is not JSON, so {TORN} after it was written.")
    if "effnet" not in entries or "sha256" not in entries:
        raise ForeignError(
            f"{path} is a safetensors file, but not an effnet checkpoint: name its network, as in "
            f"create_model(NAME, checkpoint_path={str(path)!r}), or convert it with `effnet convert`."
        )
    if file_digest(file, header) != entries["sha256"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match, so {TORN} after it was written.")
    return json.loads(entries["effnet"])


def _is_whole(path: Path) -> bool:
    """Whether there is a checkpoint at `path`, and its digest is right."""
    try:
        with _opened(path) as file:
            read_document(file, path)
    except CheckpointError:
        return False
    return True


def is_checkpoint(path: Path) -> bool:
    """Whether the file is one of ours, by its header; damaged ones count as long as the header can be read."""
    try:
        with _opened(path) as file:
            return "effnet" in (_metadata(read_header(file, path)) or {})
    except CheckpointError:
        return False


def _metadata(header: bytes) -> dict[str, str] | None:
    """The header's own entries, {} without any; None if it cannot be read."""
    try:
        entries = json.loads(header).get("__metadata__", {})
    except ValueError:
        return None
    return entries if isinstance(entries, dict) else None


def read_header(file: BinaryIO, path: Path) -> bytes:
    """The JSON header of a safetensors file, as bytes; `CheckpointError` for a cut file or another kind.

    `path`: its name, for messages.
    """
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, MAX_HEADER_BYTES))
    if header.startswith(b"{") and len(header) == length:
        return header
    if header.startswith(b"{") or os.fstat(file.fileno()).st_size < 10:
        raise CheckpointError(f"{path} is torn: it ends within its header.")
    if is_pickle(file):
        raise CheckpointError(
            f"{path} is not a safetensors file, whatever its name says: it is a pickle, and was not opened. "
            f"If you trust its origin, name it .pth: then its tensors are read, and nothing else."
        )
    raise CheckpointError(f"{path} is not a safetensors file, or its first bytes were changed: it has no header.")


def is_pickle(file: BinaryIO) -> bool:
    """Whether a file begins as `torch.save` and `pickle.dump` begin theirs (a zip archive, a protocol mark)."""
    file.seek(0)
    start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def file_digest(file: BinaryIO, header: bytes) -> str:
    """SHA-256 of a safetensors file, its own digest counted as zeros."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(8))
    digest.update(_without_digest(header))
    file.seek(8 + len(header))
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _without_digest(header: bytes) -> bytes:
    """The header with zeros in the place of the digest."""
    before, key, after = header.partition(DIGEST_KEY)
    return before + key + NO_DIGEST + after[len(NO_DIGEST) :]
