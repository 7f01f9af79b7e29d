"""Every published integer, to the last digit. The golden file says where each comes from."""

import json
from pathlib import Path

import pytest

from effnet import families
from effnet.cost import cost, stage_rows
from effnet.spec import resolve
from effnet.value import UsageError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "counts.json").read_text())


@pytest.mark.parametrize(("name", "params"), GOLDEN["params"].items())
def test_parameters_are_the_published_count(name: str, params: int) -> None:
    assert cost(families.get(name)).params == params


@pytest.mark.parametrize(("name", "channels"), GOLDEN["bn_channels"].items())
def test_batch_norm_statistics_are_two_per_published_channel(name: str, channels: int) -> None:
    assert cost(families.get(name)).norm_statistics == 2 * channels


@pytest.mark.parametrize(("name", "total"), GOLDEN["keras_total"].items())
def test_parameters_and_statistics_add_up_to_the_tensorflow_total(name: str, total: int) -> None:
    spent = cost(families.get(name))
    assert spent.params + spent.norm_statistics == total
    assert spent.weight_bytes == 4 * total


@pytest.mark.parametrize(("name", "params"), GOLDEN["without_classifier"].items())
def test_parameters_without_the_classifier(name: str, params: int) -> None:
    spent = cost(families.get(name))
    assert spent.params - spent.units[-1].params == params


@pytest.mark.parametrize(("name", "params"), GOLDEN["params_with_21843_classes"].items())
def test_parameters_with_the_imagenet_21k_head(name: str, params: int) -> None:
    assert cost(families.get(name).with_classes(21843)).params == params


@pytest.mark.parametrize(("name", "size", "gmacs"), GOLDEN["gmacs"])
def test_macs_are_the_published_ones_to_the_printed_digit(name: str, size: int, gmacs: float) -> None:
    assert round(cost(families.get(name), size).macs / 1e9, 3) == pytest.approx(gmacs, abs=1e-9)


@pytest.mark.parametrize(("name", "macs"), GOLDEN["macs"].items())
def test_macs_to_the_last_digit_where_they_are_known(name: str, macs: int) -> None:
    assert cost(families.get(name)).macs == macs


@pytest.mark.parametrize(("name", "columns"), GOLDEN["stages"].items())
def test_each_stage_costs_what_the_table_says(name: str, columns: dict[str, list]) -> None:
    network = families.get(name)
    rows = stage_rows(network)
    for key in {"params", "macs"} & columns.keys():
        assert [row[key] for row in rows] == columns[key]
    for stage, widths in enumerate(columns.get("squeeze", [])):
        units = [unit for unit in resolve(network) if unit.name.startswith(f"stages.{stage}.")]
        assert sorted({unit.squeeze_channels for unit in units}) == widths


@pytest.mark.parametrize(("name", "expanded"), GOLDEN["expanded"].items())
def test_scaled_networks_have_the_published_repeats_and_widths(name: str, expanded: list) -> None:
    repeats, widths, stem, head, blocks = expanded
    network = families.get(name)
    assert [stage.repeats for stage in network.stages] == repeats
    assert [stage.width for stage in network.stages] == widths
    assert (network.stem.width, network.head.width) == (stem, head)
    assert sum(unit.name.startswith("stages.") for unit in resolve(network)) == blocks


@pytest.mark.parametrize(("name", "sizes"), GOLDEN["maps"].items())
def test_map_sizes_are_the_published_ones(name: str, sizes: list[int]) -> None:
    rows = stage_rows(families.get(name))
    assert [row["out_size"] for row in rows[:-2]] == sizes  # without head and classifier


def test_every_network_of_the_golden_file_also_exists_with_same_padding_where_it_is_an_efficientnet() -> None:
    for name, params in GOLDEN["params"].items():
        if name.startswith("efficientnet"):
            twin = families.get(f"tf_{name}")
            assert twin.padding == "same"
            assert cost(twin).params == params


def test_the_golden_file_covers_every_network() -> None:
    assert {name.removeprefix("tf_") for name in families.names()} == set(GOLDEN["params"])


def test_b0_drop_path_rises_linearly_and_never_reaches_a_fifth() -> None:
    rates = [unit.drop_path for unit in resolve(families.get("efficientnet_b0")) if unit.name.startswith("stages.")]
    assert rates == pytest.approx([0.0125 * i for i in range(16)])


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'efficientnet_b4'"):
        families.get("eficientnet_b4")


def test_an_unknown_tag_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"known for efficientnet_lite0: efficientnet_lite0\.in1k"):
        families.get("efficientnet_lite0.in22k")


def test_a_tag_brings_its_padding_and_preprocessing() -> None:
    network = families.get("efficientnet_lite1.in1k")
    assert network.padding == "same"
    assert network.preprocess.resize == 274  # floor(240 / 0.875)
    assert network.preprocess.mean == pytest.approx((127 / 255,) * 3)


def test_torchvision_and_lukemelas_spellings_are_aliases() -> None:
    assert families.get("efficientnet_v2_s") is families.get("efficientnetv2_s")
    assert families.get("efficientnet-b3") is families.get("tf_efficientnet_b3")


def test_adversarial_weights_are_normalised_by_one_half() -> None:
    assert families.get("tf_efficientnet_b0.ap_in1k").preprocess.mean == (0.5, 0.5, 0.5)
    assert families.get("tf_efficientnetv2_m.in1k").preprocess.method == "squash"


@pytest.mark.parametrize("name", families.names())
def test_every_network_survives_json(name: str) -> None:
    network = families.get(name)
    assert type(network).from_json(network.to_json()) == network
