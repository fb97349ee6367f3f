"""The page: self-contained, for older and newer scores, and safe against hostile texts."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.errors import NekoLeanError
from neko_lean.reporting import tables
from neko_lean.reporting.figures import Model
from neko_lean.reporting.judge import judge_model
from neko_lean.reporting.page import HERE, report
from tests.reporting.made import LEVELS, full_scores, make_demo, make_generations, old_scores, write_run, write_scores

HOSTILE = [
    "</script><script>window.acted = 1</script>",
    "<img src=x onerror='window.acted = 1'>",
    "<!--<script>",
    "]]></style><style>*{display:none}",
    '" onclick="window.acted = 1" \'',
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt; \u2028\u2029 \u202eright to left\u202c \ud800 \x00 \U0001f408",
]
SECTIONS = ["examples", "numbers", "cells", "missed", "training", "membership", "mmlu", "attacks", "made"]


class Page(HTMLParser):
    """Every tag with its attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.words = [], [], []
        self.folds = 0
        self.read: list[str] = []  # the words outside folds
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.folds += tag == "details"
        if not self.folds and "aria-label" in dict(attrs):
            self.read.append(dict(attrs)["aria-label"])
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.folds -= tag == "details"

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.words.append(data)
            if not self.folds:
                self.read.append(data)

    @property
    def sections(self):
        return [attrs["id"] for tag, attrs in self.tags if tag == "h2"]

    @property
    def links(self):
        return [attrs["href"].removeprefix("#") for tag, attrs in self.tags if tag == "a"]


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("report") / "demo")


def test_page_is_complete_and_loads_nothing(demo, tmp_path):
    made = report([demo], tmp_path / "report.html")
    text, page = read(tmp_path / "report.html")
    assert made["models"] == ["before", "calibrated", "neko"] and made["rows"] == 72
    assert made["bytes"] == len(text.encode()) and made["words"]["calibrated"] == "Forgot, preserved the rest"
    assert page.sections == ["asked", "verdict", *SECTIONS] and page.links == SECTIONS
    assert "Make target forget the forget set (36 rows)" in text
    for word in ("Relearning", "leak@16", "min-k++", "world religions", "change −0.980", "Peak memory", "2.00 GiB"):  # noqa: RUF001
        assert word in text, word
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 4 + 6 + 1 + 1 + 11 and all(attrs["aria-label"] for attrs in charts)
    for _, attrs in page.tags:
        assert not set(attrs) & {"src", "srcset", "style", "action"}
        assert attrs.get("href", "#").startswith(("#", "data:,"))
    assert not re.search(r"@import|url\(|https?:", text)


def test_unlearning_benchmarks_have_a_table(tmp_path):
    forget = {"probability": 0.5, "rouge": 0.4}
    tofu = {"name": "tofu", "split": "forget10", "model_utility": 0.61, "forget_quality": 1e-20, "privleak": -99.5}
    muse = {"name": "muse", "split": None, "utility": 0.31, "privleak": 12.0}
    blocks = {"one": {**tofu, "forget": forget}, "two": muse}
    runs = [
        write_scores(tmp_path / name, {**full_scores(name, 0.4), "benchmark": block}) for name, block in blocks.items()
    ]
    report(runs, tmp_path / "report.html")
    _, page = read(tmp_path / "report.html")
    words = " ".join("".join(page.words).split())
    assert "TOFU forget10" in words and "MUSE" in words and "forget truth ratio" not in words
    for number in ("0.610", "1.0e−20", "−99.500", "0.310", "12.000"):  # noqa: RUF001
        assert number in words, number

    report(runs[:1], tmp_path / "one.html")
    assert "Unlearning benchmarks" in read(tmp_path / "one.html")[0]
    assert "knowledge memorisation" not in read(tmp_path / "one.html")[0]


def test_old_and_minimal_scores(tmp_path):
    old = [write_scores(tmp_path / name, old_scores(name, left)) for name, left in LEVELS.items()]
    made = report(old, tmp_path / "old.html")
    assert made["before"] == "before" and len(made["models"]) == 3
    text, page = read(tmp_path / "old.html")
    assert page.links == ["examples", "numbers", "cells", "membership", "made"] == page.sections[2:]
    for words in ("MMLU was not measured", "No attacks were run", "no unlearning run of these models"):
        assert words in text
    empty = write_scores(tmp_path / "empty", {"model": None}, [])
    assert report([empty], tmp_path / "empty.html")["words"] == {"empty": "Scored"}
    assert read(tmp_path / "empty.html")[1].links == ["made"]


