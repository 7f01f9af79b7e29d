"""How are weights of other code bases read from and written to files? Tensors only, and nothing is ever executed.

A pickle can run any program when it is opened. `torch.load(weights_only=True)` builds tensors and plain containers and
refuses the rest; it is the only way in here, for files that are named as pickles (.pth, .pt, .bin). A pickle that is
named .safetensors is refused.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from effnet.checkpoint import is_pickle, read_header, some, write_tensors
from effnet.files import write_atomically
from effnet.value import UsageError, check_choice

Array = Tensor | np.ndarray  # numpy only under TensorFlow's names

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training scripts keep weights; averages first
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_foreign(path: str | Path) -> dict[str, Array]:
    """The state dict in a weights file of another code base: .safetensors, .pth, .pt, .bin, or .npz (TensorFlow's).

    Pickles are opened with `weights_only=True` alone, and never under the name of safetensors. Raises `UsageError`.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}.")
    check_choice(f"{path.name}: the suffix", path.suffix, SUFFIXES)
    if path.suffix == ".npz":
        return _read_npz(path)
    with path.open("rb") as file:
        if path.suffix == ".safetensors" or not is_pickle(file):
            file.seek(0)
            return _read_safetensors(file, path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a strange pickle can cause, it is not ours
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it wants to run {refused[1]}" if refused else str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} cannot be read as a file of tensors alone: {reason}.") from error
    return _unwrapped(loaded, path)


def _read_safetensors(file: BinaryIO, path: Path) -> dict[str, Array]:
    read_header(file, path)  # says what else it is
    file.seek(0)
    try:
        return _unwrapped(safetensors.torch.load(file.read()), path)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as a file of arrays: {error}") from error


def _unwrapped(loaded: Any, path: Path) -> dict[str, Array]:
    """The state dict itself, out of a training script's dictionary and of wrappers' prefixes."""
    state = loaded
    if isinstance(loaded, dict):
        state = next((loaded[name] for name in NESTED if isinstance(loaded.get(name), dict)), loaded)
    expected = f"weights are a dictionary of tensors, bare or under {', '.join(NESTED)}"
    if not isinstance(state, dict) or not state:
        raise UsageError(f"{path} holds no state dict; {expected}.")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UsageError(f"{path} holds {some(others)} among its tensors; {expected}.")
    state = {
        name: tensor for name, tensor in state.items() if name != "n_averaged"
    }  # a count of PyTorch's AveragedModel
    for wrapper in WRAPPERS * 2:  # either may be around the other
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def write_foreign(path: str | Path, state: Mapping[str, Array]) -> None:
    """Writes a state dict in one step, by suffix: .safetensors; .pth, .pt, .bin (torch.save); .npz for numpy arrays.

    Raises `UsageError` for another suffix, or for arrays in a file of tensors and the other way round.
    """
    path = Path(path)
    check_choice(f"{path.name}: the suffix", path.suffix, SUFFIXES)
    is_numpy = any(isinstance(array, np.ndarray) for array in state.values())
    if is_numpy != (path.suffix == ".npz"):
        wanted = ".npz (numpy arrays under TensorFlow's names)" if is_numpy else ", ".join(SUFFIXES[:-1])
        raise UsageError(f"{path.name}: these weights are written as {wanted}.")
    write_atomically(path, lambda temporary: _write(temporary, path.suffix, state))


def _write(path: Path, suffix: str, state: Mapping[str, Any]) -> None:
    if suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **state)
    elif suffix == ".safetensors":
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_tensors(path, tensors, {"format": "pt"})
    else:
        buffer = io.BytesIO()  # torch.save straight to a full disk does not say so
        torch.save(dict(state), buffer)
        path.write_bytes(buffer.getvalue())
