"""The measures in a report: their own numbers, with cost and meaning, and a reason where one does not apply."""

import json
import math
import warnings
from itertools import pairwise

import pytest
import torch
from test_report import Links
from torch import nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc
from flatcore.errors import FlatcoreWarning
from flatcore.measures.catalogue import CATALOGUE, chosen
from flatcore.report.measure_rows import bar_cell, layer_rows, longest_bar, measure_rows
from flatcore.results import Estimate

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = set(CATALOGUE)


def objective(scale=1.0, activation=nn.ReLU, outputs=4, loss=None, target=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), activation(), nn.Linear(7, outputs)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    target = torch.randint(4, (25,)) if target is None else target
    return fc.Objective(model, loss or nn.CrossEntropyLoss(), (torch.randn(25, 6).double(), target))


@pytest.fixture(scope="module")
def everything():
    """One net that all measures apply to but the width's value, and one of which only the path norm fails."""
    names = [name for name in CATALOGUE if name != "local_entropy"]  # seconds, and like the others
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FlatcoreWarning
        )  # of nets that were never trained; in the notes as well
        first = fc.report(objective(), name="relu", measures=names, k=2, rtol=0.1, seed=4)
        second = fc.report(objective(2.0, nn.Tanh), name="tanh", measures=names, k=2, rtol=0.1, seed=4)
    return first, second


def text_of(printed, width=200):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(printed)
    return capture.get()


def test_catalogue_holds_every_measure():
    # What gives a Measure, but for the one that needs a step size.
    functions = [getattr(fc.measures, n) for n in fc.measures.__all__]
    found = {f.__name__ for f in functions if getattr(f, "__annotations__", {}).get("return") == "Measure"}
    assert found - {"edge_of_stability"} == PUBLISHED
    assert all(entry.meaning and "\n" not in entry.meaning for entry in CATALOGUE.values())


def test_values_are_those_of_direct_calls(everything):
    report = everything[0]
    found = {m.name: m for m in report.measures}
    own = objective()
    flat = fc.measures.relative_flatness(own, "2", rtol=0.05, seed=4)
    assert found["relative_flatness"].measure.value == pytest.approx(flat.value, rel=1e-12)
    assert found["fisher_rao"].measure.value == fc.measures.fisher_rao(own).value
    sharp = fc.measures.normalized_sharpness(own, curvature="ggn", rtol=0.05, seed=4)
    assert found["normalized_sharpness"].measure.value == sharp.value
    assert found["path_norm"].measure.value == fc.measures.path_norm(own).value
    energy = fc.measures.local_energy(own, draws=20, seed=4)
    assert found["local_energy"].measure.value == float(energy.value[-1])
    assert all(m.has_value for m in report.measures if m.name != "width")


def test_cheap_by_default_and_others_on_request():
    own = objective()
    with untouched(own.model):
        default = fc.report(own, k=1, rtol=0.1)
    assert [m.name for m in default.measures] == chosen("measures", "cheap")
    assert fc.report(own, k=1, rtol=0.1, measures="none").measures == ()
    one = fc.report(own, k=1, rtol=0.1, measures=["lpf", "lpf"])
    assert [m.name for m in one.measures] == ["lpf"]
    assert chosen("measures", "all") == list(CATALOGUE)


def test_what_does_not_apply_has_its_reason(everything):
    rows = {row.label: row for row in measure_rows(everything)}
    assert rows["path norm"].cells[0] != "–" and rows["path norm"].cells[1] == "–"
    (note,) = rows["path norm"].notes
    assert note.startswith("tanh: does not apply: ") and "Tanh" in note
    (note,) = rows["width"].notes
    assert note.startswith("does not apply: ")  # of both, so no name


@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")  # the note says the same
def test_a_note_names_the_layers_it_is_about():
    """The row shows the last layer, which is exact."""
    torch.manual_seed(0)
    sizes = (30, 40, 40, 4)
    first, second, last = (nn.Linear(m, n) for m, n in pairwise(sizes))
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
    own = fc.Objective(model, nn.CrossEntropyLoss(), (torch.randn(3, 30), torch.randint(4, (3,))))
    (row,) = measure_rows((fc.report(own, k=1, rtol=0.5, measures="relative_flatness"),))
    assert row.cells[0].endswith("(exact)")
    (note,) = row.notes
    assert "of 2 layers together (the least certain: '0')" in note


def test_no_layers_no_classes_no_exception():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))

        def forward(self, x):
            return x @ self.w

    torch.manual_seed(0)
    data = (torch.randn(9, 2).double(), torch.randn(9).double())
    names = [name for name in CATALOGUE if name not in ("local_entropy", "local_energy")]
    report = fc.report(fc.Objective(Bare(), nn.MSELoss(), data), k=1, measures=[*names, "local_energy"])
    reasons = {m.name: m.reason for m in report.measures}
    for name in ("normalized_sharpness", "relative_flatness", "width", "local_energy"):
        assert reasons[name] and "\n" not in reasons[name], name
    assert reasons["trace"] == ""
    assert "does not apply" in text_of(report.table())