def test_no_internal_keys_outside_folds(demo, tmp_path):
    scores = {**full_scores("x", 0.4), "groups": []}
    scores["cells"] = {"forget.all.knowledge": 0.4, "retain.作者.regurgitation": 0.9}
    report([demo], tmp_path / "demo.html")
    report([write_scores(tmp_path / "x", scores)], tmp_path / "x.html")
    for name in ("demo", "x"):
        _, page = read(tmp_path / f"{name}.html")
        words = " ".join(page.read)
        assert "questions" in words and "ROUGE-L recall" in words
        assert not re.findall(r"(?:forget|retain)\.\w+|\.(?:knowledge|regurgitation)|\beval_\w+|\w+_loss\b", words)
        assert not re.findall(r"\b[a-z]+_[a-z]+\b", words)


def test_the_headline_names_the_strongest_membership_attack():
    scores = full_scores("x", 0.4)
    scores["membership"]["attacks"]["all"]["zlib"] = {"auc": 0.97, "auc_interval": [0.9, 1.0]}
    table = tables.headline([Model(0, "x", scores, {}, [])])
    (line,) = [line for group in table.groups for line in group.lines if line.name == "Strongest membership attack"]
    assert line.cells[0].value == "0.970" and line.cells[0].small[0] == "zlib"


def spoil(value, replacements):
    """Replace each value in turn by one of another type."""
    if isinstance(value, dict):
        return {key: spoil(one, replacements) for key, one in value.items()}
    if isinstance(value, list):
        return [spoil(one, replacements) for one in value]
    return next(replacements)


def test_values_of_any_type_produce_a_page(tmp_path):
    strange = [None, "text", [], {}, True, -1, 10**400, math.nan, math.inf, -1e308, {"auc": []}, [[0]]]
    for start in range(len(strange)):

        def turns(start=start):
            number = start
            while True:
                yield strange[number % len(strange)]
                number += 5

        scores = spoil(full_scores("m", 0.4), turns())
        rows = [spoil(row, turns()) for row in make_generations("x", 1)]
        folder = write_scores(tmp_path / str(start), scores, rows)
        whole = write_scores(tmp_path / f"{start}-blocks", {key: next(iter(turns())) for key in scores}, rows)
        report([folder, whole], tmp_path / "page.html", overwrite=True)


