"""README.md says what is true: its commands run, its numbers stand in results/, and the models
that it shows give the output that it shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from material import articles, write_raw_folder, write_task_file
from test_scripts import ROOT, call

sys.path.insert(0, str(ROOT / "results"))
from tables import insert_tables

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "results"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
COMMANDS = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "sh"
            for line in text.splitlines()]
ELSEWHERE = ("pip install", "torchrun")  # .ci/run runs the first, test_ranks.py the second
PRESET = ["--preset", "smoke"]
SMALLER = {"2000": "20", "steps=600": "steps=6"}


def part(title: str) -> str:
    """A part of README.md, from its heading to the next one."""
    return README.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def test_it_can_be_read_in_a_quarter_of_an_hour() -> None:
    assert len(README.split()) <= 2_500
    assert len((RESULTS / "README.md").read_text(encoding="utf-8").split()) <= 5_000


def test_links_and_pictures_are_there() -> None:
    for name in ("README.md", "results/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), target


# ---- commands ----


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone of the repository, with a few raw files in place of downloads."""
    folder = tmp_path_factory.mktemp("home")
    write_raw_folder(folder / "data/raw")
    pages = "".join(f"<page><title>{a['title']}</title><ns>0</ns><revision><text>{a['text']}</text>"
                    "</revision></page>" for a in articles(1_200))
    (folder / "data/raw/simplewiki-20240801-pages-articles.xml").write_text(
        f"<mediawiki>{pages}</mediawiki>", encoding="utf-8")
    texts = "\n\n".join(a["text"] for a in articles(150))
    (folder / "greek.txt").write_text(texts, encoding="utf-8")
    write_task_file(folder / "train.csv")
    write_task_file(folder / "test.csv", 10, 1)
    shutil.copytree(RESULTS / "models", folder / "results/models")
    return folder


def newest(folder: Path) -> str:
    return str(max(folder.iterdir(), key=lambda run: run.stat().st_mtime))


def words_of(command: str, home: Path) -> tuple[str, list[str]]:
    """A command of the README as a script and its words, at smoke size."""
    words = shlex.split(command)
    assert words.pop(0) == "python", command
    if words[0] == "-m":
        words.pop(0)
    script = words.pop(0).removesuffix(".py")
    for kind in ("pretrain", "finetune", "committee"):
        run = f"runs/{kind}/RUN"
        words = [newest(home / "runs" / kind) if word == run else word for word in words]
    words = [SMALLER.get(word, word) for word in words]
    trains = script in ("pretrain", "finetune", "committee") and not {
        "--show", "--fill-mask", "--predict"} & set(words)
    if trains or words[:1] == ["prepare"]:
        words += PRESET
    return script, words


def test_every_command_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the README, each with the smoke preset and made-up raw files."""
    monkeypatch.chdir(home)
    assert call("data", ["prepare", "vital", *PRESET])[0] == 0  # the first command makes it
    for command in COMMANDS:
        for one in command.split(" && "):
            if one.startswith(ELSEWHERE) or "pytest" in one:
                continue
            if "extras" in one:
                pytest.importorskip("matplotlib")
                pytest.importorskip("transformers")
            script, words = words_of(one, home)
            status, shown = call(script, words)
            assert status == 0, f"{one}\n{shown}"


# ---- numbers ----


def numbers_in(value: object) -> Iterator[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers_in(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def rounded(file: str) -> set[str]:
    """The numbers of a JSON file as a table may show them: rounded, or in percent."""
    shown = set()
    for x in numbers_in(json.loads((RESULTS / file).read_text(encoding="utf-8"))):
        for value in (x, 100 * x, x / 60, x / 1e6):
            shown |= {f"{abs(value):.{digits}f}" for digits in (1, 2, 3, 4)}
    return shown


def decimals(text: str) -> set[str]:
    found = re.findall(r"(?<![\w.])[\d,]*\d\.\d+(?![\w.])", text)
    return {number.replace(",", "") for number in found}


def test_the_output_of_the_first_command_is_the_recorded_one() -> None:
    known = rounded("committee-topics-quick.json")
    (output,) = re.findall(r"^```\n(.*?)^```$", part("What the first command prints"),
                           flags=re.M | re.S)
    assert len(decimals(output)) > 30
    assert decimals(output) <= known


@pytest.mark.parametrize("title, files", [
    ("What the first command prints", ["committee-topics-quick.json", "controls.json"]),
    ("How fast", ["speed-cpu.json"]),
    ("Exercises", ["exercises.json"])])
def test_every_number_stands_in_its_file(title: str, files: list[str]) -> None:
    known = set().union(*map(rounded, files))
    assert decimals(part(title)) <= known


def test_the_four_claims_stand_in_the_tables_of_the_study() -> None:
    """These are made from its runs: study.json."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert insert_tables(text) == text
    tables = re.findall(r"^<!-- table C\d -->\n\n((?:\|.*\n)+)", text, flags=re.M)
    assert len(tables) == 4
    rows = re.findall(r"^\| \*\*C\d\*\*.*", part("The four claims"), flags=re.M)
    for row, table in zip(rows, tables, strict=True):
        known = decimals(table)
        if "C4" in row:  # with latencies
            known |= rounded("committee-study.json")
        assert decimals(row) <= known, decimals(row) - known
    assert decimals(part("The four claims")) <= decimals("".join([*tables, *rows]))


# ---- the models of results/models ----


def words_and_values(line: str) -> tuple[list[str], list[float]]:
    """The words of a line, and its numbers with a decimal point."""
    words = line.split()
    values = [word for word in words if re.fullmatch(r"\d+\.\d+", word)]
    return [word for word in words if word not in values], list(map(float, values))


@pytest.mark.parametrize("flag", ["--show", "--fill-mask"])
def test_the_models_say_what_the_readme_shows(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are equal, probabilities nearly so: another processor rounds in another way."""
    monkeypatch.chdir(ROOT)
    (command,) = [command for command in COMMANDS if flag in command]
    script, *words = shlex.split(command)[1:]
    status, shown = call(script.removesuffix(".py"), words)
    assert status == 0, shown
    expected = [words_and_values(line) for line in README.splitlines()]
    for line in shown.strip().splitlines():
        words, values = words_and_values(line)
        candidates = [numbers for text, numbers in expected if text == words]
        assert any(values == pytest.approx(one, abs=0.002) for one in candidates), line
