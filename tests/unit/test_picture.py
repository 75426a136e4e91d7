"""The picture and the page, opened again and looked at as far as a test can."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.service.picture import Fan, LeadErrors, Panel, draw, write_page

HOUR_MS = 3_600_000


def panel(sensor: str = "pump-001") -> Panel:
    ends = np.arange(1, 73) * HOUR_MS
    values = 20 + 5 * np.sin(np.arange(72) / 24 * 2 * np.pi)
    values[10:13] = np.nan
    ahead = 49 + np.arange(24)
    middle = 20 + 5 * np.sin((ahead - 1) / 24 * 2 * np.pi)
    fan = Fan(
        48 * HOUR_MS, ahead * HOUR_MS, middle, np.stack([middle - 1, middle, middle + 1], axis=1), (0.1, 0.5, 0.9)
    )
    return Panel(sensor, "temperature (°C)", ends, values, fan)


ERRORS = LeadErrors("°C", HOUR_MS, {"Millrace": np.linspace(0.2, 1, 24), "LastValue": np.linspace(0.5, 3, 24)})


def test_the_picture_is_a_png_with_a_row_for_each_panel_and_one_for_the_errors(tmp_path: Path):
    heights = []
    for panels, errors in (([panel()], None), ([panel(), panel("fan-002")], None), ([panel()], ERRORS)):
        with Image.open(draw(tmp_path / "p.png", "Forecasts", panels, errors)) as image:
            assert image.format == "PNG"
            heights.append(image.height)
            colours = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20)}
            assert (11, 114, 185) in colours, "the median's blue is on it"
    assert heights[0] < heights[1] == heights[2]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.image = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.image = dict(attributes)["src"] or ""

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_but_itself(tmp_path: Path):
    picture = draw(tmp_path / "p.png", "Forecasts", [panel()], ERRORS)
    rows = [{"what": "forecasts <all>", "expected": 1200, "share": 0.5}, {"what": "late", "expected": 3, "share": None}]
    text = write_page(tmp_path / "i.html", "A & B", picture, "of 3 < 4", {"Counts": rows, "Empty": []}).read_text(
        "utf-8"
    )
    page = Page()
    page.feed(text)
    assert base64.b64decode(page.image.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert "script" not in page.tags
    assert not re.search(r'(src|href)="(?!data:)', text), "nothing is fetched from elsewhere"
    for wanted in ("A & B", "of 3 < 4", "forecasts <all>", "1,200", "0.5", "Counts"):
        assert wanted in page.text
    assert "Empty" not in page.text
