"""How does a model travel as a folder: config.json, model.safetensors, README.md, as the Hugging Face hub keeps them?

`save_hub` writes such a folder; `read_hub` reads one, ours or timm's, from wherever `fetch` gets its files: a local
folder or the hub (`huggingface_hub`, imported only then). timm's config.json names an architecture that we must know;
ours carries the Network itself.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effnet import checkpoint, families
from effnet.checkpoint import Checkpoint
from effnet.cost import cost
from effnet.dialects import from_effnet, native, read_foreign, recognise, to_effnet, write_foreign
from effnet.network import Model
from effnet.spec import Network, Preprocess
from effnet.value import UsageError

Fetch = Callable[[str], Path | None]  # the name of a file in the folder -> where it is, None if the folder has none

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


# --- where the files come from --------------------------------------------------------------------------------------


def in_folder(folder: Path) -> Fetch:
    """Files of a local folder; `UsageError` if there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}.")

    def fetch(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return fetch


def on_hub(repository: str) -> Fetch:
    """Files of `owner/name` or `owner/name@revision` on the Hugging Face hub, through its cache on this machine."""
    name, _, revision = repository.partition("@")
    if len(name.split("/")) != 2:
        raise UsageError(f"{repository!r} is no model on the Hugging Face hub: they are called owner/name.")

    def fetch(file: str) -> Path | None:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        try:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision or None))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:
            raise UsageError(
                f"cannot get {file} of {name}: the Hugging Face hub is not reached, and it is not in the local cache. "
                f"A folder with the same files works offline: local-dir:PATH."
            ) from error
        except (OSError, ValueError) as error:  # no such repository, gated, a malformed name
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"cannot get {file} of {name} from the Hugging Face hub: {reason}") from error

    return fetch


# --- reading --------------------------------------------------------------------------------------------------------


def read_hub(fetch: Fetch, where: str) -> Checkpoint:
    """The model in a folder of the hub's kind. `where`: its name, for messages. Raises `UsageError`."""
    weights = fetch_weights(fetch, where)
    if checkpoint.is_checkpoint(weights):
        return checkpoint.load(weights)
    config = _config(fetch, where)
    state = read_foreign(weights)
    dialect = recognise(state)
    if "effnet" in config:
        network = Network.from_dict(config["effnet"]["network"])
    else:
        network = native(timm_network(config, where), dialect)
    return Checkpoint(
        network=network,
        preprocess=network.preprocess,
        labels=_labels(config, network.head.classes),
        tensors=to_effnet(state, network, dialect),
    )


def fetch_weights(fetch: Fetch, where: str) -> Path:
    """The weights file of a folder, safetensors if it has them."""
    found = next((path for name in WEIGHTS if (path := fetch(name)) is not None), None)
    if found is None:
        raise UsageError(f"{where} holds no weights ({' or '.join(WEIGHTS)}).")
    return found


