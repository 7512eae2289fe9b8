"""Several experiments on one page."""

import json
import shutil

import pytest
from unit.report import results as made
from unit.report.page import Page, section

from deepseek_sft.errors import BadInputError
from deepseek_sft.report import compare


@pytest.fixture
def experiments(tmp_path):
    """A finished experiment, and one with another learning rate that ended after training."""
    first = made.write_results(tmp_path)
    second = tmp_path / "results" / "faster $x_1$ <b>"
    shutil.copytree(first, second)
    for path in (second / "receipts").glob("*.json"):
        path.write_text(path.read_text().replace("results/demo/", f"results/{second.name}/"))
    for rule in ("convert_checkpoint", "verify_model", "smoke_test"):
        (second / "receipts" / f"{rule}.json").unlink()
    config = json.loads((second / "config.yaml").read_text())
    config["train"]["learning_rate"] = 1e-2
    (second / "config.yaml").write_text(json.dumps(config))
    return [(first, None), (second, None)]


def test_table_shows_each_experiments_figures_and_verdict(experiments):
    html = compare.compare(experiments)
    text = Page(section(html, "figures")).text
    for expected in ("samples trained", "11.8 → 0.0421", "train: tokens per second", "4,444", "96.88 %"):
        assert expected in text
    head = Page(html[: html.index("<section")]).text
    assert "demo: Complete: every stage passed" in head
    assert "faster $x_1$ <b>: Not complete: convert_checkpoint is next" in head


def test_losses_of_all_experiments_are_in_one_plot_with_their_names(experiments):
    plots = section(compare.compare(experiments), "plots")
    assert plots.count("<svg") == 2
    drawing = plots[: plots.index("</svg>")]
    assert "var(--series-1)" in drawing and "var(--series-2)" in drawing
    assert "faster $x_1$ &lt;b&gt;" in drawing
    assert "<b>" not in plots


def test_only_settings_that_differ_are_listed_and_no_secret(experiments):
    html = compare.compare(experiments)
    text = Page(section(html, "settings")).text
    assert "train.learning_rate" in text and "0.005" in text and "0.01" in text
    assert "HF_TOKEN" not in text
    assert "hunter2" not in html


def test_more_experiments_than_colours_are_told_apart_by_their_dashes(experiments):
    plots = section(compare.compare(experiments * 5), "plots")
    assert plots.count("stroke-dasharray") > 0


def test_experiments_of_one_name_are_told_apart_by_their_folders(experiments, tmp_path):
    other = tmp_path / "other" / "results" / "demo"
    shutil.copytree(experiments[0][0], other)
    head = compare.compare([experiments[0], (other, None)])
    assert str(other) in head


def test_folder_that_is_no_experiment_is_named(experiments, tmp_path):
    with pytest.raises(BadInputError, match="absent"):
        compare.compare([experiments[0], (tmp_path / "absent", None)])
