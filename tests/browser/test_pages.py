"""Each page that `mimiclab ui` links to, opened: what it shows is what the store has."""

import re

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Locator, Page, expect

# The first test fills the store.
pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.cluster, pytest.mark.timeout(1800)]

CARD = "[data-testid=experiment-view-compare-runs-card]"


def open_runs(page: Page, link: str, num: int) -> None:
    page.goto(link)
    expect(page.get_by_text(f"{num} matching runs")).to_be_visible()


def cells(page: Page, column: str) -> list[str]:
    """What a column of the table shows, from top to bottom."""
    found = page.locator(f'.ag-center-cols-container .ag-row [col-id="{column}"]')
    expect(found.first).to_be_visible()
    rows = found.evaluate_all("cells => cells.map(c => [+c.closest('.ag-row').getAttribute('row-index'), c.innerText])")
    return [text for _, text in sorted(rows)]


def shown(run: Run, metric: str) -> str:
    value = run.data.metrics.get(metric)
    return "-" if value is None else str(value)


def same(text: str, value: str) -> bool:
    return text == value or (text != "-" and value != "-" and float(text) == float(value))


def card(page: Page, title: str) -> Locator:
    """The chart of that title, scrolled to: MLflow draws what is seen."""
    found = page.locator(CARD).filter(has=page.get_by_text(title, exact=True)).first
    found.scroll_into_view_if_needed()
    return found


def curves(chart: Locator) -> list[list[float]]:
    """The values of the curves of a chart as plotly was given them, each curve once: it draws every one twice."""
    plot = chart.locator(".js-plotly-plot")
    expect(plot.locator(".scatterlayer .trace").first).to_be_attached()
    # A chart that is drawn anew has its place before it has its data.
    ready = "place => { const p = place.querySelector('.js-plotly-plot'); return p && p.data && p.data.length > 0 }"
    chart.page.wait_for_function(ready, arg=chart.element_handle())
    found = plot.evaluate("plot => plot.data.map(curve => Array.from(curve.y))")
    return [list(values) for values in dict.fromkeys(map(tuple, found)) if values]


def history(client: MlflowClient, run: Run, metric: str) -> list[float]:
    return [point.value for point in client.get_metric_history(run.info.run_id, metric)]


def axes(page: Page) -> list[str]:
    """The names of the axes of parallel coordinates."""
    chart = card(page, "Parallel Coordinates")
    expect(chart.locator(".dimension .label").first).to_be_visible()
    return [text.strip() for text in chart.locator(".dimension .label").all_text_contents()]


def loaded_pictures(page: Page) -> int:
    """How many runs' pictures the first card of the section of validation pictures shows."""
    section = page.get_by_test_id("experiment-view-compare-runs-section-header")
    section.filter(has_text="validation").scroll_into_view_if_needed()
    pictures = page.locator(CARD).filter(has=page.get_by_text(re.compile("^validation/"))).first.locator("img")
    expect(pictures.first).to_be_visible()
    return int(pictures.evaluate_all("all => all.filter(each => each.complete && each.naturalWidth > 0).length"))


def test_the_leaderboard_shows_the_numbers_of_the_evaluations_best_first(
    page: Page, links: dict[str, str], runs: list[Run]
) -> None:
    open_runs(page, links["leaderboard"], len(runs))
    for metric in ("student/AP", "student/AP50", "teacher/AP", "gap/AP"):
        found = cells(page, f"metrics.`{metric}`")
        expected = [shown(run, metric) for run in runs]
        assert len(found) == len(expected)
        assert all(map(same, found, expected)), (metric, found, expected)
    names = page.locator(".ag-pinned-left-cols-container").get_by_role("link").all_inner_texts()
    assert {run.info.run_name for run in runs} <= set(names)
    expect(page.get_by_role("button", name="leaderboard")).to_be_visible()


def test_the_charts_show_every_evaluation_and_every_step(
    page: Page, links: dict[str, str], runs: list[Run], client: MlflowClient
) -> None:
    open_runs(page, links["charts"], len(runs))
    trained = [run for run in runs if "student/AP" in run.data.metrics]
    for metric in ("student/AP", "train/loss"):
        expected = sorted(history(client, run, metric) for run in trained)
        assert sorted(curves(card(page, metric))) == [pytest.approx(values) for values in expected], metric


def test_the_comparison_of_the_best_shows_what_differs_and_their_pictures(
    page: Page, links: dict[str, str], runs: list[Run]
) -> None:
    (name,) = (name for name in links if name.startswith("best "))
    num = sum("student/AP" in run.data.metrics for run in runs[:5])
    assert name == f"best {num}"
    open_runs(page, links[name], num)
    found = axes(page)
    assert "optim.lr" in found
    assert found[-1] == "student/AP"
    assert loaded_pictures(page) > 1
    expect(page.get_by_role("slider").first).to_be_visible()


def test_the_comparison_of_the_trials_shows_the_trials_and_what_was_searched(
    page: Page, links: dict[str, str], runs: list[Run]
) -> None:
    trials = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    open_runs(page, links["trials of look"], len(trials))
    names = page.locator(".ag-pinned-left-cols-container").get_by_role("link").all_inner_texts()
    assert {name for name in names if name.startswith("look-")} == {run.info.run_name for run in trials}
    found = axes(page)
    assert len(found) == 3
    assert found[-1] == "student/AP"


def test_the_newest_run_shows_its_numbers_and_curves(
    page: Page, links: dict[str, str], runs: list[Run], client: MlflowClient
) -> None:
    (name,) = (name for name in links if name.startswith("newest run, "))
    (run,) = (run for run in runs if run.info.run_name == name.removeprefix("newest run, "))
    page.goto(links[name])
    expect(page.get_by_text("About this run")).to_be_visible()
    page.get_by_placeholder("Search metrics").fill("student/AP")
    expect(page.get_by_text(shown(run, "student/AP"), exact=True).first).to_be_visible()

    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("train/loss")
    chart = page.locator(CARD).first
    assert curves(chart) == [pytest.approx(history(client, run, "train/loss"))]
