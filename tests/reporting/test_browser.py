"""The page in a real browser: every picture is seen, nothing runs, nothing is wider than the window."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.reporting.conftest import Whole
from tests.support.reporting import HOSTILE

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_POLICY = "style-src &#x27;unsafe-inline&#x27;"
_MEASURE = """
<script>addEventListener('load', () => { document.documentElement.dataset.measured = JSON.stringify({
  wide: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
  images: [...document.images].map(i => [i.naturalWidth, i.clientWidth]), scripts: document.scripts.length,
  outside: [...document.querySelectorAll('main > section > *, figure, img')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
  text: document.body.innerText, title: document.title}) })</script></body>"""


@pytest.fixture(scope="session")
def browser() -> str:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no browser here: install one of {', '.join(_NAMES)}, or let CHROMIUM name it")
    return path


@pytest.mark.parametrize("width", [1200, 800])
def test_page_in_a_browser(browser: str, whole: Whole, width: int, tmp_path: Path) -> None:
    assert whole.text.count(_POLICY) == 1
    measuring = whole.text.replace(_POLICY, f"{_POLICY}; script-src &#x27;unsafe-inline&#x27;").replace(
        "</body>", _MEASURE
    )
    (tmp_path / "measuring.html").write_text(measuring)
    seen = _opened(browser, tmp_path / "measuring.html", width)
    assert seen["wide"] <= seen["window"] == width and seen["outside"] == []
    assert len(seen["images"]) == 10 and all(natural > 30 and shown > 150 for natural, shown in seen["images"])
    assert seen["scripts"] == 1, "the one that measures"
    assert HOSTILE in seen["text"] and seen["title"] == "dgfast report"
    with Image.open(tmp_path / "seen.png") as screenshot:
        pixels = np.asarray(screenshot.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of points and lines
        assert (pixels == colour).all(axis=1).sum() > 50


def _opened(browser: str, page: Path, width: int) -> dict[str, Any]:
    """What the page measured of itself; a screenshot is left beside it."""
    options = [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},6000"]
    seen = [f"--screenshot={page.parent / 'seen.png'}", "--dump-dom", page.as_uri()]
    done = subprocess.run([browser, *_QUIET, *options, *seen], capture_output=True, text=True, timeout=100, check=True)
    measured = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert measured is not None, done.stderr
    found: dict[str, Any] = json.loads(html.unescape(measured[1]))
    return found
