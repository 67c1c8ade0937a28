"""One store, one server and one browser for all pages."""

import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pages
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import BrowserContext, Page

# A suite that was started in the background inherits an ignored Ctrl-C, and so would the commands that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SCREENSHOTS = Path(__file__).parent.parent.parent / "test-output" / "pages"
# What MLflow's pages say on any store.
KNOWN_ERRORS = (
    "status of 404",  # asks who is logged in, which only a server with basic auth can answer
    "ResizeObserver loop",  # Chromium's way to say that a layout took two frames
)


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    if pages.chromium() is None:
        pytest.skip("there is no chromium; Debian has it: apt-get install chromium")
    return pages.fill(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="session")
def links(tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with pages.user_interface(tracking, tmp_path_factory.mktemp("ui") / "output.txt") as found:
        yield found


@pytest.fixture(scope="session")
def browser(links: dict[str, str]) -> Iterator[BrowserContext]:
    with pages.browser() as context:
        yield context


@pytest.fixture(scope="session")
def client(tracking: str) -> MlflowClient:
    return MlflowClient(tracking)


@pytest.fixture(scope="session")
def runs(client: MlflowClient) -> list[Run]:
    """All runs that were not discarded, the best student first."""
    project = client.get_experiment_by_name("mimiclab").experiment_id
    best_first = ["metrics.`student/AP` DESC", "attributes.start_time DESC"]
    return list(client.search_runs([project], "tags.`mimiclab.forgotten` IS NULL", order_by=best_first))


@pytest.fixture
def page(browser: BrowserContext, links: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page that is kept as a picture, and on which nothing goes wrong and nobody else is asked."""
    page = browser.new_page()
    errors: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: asked.add(urlsplit(sent.url).netloc))
    yield page
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png", timeout=pages.PATIENCE_MS)
    page.close()
    assert [error for error in errors if not any(known in error for known in KNOWN_ERRORS)] == []
    # Inlined pictures and workers have no host.
    assert asked - {""} == {urlsplit(links["leaderboard"]).netloc}
