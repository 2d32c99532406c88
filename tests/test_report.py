"""The report: its numbers are those of the functions it calls, its page stands alone."""

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import flatcore as fc


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return torch.randn(31, 6).double(), torch.randint(4, (31,))


@pytest.fixture(scope="module")
def objective(data):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    return fc.Objective(model, nn.CrossEntropyLoss(), data)


@pytest.fixture(scope="module")
def report(objective, data):
    return fc.report(objective, name="net & <co>", k=3, seed=5, rtol=0.05, test=data, compare_autograd=True)


def test_numbers_are_those_of_direct_calls(objective, report):
    H = fc.Hessian(objective)
    assert report.trace.value == fc.trace(H, rtol=0.05, seed=5).value
    assert torch.equal(report.top.values, fc.eigsh(H, 3, which="LA", seed=5).values)
    assert report.loss == pytest.approx(objective.loss())
    assert report.test.loss == pytest.approx(report.loss)
    stages = report.curvature.stages
    assert report.products == sum(products for _, products, _ in stages)


def test_autograd_loop_gives_the_same_numbers(report):
    """The trace up to their errors: the loop has no sweeps over examples."""
    other = report.autograd
    error = math.hypot(other.trace.stderr, report.trace.stderr)
    assert abs(other.trace.value - report.trace.value) <= 4 * error
    torch.testing.assert_close(other.top.values, report.top.values, rtol=1e-9, atol=1e-12)


def test_json_has_the_numbers(report):
    (document,) = json.loads(report.to_json())["reports"]
    assert document["curvature"]["trace"]["value"] == report.trace.value
    assert document["curvature"]["top"]["residuals"] == report.top.residuals.tolist()
    assert document["seed"] == 5
    assert len(document["curvature"]["density"]["grid"]) == len(document["curvature"]["density"]["pdf"])


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.scripts, self.open = [], 0, []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.outside += [
            v
            for k, v in attrs
            if k in ("src", "href", "xlink:href") and v and not v.startswith(("#", "data:"))
        ]
        if tag not in ("meta", "br", "link", "img", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone(report, tmp_path):
    report.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Links()
    page.feed(text)
    assert page.outside == []
    assert page.scripts == 0
    assert "@import" not in text
    assert "net &amp; &lt;co&gt;" in text
    assert "<svg" in text


def test_page_goes_into_a_new_folder(report, tmp_path):
    report.save_html(tmp_path / "new" / "deep" / "page.html")
    assert (tmp_path / "new" / "deep" / "page.html").exists()


def by(report, method, name, autograd="exact"):
    """The report as if its traces had been got in these ways."""
    loop = replace(report.autograd, trace=replace(report.autograd.trace, method=autograd))
    mine = replace(report.curvature, trace=replace(report.trace, method=method))
    return replace(report, name=name, curvature=mine, autograd=loop)


def test_page_tells_the_method_of_the_trace(report, tmp_path):
    words = {
        "exact": "Exact up to rounding",
        "example": "The mean of Σₙ vₙᵀHₙvₙ",
        "ggn+example": "The Gauss-Newton part G of H exactly",
        "hutchinson": "(Hutchinson)",
        "hutch++": "(Hutch++)",
        "xtrace": "(XTrace)",
    }
    for method in words:
        by(report, method, "a", autograd=method).save_html(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert [m for m, text in words.items() if text in page] == [method]
        assert "its trace is got by" not in page and "through it; estimators, seed" in page
    fc.compare([by(report, "exact", "a"), by(report, "xtrace", "b")]).save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a: Exact up to rounding" in page and "b: From one set of random vectors" in page
    assert "through it; its trace is got by exact sums, other estimators, seed" in page


@pytest.mark.parametrize("search", [1, 2, 3, 4])
def test_ctrl_c_ends_it(objective, monkeypatch, search):
    """Wherever the search for eigenvalues, which gives the pairs it has, meets it: the autograd loop's included."""
    kind, begun = sys.modules["flatcore.eigsh"]._Search, []
    run = kind.run

    def counted(self, *arguments):
        begun.append(self)
        found = run(self, *arguments)
        return found | {"status": "interrupted"} if len(begun) == search else found

    monkeypatch.setattr(kind, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        fc.report(objective, k=1, measures="none", compare_autograd=True)
    assert len(begun) == search


def test_table_has_the_error_bar(report):
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table())
    assert "trace of H" in capture.get()
    assert "±" in capture.get() or "exact" in capture.get()


def test_comparison_needs_different_names(report):
    with pytest.raises(ValueError, match="twice"):
        fc.compare([report, report])
    with pytest.raises(ValueError, match="at least one report"):
        fc.compare([])


def test_wrong_arguments(objective):
    with pytest.raises(TypeError, match=r"obj: expected a flatcore.Objective"):
        fc.report(3)
    with pytest.raises(ValueError, match="k: expected fewer than"):
        fc.report(objective, k=10_000)
