"""Take the README's picture of MLflow's page: `make screenshots`."""

import io
import sys
import tempfile
from pathlib import Path

from pages import PATIENCE_MS, browser, fill, user_interface
from PIL import Image
from playwright.sync_api import expect

FILE = Path(__file__).parent.parent.parent / "docs" / "comparison.png"
HEIGHT = 1200
# Of the window: without the side bar, the controls above the runs and the button for an assistant.
LEFT, TOP, RIGHT, BOTTOM = 218, 240, 1398, 1150
COLOURS = 255


def take(tracking: str, folder: Path) -> None:
    """The newest search's trials, or else the best runs: their curves and parallel coordinates."""
    with user_interface(tracking, folder / "output.txt") as links, browser(HEIGHT) as context:
        names = [name for name in links if name.startswith(("trials of", "best"))]
        if not names:
            sys.exit(f"{tracking} has nothing to compare; expected two runs that were evaluated, or a search")
        page = context.new_page()
        page.goto(links[names[-1]])
        expect(page.locator(".scatterlayer .trace").first).to_be_attached()
        expect(page.locator(".dimension .label").first).to_be_visible()
        page.wait_for_timeout(5000)  # until lines have been drawn, of which the page gives no sign
        pixels = page.screenshot(timeout=PATIENCE_MS)
    with Image.open(io.BytesIO(pixels)) as image:
        shown = image.convert("RGB").crop((LEFT, TOP, RIGHT, BOTTOM))
        shown.quantize(COLOURS, dither=Image.Dither.NONE).save(FILE, optimize=True)
    print(f"{FILE}: {FILE.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Picture the store that is given, or one that is filled for it."""
    with tempfile.TemporaryDirectory() as folder:
        take(sys.argv[1] if len(sys.argv) > 1 else fill(Path(folder)), Path(folder))


if __name__ == "__main__":
    main()
