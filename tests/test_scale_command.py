"""`effnet scale` as it is typed."""

import inspect
from pathlib import Path

import pytest

from effnet import families
from effnet.cost import cost
from effnet.latency import Error, LatencyTable
from effnet.scaling import scale
from effnet.spec import Network
from tests.conftest import write_images
from tests.test_cli import TINY, refused, run
from tests.test_factory import EXAMPLES

B0 = families.get("efficientnet_b0")


def test_a_budget_gives_one_document_and_a_network_that_every_verb_takes(tmp_path: Path) -> None:
    file = tmp_path / "net.json"
    words = ("scale", "efficientnet_b0", "--budget", "macs=1.5G", "--budget", "params=8M", "--along", "free")
    document = run(*words, "--save", file, "--json").document
    made = Network.from_json(file.read_text())
    assert made == Network.from_dict(document["definition"])
    spent = cost(made)
    assert (document["after"]["macs"], document["after"]["params"]) == (spent.macs, spent.params)
    assert document["before"]["macs"] == cost(B0).macs
    assert [(row["metric"], row["limit"], row["binding"]) for row in document["limits"]] == [
        ("macs", 1.5e9, True),
        ("params", 8e6, True),
    ]
    assert document["limits"][1]["left_percent"] == pytest.approx(100 * (1 - spent.params / 8e6))
    assert run("info", file, "--json").document["macs"] == spent.macs
    again = run("scale", file, "--phi", -1, "--json").document
    assert again["before"]["macs"] == spent.macs > again["after"]["macs"]


def test_a_saved_network_can_be_planned_and_trained(tmp_path: Path) -> None:
    base, file = tmp_path / "tiny.json", tmp_path / "wide.json"
    base.write_text(TINY.to_json())
    run("scale", base, "--width", 2, "--save", file)
    data = write_images(tmp_path / "data", {"cat": 14, "dog": 14})
    settings = ("--set", "epochs=1", "--set", "batch=8", "--set", "precision=float32")
    assert run("plan", data, "--model", file, *settings, "--json").document["rows"]
    words = ("train", data, "--model", file, *settings, "--out", tmp_path / "run", "--json")
    assert Path(run(*words).document["checkpoint"]).is_file()


def test_phi_factors_and_people(tmp_path: Path) -> None:
    document = run("scale", "efficientnet_b0", "--phi", 1, "--coefficients", "1.3,1.05,1.2", "--json").document
    assert (document["depth"], document["resolution"]) == (1.3, 269)
    b1 = run("scale", "efficientnet_b0", "--depth", 1.1, "--resolution", 240, "--json").document
    assert b1["after"]["macs"] == cost(families.get("efficientnet_b1")).macs
    shown = run("scale", "efficientnet_b0", "--budget", "macs=800M").out
    assert "binds" in shown and "385,814,752" in shown and "-> " in shown
    deep = run("scale", "efficientnet_b0", "--depth", 2, "--deepen", "0,1,1,1,1,1.5,2", "--json").document
    assert [stage["repeats"] for stage in deep["definition"]["stages"]] == [1, 4, 4, 6, 6, 12, 4]
    small = run("scale", "efficientnet_b0", "--size", 128, "--phi", 1, "--max-resolution", 140, "--json").document
    assert (small["before"]["resolution"], small["resolution"]) == (128, 140)


def test_a_factory_is_scaled_by_its_file() -> None:
    words = ("scale", f"{EXAMPLES / 'own_factory.py'}:convnet", "--budget", "macs=100M", "--json")
    document = run(*words).document
    assert document["after"]["macs"] <= 1e8 and document["definition"] is None
    assert "build it with the factors" in refused(*words, "--save", "net.json")
    assert "Did you mean 'convnet'" in refused("scale", f"{EXAMPLES / 'own_factory.py'}:convnot", "--phi", 1)