def test_hostile_texts_are_escaped(tmp_path):
    number = 0

    def hostile(value):
        nonlocal number
        if isinstance(value, dict):
            return {key: hostile(one) for key, one in value.items()}
        if isinstance(value, list):
            return [hostile(one) for one in value]
        number += isinstance(value, str)
        return HOSTILE[number % len(HOSTILE)] if isinstance(value, str) else value

    scores = hostile(full_scores("m", 0.4))
    for place in HOSTILE:
        scores["mmlu"]["subjects"][place] = {"accuracy": 0.2}
        scores["membership"]["attacks"][place] = {"loss": {"auc": 0.4}}
        scores["versions"][place] = place
    rows = [hostile(row) for row in make_generations("x")]
    for place, row in enumerate(rows):
        row["id"] = f"{place} {row['id']}"
    first = write_scores(tmp_path / "a", {**scores, "model": HOSTILE[0]}, rows)
    second = write_scores(tmp_path / "<b>'s", {**scores, "model": HOSTILE[6]}, rows)
    run = write_run(tmp_path / "run", HOSTILE[0], HOSTILE[1])
    report([first, f"{second}={run}"], tmp_path / "page.html", title=HOSTILE[0])
    text, page = read(tmp_path / "page.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and tags.count("style") == 1 and not {"img", "iframe", "b>"} & set(tags)
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert not re.search(r"[<>&\u2028\u2029]", page.scripts[0].replace("\u2028", "").replace("\u2029", ""))
    data = json.loads(page.scripts[0])
    clean = [one.replace("\ud800", "?") for one in HOSTILE]
    assert {row["output"] for row in data["rows"]} <= set(clean) and len(data["rows"]) == len(rows)
    assert "{{ 7 * 7 }}" in text and clean[0] in "".join(page.words)


def test_policy_allows_only_the_script_and_the_style_sheet(demo, tmp_path):
    import base64
    import hashlib

    report([demo], tmp_path / "page.html")
    text, page = read(tmp_path / "page.html")
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        source = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(source) == 1
        assert base64.b64encode(hashlib.sha256(source[0].encode()).digest()).decode() in policy


def test_page_without_texts(demo, tmp_path):
    report([demo], tmp_path / "page.html", texts=False)
    text, _ = read(tmp_path / "page.html")
    assert "written without texts" in text
    assert "walked into the wood" not in text and "of the river" not in text and "555" not in text


def test_file_is_written_completely_or_not_at_all(demo, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "page.html"
    report([demo], out)
    first = out.read_bytes()
    with pytest.raises(NekoLeanError, match="--overwrite"):
        report([demo], out)
    monkeypatch.setattr("neko_lean.outputs.durable.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(NekoLeanError, match="No space"):
        report([demo], out, overwrite=True)
    assert out.read_bytes() == first and [path.name for path in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(NekoLeanError, match="is a folder"):
        report([demo], tmp_path)


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    light = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


def test_contrast_of_both_themes():
    style = (HERE / "page.css").read_text()
    themes = [dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", part)) for part in style.split("--paper")[1:4]]
    papers = re.findall(r"--paper: (#[0-9a-f]{6});", style)
    assert len(papers) == 3 and themes[1] == themes[2]
    for paper, theme in zip(papers, themes, strict=True):
        for name, colour in theme.items():
            if name in ("well", "rule", "grid", "mark"):
                continue
            against = {"ink": [paper, theme["well"], theme["mark"]], "soft": [paper, theme["well"]]}.get(name, [paper])
            for other in against:
                high, low = sorted((luminance(colour), luminance(other)), reverse=True)
                least = 3.0 if re.fullmatch(r"c\d", name) else 4.5
                assert (high + 0.05) / (low + 0.05) >= least, (name, colour, other)


def call(*args):
    return CliRunner().invoke(app, ["report", *map(str, args)])


def test_command(demo, tmp_path):
    out = ("--out", tmp_path / "page.html")
    shown = call(demo, *out)
    assert (
        shown.exit_code == 0 and "72 rows" in shown.stdout and "calibrated: Forgot, preserved the rest" in shown.stdout
    )
    found = call(demo / "scores-neko", "--before", demo / "scores-before", *out, "--overwrite", "--no-texts", "--json")
    assert json.loads(found.stdout)["models"] == ["before", "unlearned-neko"] and json.loads(found.stdout)["rows"] == 0
    quiet = call(demo, *out, "--overwrite", "--quiet", "--title", "Mine")
    assert quiet.exit_code == 0 and quiet.output == "" and "<title>Mine</title>" in (tmp_path / "page.html").read_text()
    for arguments, words in (
        ((demo, *out), "--overwrite"),
        ((tmp_path / "no", "--out", tmp_path / "x"), "not a folder"),
    ):
        wrong = call(*arguments)
        assert wrong.exit_code == 2 and wrong.stdout == "" and words in wrong.stderr
        assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_cells_of_any_script_stand_below_where_the_official_ones_do_not_see_them(tmp_path):
    scores = full_scores("m", 0.02)
    scores["unicode_cells"] = dict(scores["cells"])
    plain = tables.cells([Model(1, "m", scores, {}, [])])
    assert [group.title.split(":")[0] for group in plain.groups] == ["Forget set", "Retain set"]
    assert tables.script_note([Model(1, "m", scores, {}, [])]) == ""
    scores["unicode_cells"]["forget.Task1.knowledge"] = 1.0
    assert "The verdict" in tables.script_note([Model(1, "m", scores, {}, [])])
    found = tables.cells([Model(1, "m", scores, {}, []), Model(0, "older", full_scores("n", 1.0), {}, [])])
    (one,) = found.groups[-1].lines
    assert one.name == "questions about Task1 (forget set)" and [cell.value for cell in one.cells] == [
        "1.000",
        "no rows",
    ]
    assert judge_model(scores, None).signs[0].state == "partly"
