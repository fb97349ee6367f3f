"""The page in a real browser, if one is installed: no errors, no overflow on a phone, and working examples."""

import html
import json
import re
import shutil
import subprocess

import pytest

from neko_lean.reporting.page import report
from tests.reporting.made import full_scores, make_demo, make_generations, write_scores
from tests.reporting.test_page import HOSTILE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>addEventListener("load", () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const root = document.documentElement;
  const paper = () => getComputedStyle(document.body).backgroundColor;
  const rows = () => document.querySelectorAll("#rows .row").length;
  const found = () => document.getElementById("count").textContent;
  const inSight = (element) => {
    const box = element.getBoundingClientRect();
    return box.width > 0 && box.height > 0 && box.left >= 0 && box.right <= innerWidth;
  };
  // Of every table that is not in a closed fold: whether the first column's heading and values are in sight.
  const tables = () => [...document.querySelectorAll("table")].filter((table) => table.checkVisibility());
  const columns = () => tables().map((table) =>
    inSight(table.querySelector("thead th")) && [...table.querySelectorAll("th[scope=row] + td")].every(inSight));
  const links = () => [...document.querySelectorAll("nav a")].map((link) => {
    const section = document.querySelector(link.getAttribute("href"))?.closest("section");
    const [heading, ...content] = section ? section.children : [];
    return content.some((child) => child.checkVisibility() && child.textContent.trim() && inSight(child));
  });
  const state = () => ({ columns: columns(), links: links(), width: root.scrollWidth });
  (async () => {
    const seen = { first: rows(), count: found(), light: paper(), states: [state()] };
    document.getElementById("theme").click();
    seen.dark = paper();
    seen.states.push(state());
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    for (const fold of document.querySelectorAll(".row button")) fold.click();
    seen.states.push(state());
    document.getElementById("more").click();
    seen.more = rows();
    document.getElementById("search").value = "PROMPT 3 OF";
    document.getElementById("search").dispatchEvent(new Event("input"));
    await wait(300);
    seen.searched = found();
    seen.marks = document.querySelectorAll("mark").length;
    document.getElementById("split").value = "forget";
    document.getElementById("split").dispatchEvent(new Event("change"));
    seen.filtered = found();
    seen.underlined = document.querySelector("u").textContent;
    seen.acted = window.acted || 0;
    seen.title = document.title;
    parent.postMessage(JSON.stringify(seen), "*");
  })();
});</script></body>"""
FRAMES = """<!doctype html><body data-seen=""><iframe src="page.html"></iframe>
<iframe style="width:390px;height:900px" src="probed.html"></iframe>
<script>addEventListener("message", (event) => { document.body.dataset.seen = event.data; });</script>"""


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome found")


def seen_in_chromium(page, folder):
    """What the probe saw on a phone's screen; nothing may be logged to the console."""
    # The probe is a second script, which the page's own policy would not run.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()).replace("</body>", PROBE)
    (folder / "probed.html").write_text(text)
    (folder / "frames.html").write_text(FRAMES)
    # A window cannot be as narrow as a phone, a frame can. The virtual clock lets the page's own waits pass at once.
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    options += ["--virtual-time-budget=4000", f"--user-data-dir={folder / 'profile'}"]
    ran = subprocess.run(
        [CHROMIUM, *options, (folder / "frames.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    match = re.search(r'data-seen="([^"]*)"', ran.stdout)
    assert match and match[1], ran.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


def assert_fits(seen, num_sections):
    """Nothing overflows, the first column of every table is in sight, and every link leads to a filled section."""
    tables = [len(state["columns"]) for state in seen["states"]]
    assert tables[0] == tables[1] < tables[2] and tables[0] >= 5
    for state in seen["states"]:  # light, dark, and with every fold open
        assert state["width"] <= 390 and all(state["columns"]) and state["links"] == [True] * num_sections


@needs_chromium
def test_in_chromium(tmp_path):
    demo = make_demo(tmp_path / "demo")
    rows = make_generations("It was nobody of the river.")
    for place, text in enumerate(HOSTILE):
        rows[place] |= {"generation": text * 3, "output": text, "id": text + "sc1"}
    rows[7]["generation"] = "unbroken" * 300
    write_scores(tmp_path / "hostile", full_scores(HOSTILE[0] + "wide" * 40, 0.4), rows)
    page = tmp_path / "page.html"
    report([demo, tmp_path / "hostile"], page, title=HOSTILE[1])
    seen = seen_in_chromium(page, tmp_path)
    assert_fits(seen, num_sections=9)
    assert seen["first"] == 20 and seen["more"] == 40 and seen["count"] == f"{72 + len(HOSTILE)} rows"
    assert seen["searched"].startswith("13 of ") and seen["marks"] >= 13 and seen["filtered"].startswith("7 of ")
    assert seen["underlined"] and seen["light"] != seen["dark"]
    assert seen["acted"] == 0 and seen["title"] == HOSTILE[1]


@needs_chromium
def test_many_models_fit_a_phone(tmp_path):
    names = [f"model-{number}" for number in range(9)]
    page = tmp_path / "page.html"
    report([write_scores(tmp_path / name, full_scores(name, 0.4)) for name in names], page)
    assert_fits(seen_in_chromium(page, tmp_path), num_sections=8)  # without runs, there is no training
