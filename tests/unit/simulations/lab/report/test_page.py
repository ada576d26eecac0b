"""The page of a run."""

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simulations import cli_run
from simulations.cli import app
from simulations.errors import OutputError
from simulations.lab.folder import RunFolder
from simulations.lab.records import AnswerNote, Arm, Cryptography, EndNote, Fate, Note
from simulations.lab.report.page import sample_answers, write_report
from simulations.lab.series import Member

ATTACK = '<script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(2)>'
CELLS = {"td", "th", "li", "h1", "p", "pre"}
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of it: elements, their attributes, the text of each."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._in_cell = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in CELLS:
            self.cells.append("")
            self._in_cell = True
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in CELLS:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data
            if self._in_cell:
                self.cells[-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def an_answer(number: int, **changes: Any) -> AnswerNote:
    values = {
        "release": 2,
        "category": "open_qa",
        "instruction": f"Question {number}?",
        "wanted": "A plum.",
        "answer": "A pear.",
    }
    return AnswerNote(**{**values, **changes})


@pytest.fixture
def page(reported_run: Path) -> Page:
    return Page(reported_run / "report.html")


def test_it_lies_in_the_run_s_folder_beside_its_figures(reported_run: Path) -> None:
    assert (reported_run / "report.html").is_file()
    assert (reported_run / "figures" / "curves.png").is_file()
    assert not list(reported_run.rglob("*.part"))


def test_every_figure_is_in_the_page_itself(page: Page, reported_run: Path) -> None:
    prefix = "data:image/png;base64,"
    images = page.of("img")
    assert all(one["src"].startswith(prefix) and one["alt"] for one in images)
    inside = {base64.b64decode(one["src"].removeprefix(prefix)) for one in images}
    assert inside == {path.read_bytes() for path in (reported_run / "figures").iterdir()}
    assert len(inside) == 6


def test_nothing_is_fetched_and_nothing_is_run(page: Page) -> None:
    forbidden = {"script", "link", "iframe", "object", "embed", "base", "form", "svg", "a"}
    assert not forbidden & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"href", "srcset", "action", "style"} & set(attributes)
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert "http:" not in without_images
    assert "https:" not in without_images
    assert "url(" not in without_images
    assert "@import" not in without_images
    policies = [one["content"] for one in page.of("meta") if "http-equiv" in one]
    assert policies[0].startswith("default-src 'none'; img-src data:;")


def test_the_headline_holds_the_last_release_against_the_first(page: Page) -> None:
    assert page.source.count("<li><span>held-out loss, release 2, average over categories") == 1
    numbers = page.cells
    assert any("2.000release 0: 4.000; lower is better" in cell for cell in numbers)
    assert any("60.0 %release 0: 5.0 %; higher is better" in cell for cell in numbers)
    assert any("4.50 kB3.00 kB up, 1.50 kB down" in cell for cell in numbers)
    said = "0.75profile P1, simulated cohort: 2; what it protects, at which δ: see guarantee"
    assert any(said in cell for cell in numbers)
    assert any(cell.startswith("time on the clock12.5 s") for cell in numbers)


def test_what_was_run_is_said(page: Page) -> None:
    for fact in ("federated: every client", "33" * 32, "here, one process", "torch 2.13.0"):
        assert fact in page.text
    place = page.cells.index("simulated cohort")
    assert page.cells[place + 1] == "2 in a round"
    place = page.cells.index("held-out records")
    assert page.cells[place + 1] == "400, of which clients' records repeat 2"
    assert "no formal guarantee (profile P0): ε = ∞" in page.text
    assert "Finished." in page.text
    assert "unfinished" not in page.text.lower()


@pytest.mark.parametrize(
    ("cryptography", "said", "not_said"),
    [
        (Cryptography.REAL, "real: keys, shares, masks", "exact sum"),
        (Cryptography.EXACT_SUM, "exact sum: the encoded updates", "real: keys"),
        (None, "none: nothing was masked", "exact sum"),
    ],
)
def test_it_says_whether_masks_were_real(
    make_run: Callable[..., Path], cryptography: Cryptography | None, said: str, not_said: str
) -> None:
    text = Page(write_report(make_run("masks", [], cryptography=cryptography))).text
    assert said in text
    assert not_said not in text


def test_categories_and_rounds_are_tables(page: Page) -> None:
    place = page.cells.index("closed_qa")
    assert page.cells[place : place + 7] == [
        *("closed_qa", "3.000", "1.500", "7"),
        *("10.0 %", "70.0 %", "7"),
    ]
    place = page.cells.index("average")
    assert page.cells[place : place + 4] == ["average", "4.000", "2.000", "14"]
    assert "failed" in page.cells  # in the place of round 2's release
    place = page.cells.index("clock")
    assert page.cells[place + 1 : place + 5] == ["1", "1", "2", "2"]
    assert [page.cells[place + 1 + 17 * row] for row in range(3)] == ["1", "2", "3"]
    assert [page.cells[place + 2 + 17 * row] for row in range(3)] == ["1", "failed", "2"]


def test_failures_are_listed(page: Page) -> None:
    assert "Round 2 made no release: too few agents" in page.cells
    assert "Round 2: 1 agent lost with cells that too many left" in page.cells
    assert "1 training gave nothing to send: ran out of memory" in page.cells
    assert "Of 7 places in rounds: 1 late, 1 cell lost, 1 failed" in page.cells