def test_a_linear_net_has_a_width():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(30, 3).double()
    own = fc.Objective(model, nn.MSELoss(), (x, model(x).detach()))
    (width,) = fc.report(own, k=1, measures="width").measures
    assert width.has_value and width.measure.value == fc.measures.width(own).value >= 1


def test_layers_side_by_side(everything):
    layers = {rows.label: dict(rows.rows) for rows in layer_rows(everything)}
    gains = layers["gain, the largest singular value"]
    assert list(gains) == ["0", "2"]
    shares = {length for cells in gains.values() for _, length, _ in cells}
    assert max(shares) == pytest.approx(100)
    # The second net's first layer is twice the first one's.
    assert gains["0"][1][1] == pytest.approx(2 * gains["0"][0][1])
    assert set(layers["relative flatness"]) == {"0", "2"}


def test_page_stands_alone_and_holds_the_measures(everything, tmp_path):
    fc.compare(everything).save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Links()
    page.feed(text)
    assert page.outside == [] and page.scripts == 0
    for m in everything[0].measures:
        assert m.label in text and m.meaning.split("'")[0] in text
    assert "Local energy of relu and tanh" in text
    assert "does not apply" in text


def test_json_has_numbers_costs_and_curve(everything):
    first, second = json.loads(fc.compare(everything).to_json())["reports"]
    for m in everything[0].measures:
        entry = first["measures"][m.name]
        assert entry["value"] == (None if math.isnan(m.measure.value) else m.measure.value), m.name
        assert entry["matvecs"] == m.measure.matvecs and entry["passes"] == m.measure.passes
        assert entry["label"] and entry["meaning"]
    assert second["measures"]["path_norm"]["value"] is None and second["measures"]["path_norm"]["reason"]
    assert len(first["measures"]["local_energy"]["curve"]["value"]) == 10
    assert set(first["measures"]["normalized_sharpness"]["by_layer"]) == {"0", "2"}


def test_table_has_value_error_cost_and_meaning(everything):
    text = text_of(fc.compare(everything).table())
    assert "Fisher-Rao norm" in text and CATALOGUE["fisher_rao"].meaning in text
    assert "1 product, " in text and "±" in text


def test_reports_of_different_measures_compare():
    a = fc.report(objective(), name="a", k=1, measures="fisher_rao")
    b = fc.report(objective(), name="b", k=1, measures=["lpf"])
    rows = {row.label: row.cells for row in measure_rows((a, b))}
    assert rows["Fisher-Rao norm"][1] == "–" and rows["LPF, sigma = 0.01"][0] == "–"
    assert "Measures of flatness" in text_of(fc.compare([a, b]).table())


@pytest.mark.parametrize(
    ("measures", "kind", "message"),
    [
        ("fisher", ValueError, "measures: 'fisher' is no measure by name; did you mean 'fisher_rao'"),
        (["zzz"], ValueError, "measures: 'zzz' is no measure by name; the measures are normalized_sharpness"),
        (3, TypeError, 'measures: expected "all", "cheap", "none" or names of measures, got int'),
        (["edge_of_stability"], ValueError, "needs a step size"),
    ],
)
def test_wrong_measures(measures, kind, message):
    with pytest.raises(kind, match=message):
        fc.report(objective(), measures=measures)


def test_command_line(tmp_path):
    from click.testing import CliRunner

    from flatcore.cli import main

    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\nfrom torch import nn\n\ndef one():\n    torch.manual_seed(0)\n"
        "    return nn.Linear(4, 3), nn.CrossEntropyLoss(), (torch.randn(11, 4), torch.randint(3, (11,)))\n"
    )
    arguments = [
        "report",
        f"{path}:one",
        "--out",
        str(tmp_path),
        "-k",
        "1",
        "--json",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(main, [*arguments, "--measures", "fisher_rao,sam_sharpness"])
    assert result.exit_code == 0, result.output
    (report,) = json.loads((tmp_path / "r.json").read_text())["reports"]
    assert list(report["measures"]) == ["fisher_rao", "sam_sharpness"]
    result = CliRunner().invoke(main, [*arguments, "--measures", "fisher_roa"])
    assert result.exit_code == 2 and "did you mean 'fisher_rao'" in result.output


def test_a_bar_and_its_error_fit_the_cell():
    def estimate(value, stderr):
        return Estimate(value, stderr, 0, None, method="", seed=0, seconds=0.0, status="converged")

    parts = [estimate(3.0, 1.0), estimate(1.0, 2.0), estimate(-1.0, 0.5), estimate(2.0, math.nan)]
    longest = longest_bar(parts)
    assert longest == 4
    cells = [bar_cell(part, longest)[1:] for part in parts]
    assert cells == [(75, 25), (25, 25), (0, 0), (50, 0)]
    assert bar_cell(None, longest) == ("–", 0, 0)