def _config(fetch: Fetch, where: str) -> dict[str, Any]:
    path = fetch("config.json")
    if path is None:
        raise UsageError(f"{where} holds no config.json, which would name its network.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"config.json of {where} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UsageError(f"config.json of {where} is not an object of fields.")
    return config


def timm_network(config: Mapping[str, Any], where: str) -> Network:
    """The network that a timm config.json describes, with the preprocessing that its accuracy was measured with."""
    if not isinstance(config.get("architecture"), str):
        raise UsageError(f"config.json of {where} names no architecture, nor has it an `effnet` entry.")
    network = families.get(config["architecture"])
    settings = config.get("pretrained_cfg") or config  # timm before 0.9 had no inner object
    channels, _, size = settings.get("test_input_size") or settings.get("input_size") or (3, 0, network.resolution)
    crop = settings.get("test_crop_pct") or settings.get("crop_pct") or 0.875
    preprocess = families.cropped(
        size,
        crop,
        settings.get("interpolation") or "bicubic",
        tuple(settings.get("mean") or network.preprocess.mean),
        tuple(settings.get("std") or network.preprocess.std),
        "squash" if settings.get("crop_mode") == "squash" else "resize_crop",
    )
    classes = config.get("num_classes") or settings.get("num_classes") or network.head.classes
    stem = network.stem.replace(in_channels=channels)
    return network.with_classes(classes).replace(preprocess=preprocess, resolution=size, stem=stem)


def _labels(config: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """The names of the outputs, where a config has one for each."""
    names = config.get("label_names") or config.get("labels")
    return tuple(names) if isinstance(names, list) and len(names) == len(set(names)) == classes else None


# --- writing --------------------------------------------------------------------------------------------------------


def save_hub(
    folder: str | Path,
    model: Model,
    *,
    dialect: str = "effnet",
    metrics: Mapping[str, float] | None = None,
    licence: str = "other",
    about: str = "",
) -> Path:
    """Writes `model` as a folder that the hub takes as it is; nothing is uploaded. Returns the folder.

    `dialect`: "effnet" writes a checkpoint with its checksum; "timm" writes weights that timm loads by itself.
    `metrics`, `licence` (an SPDX name) and `about` (a paragraph) go into the model card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if dialect == "effnet":
        checkpoint.save(folder / WEIGHTS[0], checkpoint.from_model(model, metrics=metrics))
    else:
        write_foreign(folder / WEIGHTS[0], from_effnet(model.state_dict(), model.network, dialect))
    (folder / "config.json").write_text(json.dumps(_config_of(model), indent=2) + "\n")
    (folder / "README.md").write_text(model_card(model, metrics=metrics or {}, licence=licence, about=about))
    return folder


TIMM_NAMES = {ours: theirs for theirs, ours in families.ALIASES.items() if theirs.endswith("_100")}


def _config_of(model: Model) -> dict[str, Any]:
    """Our own entry, and timm's words for those who read them."""
    network, preprocess = model.network, model.preprocess
    return {
        "architecture": TIMM_NAMES.get(network.name, network.name),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": model.labels,
        "pretrained_cfg": {
            "input_size": [network.stem.in_channels, preprocess.size, preprocess.size],
            "crop_pct": preprocess.size / preprocess.resize,
            "crop_mode": "squash" if preprocess.method == "squash" else "center",
            "interpolation": preprocess.interpolation,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "num_classes": model.num_classes,
        },
        "effnet": {"network": network.to_dict()},
    }


def model_card(model: Model, *, metrics: Mapping[str, float], licence: str, about: str) -> str:
    """The README.md of a model: what it is, what it costs, how it was judged, how to use it."""
    network, preprocess = model.network, model.preprocess
    price = cost(network, preprocess.size)
    labels = ", ".join(model.labels) if model.labels and len(model.labels) <= 50 else f"{model.num_classes} classes"
    facts = {
        "Network": f"{network.name} ({network.source})",
        "Outputs": labels,
        "Parameters": f"{price.params:,}",
        "Multiply-adds": f"{price.macs:,} at {preprocess.size} px",
        "Input": _words(preprocess),
        **{name: f"{value:g}" for name, value in metrics.items()},
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
license: {licence}
library_name: effnet
pipeline_tag: image-classification
tags: [image-classification, effnet]
---
# {network.name}

{about or "An image classifier trained with effnet."}

| | |
| --- | --- |
{rows}

```python
import effnet

model = effnet.load_model("hf-hub:OWNER/NAME")  # or "local-dir:FOLDER"
print(next(effnet.predict(model, ["photo.jpg"])))
```
"""


def _words(preprocess: Preprocess) -> str:
    """Preprocessing as a sentence."""
    size, resize = preprocess.size, preprocess.resize
    how = {
        "squash": f"resized to {size} x {size} px",
        "resize_crop": f"shorter side to {resize} px, centre crop of {size} px",
        "crop_resize": f"centre crop of {size / resize:.3f} of the shorter side, then to {size} px",
    }[preprocess.method]
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (preprocess.mean, preprocess.std))
    return f"RGB, {how} ({preprocess.interpolation}), mean {mean}, std {std}"