def test_a_run_without_failures_says_so(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    notes = [make_round(1), EndNote(wall_s=1.0)]
    assert "Nothing." in Page(write_report(make_run("well", notes, n_rounds=1))).cells


def test_hundreds_of_failures_are_cut_short(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    notes = [make_round(n, failure="late", fates={0: Fate.LATE}) for n in range(1, 101)]
    cells = Page(write_report(make_run("bad", notes))).cells
    assert sum(cell.startswith("Round ") for cell in cells) == 20
    assert "and 80 more" in cells


def test_an_unfinished_run_says_how_far_it_came(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> None:
    notes = [*make_scores(0, {"a": 3.0}), make_round(1), make_round(2, failure="too few agents")]
    page = Page(write_report(make_run("cut", notes)))
    assert page.text.count("Unfinished: 1 of 3 rounds.") == 2
    assert [one for one in page.of("p") if one.get("role") == "status"]


def test_a_run_that_has_only_begun_has_a_page(make_run: Callable[..., Path]) -> None:
    page = Page(write_report(make_run("new", [])))
    assert "Unfinished: 0 of 3 rounds." in page.text
    assert not page.of("img")


def test_a_baseline_has_a_page_that_speaks_of_no_traffic(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> None:
    notes = [
        make_round(1, fates={7: Fate.COUNTED}),
        *make_scores(1, {"a": 2.0}),
        EndNote(wall_s=1.0),
    ]
    root = make_run("alone", notes, arm=Arm.LOCAL, client=7, cryptography=None)
    page = Page(write_report(root))
    assert "paper: local, client 7, seed 1" in page.text
    assert "bytes per agent" not in page.text
    assert len(page.of("img")) == 2


def test_text_of_records_is_shown_and_never_obeyed(
    make_run: Callable[..., Path],
    make_round: Callable[..., Any],
    make_visit: Callable[..., Any],
    make_scores: Callable[..., Any],
) -> None:
    notes: list[Note] = [
        *make_scores(0, {ATTACK: 2.0}),
        make_visit(1, 0, error=ATTACK),
        make_round(1, failure=ATTACK),
        an_answer(1, category=ATTACK, instruction=ATTACK, wanted=ATTACK, answer=ATTACK),
    ]
    root = make_run(
        "attack", notes, guarantee=ATTACK, machine=ATTACK, engine=ATTACK, versions={ATTACK: ATTACK}
    )
    (root / "experiment.toml").write_text(f'description = "{ATTACK}"')
    page = Page(write_report(root))
    assert not page.of("script")
    assert all(one["src"].startswith("data:image/png") for one in page.of("img"))
    assert "<script>" not in page.source
    assert page.text.count("<script>alert(1)</script>") >= 10  # as text


def test_control_signs_of_records_are_not_passed_on(make_run: Callable[..., Path]) -> None:
    notes = [an_answer(1, answer="left \u202eright\x07\nsecond\tline")]
    text = Page(write_report(make_run("signs", notes))).text
    assert "left  right \nsecond\tline" in text


def test_at_most_twelve_answers_are_shown_and_long_ones_cut(make_run: Callable[..., Path]) -> None:
    notes = [an_answer(number, answer="x" * 5000) for number in range(30)]
    page = Page(write_report(make_run("answers", notes)))
    answers = [cell for cell in page.cells if cell.startswith("xxx")]
    assert len(answers) == 12
    assert all(len(cell) == 1501 for cell in answers)
    assert "12 of 30" in page.text


def test_answers_are_of_all_categories_in_turn() -> None:
    notes = [an_answer(n, category="a") for n in range(9)] + [an_answer(9, category="b")]
    chosen = sample_answers(notes, 3)
    assert [(note.category, note.instruction) for note in chosen] == [
        ("a", "Question 0?"),
        ("a", "Question 1?"),
        ("b", "Question 9?"),
    ]


def test_it_says_how_to_run_it_again(finished_run: Path) -> None:
    assert write_report(finished_run) == finished_run / "report.html"
    page = Page(finished_run / "report.html")
    told = "sheepfold-sim run experiment.toml --arm federated --seed 1 --group 2 --out again"
    assert told in page.cells
    for digest in ("11" * 32, "22" * 32, "33" * 32, "44" * 32, "ab" * 32):
        assert digest in page.text
    assert 'name = "paper"' in page.text


@pytest.mark.parametrize(
    ("arm", "client"), [(Arm.FEDERATED, None), (Arm.CENTRALISED, None), (Arm.LOCAL, 7)]
)
def test_the_command_that_it_shows_asks_for_this_very_run(
    make_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arm: Arm,
    client: int | None,
) -> None:
    root = make_run("again", [], arm=arm, client=client, seed=3, group_size=4)
    text = next(
        cell for cell in Page(write_report(root)).cells if cell.startswith("sheepfold-sim run ")
    )
    asked: list[Member] = []
    monkeypatch.setattr(cli_run, "_run_all", lambda root, members, *_, **__: asked.extend(members))
    monkeypatch.setattr(cli_run, "_tell", lambda *_: None)
    monkeypatch.chdir(root)
    CliRunner().invoke(app, text.split()[1:], catch_exceptions=False)
    (request,) = (member.request for member in asked)
    assert (request.arm, request.client, request.seed) == (arm, client, 3)
    assert request.experiment.engine.group == 4


def test_it_is_written_again_as_the_run_goes_on(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    root = make_run("grows", [make_round(1)])
    write_report(root)
    with RunFolder(root) as folder:
        folder.append([make_round(2), make_round(3), EndNote(wall_s=5.0)])
    assert "Finished." in Page(write_report(root)).text


def test_the_page_prints_and_has_a_dark_look(page: Page) -> None:
    assert "@media print" in page.source
    assert "prefers-color-scheme: dark" in page.source


def test_a_folder_without_a_run_gets_no_page(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