def test_latency_is_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        """Milliseconds by multiply-adds and size, not quite steady."""

        error = Error(median=0.05, p90=0.125, worst=0.2, networks=30)

        def predict(self, network: Network) -> float:
            return cost(network).macs / 1e8 + (network.resolution % 7) / 50

    asked = []

    def table(**settings: object) -> Table:
        asked.append(settings)
        return Table()

    monkeypatch.setattr("effnet.bench.table", table)
    words = (
        "scale",
        "efficientnet_b0",
        "--budget",
        "latency_ms=9.5",
        "--budget",
        "macs=1.5G",
        "--threads",
        2,
        "--json",
    )
    document = run(*words).document
    assert asked == [{"threads": 2, "precision": "float32"}]
    assert document["latency_error"]["median"] == 0.05  # how far to trust it is part of the answer
    assert "median error 5.0%" in run(*words[:-1]).out
    assert [(row["metric"], row["binding"]) for row in document["limits"]] == [("latency_ms", True), ("macs", False)]
    assert Table().predict(Network.from_dict(document["definition"])) <= 9.5
    larger = [scale(B0, document["phi"] + step / 500) for step in range(20, 700)]  # each scaled and judged alone
    assert all(Table().predict(network) > 9.5 for network in larger)
    assert set(inspect.signature(LatencyTable.predict).parameters) >= set(inspect.signature(Table.predict).parameters)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say one way to scale"),
        (("--phi", "1", "--budget", "macs=1G"), "given: --phi and --budget"),
        (("--phi", "1", "--depth", "2"), "given: --phi and factors"),
        (("--phi", "nan"), "phi is nan"),
        (("--phi", "inf"), "phi is inf"),
        (("--phi", "-30"), "must be at least 32"),
        (("--depth", "0"), "depth factor is 0"),
        (("--width", "-1"), "width factor is -1"),
        (("--resolution", "20"), "resolution (px, not a factor) is 20"),
        (("--budget", "macs"), "a limit is 400M, 1.5G, 5e6 or 20"),
        (("--budget", "macs=fast"), "a limit is 400M"),
        (("--budget", "macs=-1G"), "a limit is 400M"),
        (("--budget", "macs=nan"), "a limit is 400M"),
        (("--budget", "macs=0"), "budget on macs is 0"),
        (("--budget", "mac=1G"), "Did you mean 'macs'"),
        (("--budget", "macs=1G", "--budget", "macs=2G"), "two limits on macs"),
        (("--budget", "macs=1k"), "nothing fits: the smallest network"),
        (("--budget", "params=6M", "--along", "resolution"), "nothing stops"),
        (("--budget", "macs=1G", "--along", "wide"), "along 'wide' is not one of"),
        (("--phi", "1", "--coefficients", "1.2,1.1"), "is not 3 numbers"),
        (("--phi", "1", "--coefficients", "0.9,1.1,1.1"), "alpha is 0.9"),
        (("--phi", "1", "--coefficients", "gone.json"), "--coefficients gone.json: No such file"),
        (("--phi", "1", "--coefficients", "results/pareto.json"), "is not what `effnet scale MODEL --search-"),
        (("--phi", "1", "--deepen", "1,1"), "is not 7 numbers"),
        (("--phi", "1", "--save", "net.txt"), "does not end in .json"),
        (("--search-coefficients",), "name what on with --data"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], message: str) -> None:
    assert message in refused("scale", "efficientnet_b0", *words)


def test_the_coefficients_are_searched_for_on_data_and_kept(tmp_path: Path) -> None:
    base = tmp_path / "tiny.json"
    base.write_text(TINY.to_json())
    data = write_images(tmp_path / "data", {"cat": 20, "dog": 20})
    study = tmp_path / "study.jsonl"
    words = ["scale", base, "--search-coefficients", "--data", data, "--epochs", 1, "--seeds", 2, "--tolerance", 0.3]
    words += ["--study", study, "--set", "batch=8", "--workers", 0]
    result = run(*words, "--json")
    document = result.document
    assert 0 <= document["winner"]["mean"] <= 1
    assert len(document["standings"]) >= 1 and len(study.read_text().splitlines()) == document["evaluations"] + 1
    assert f"{document['evaluations']}/{document['evaluations']}" in result.err
    assert Path(document["figure"]).read_bytes().startswith(b"\x89PNG")
    found = tmp_path / "found.json"
    found.write_text(result.out)
    by = run("scale", base, "--phi", 1, "--coefficients", found, "--json").document["coefficients"]
    assert by == document["winner"]["candidate"]["coefficients"]
    again = run(*words)
    assert "winner" in again.out and str(study) in again.out
    message = refused_at_the_end(*words, "--target", 3)
    assert "another target" in message


def refused_at_the_end(*words: object) -> str:
    result = run(*words)
    assert result.code == 2
    return result.err.splitlines()[-1]
