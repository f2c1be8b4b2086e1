"""The study's plan, its commands, and the tables and figures made of its results."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain
from data import TokenTable
from finetune import mean_and_interval
from material import write_articles, write_raw_folder
from test_scripts import ROOT, run

sys.path.insert(0, str(ROOT / "results"))
import figures  # noqa: E402
import plan  # noqa: E402
import variants  # noqa: E402


def cell(gap: float, tasks: tuple[str, ...] = ("fewrel",), deep: bool = False, loss: float = 5.0) -> dict:
    """A record like committee.py's, with three pre-training seeds."""
    scratch = [0.40, 0.41, 0.42]
    values = {"pretrained": [s + gap + 0.01 * i for i, s in enumerate(scratch)], "scratch": scratch}
    models = {"bert-1": values, **({"bert-6": values} if deep else {})}
    part = {"models": models, "committee": {"bert-1": [[0.5, 0.55, 0.6]]}, "quality": {"deep": 0.1, "member": 0.2, "committee": 0.05, "agreement": 0.7}}
    timing = {"median": 2.0, "p10": 1.0, "p90": 3.0, "texts_per_s": 100.0}
    names = ("bert-6", "member", "committee-3")
    if deep:
        part["against_deep"] = {"mean": 4.0, "low": 2.0, "high": 6.0, "over": "rows"}
    return {"settings": {"seeds": 1}, "tasks": {t: part for t in tasks}, "latency_ms": {n: timing for n in names},
            "price": {n: {"parameters": 1e6, "operations": 2e6} for n in names},
            "pretraining": {f"{m}-seed{s}-abc": {"held_out_loss": loss, "steps": 7, "tokens": 10_000_000, "seconds": 100.0 + s}
                            for m in models for s in range(3)}}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    for name, record in {"c2-steps-5000": cell(0.0), "c2-steps-20000": cell(0.02), "c2-steps-40000": cell(0.03), "c1": cell(0.1, figures.TASKS, True),
                         "c4": cell(0.1, figures.TASKS, True), "c3-agnews-low": cell(0.01, ("agnews",)), "c3-agnews-high": cell(0.05, ("agnews",)),
                         "control-counts": cell(0.0, loss=6.4)}.items():
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_tables_and_figures(study: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "\n".join(f"<!--study:{name}-->\nstale table\n<!--end-->\nbetween" for name in figures.SECTIONS), encoding="utf-8")
    run("results/figures.py", "--study", study, "--figures", tmp_path / "figures", "--readme", readme)
    text = readme.read_text(encoding="utf-8")
    assert "stale table" not in text and text.count("between") == len(figures.SECTIONS) and text.startswith("before")
    assert "| FewRel | bert-6 | 3 | 52.0 ± 5.0 | 41.0 ± 2.5 | +11.0 ± 2.5 |" in text  # gaps 10, 11, 12: 11 ± 4.303 / sqrt(3)
    assert "| equal steps | 90,000 |  | not yet measured |" in text
    assert "AG News +4.0 points" in text
    assert "| bert-6 | 90,000 articles | 7 | 100 | 52.0 ± 5.0 | +11.0 ± 2.5 | 6.6 |" in text  # 100 s at 100,000 tokens/s, the best rate
    assert "| FewRel | 50.0 | 50.0 | 55.0 | 60.0 | 1 | 70 | 0.100 | 0.200 | 0.050 |" in text and "FewRel +4.0 points (+2.0 to +6.0)" in text
    again = figures.rewrite(text, figures.load(study), {p.stem for p in (tmp_path / "figures").glob("*.png")})
    assert again == text, "a second time changes something"
    pytest.importorskip("matplotlib")
    grown = {p.stem.removeprefix("speed-") for p in (ROOT / "results").glob("speed-growth-*.json")}
    assert {p.stem for p in (tmp_path / "figures").glob("*.png")} == {"c1", "c2", "c3", "c4"} | grown
    assert all(p.read_bytes().startswith(b"\x89PNG") and f"results/figures/{p.name}" in text for p in (tmp_path / "figures").glob("*.png"))


def test_every_table_stands_in_one_of_the_readmes() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "results/README.md")]
    assert {name: sum(text.count(f"<!--study:{name}-->") for text in texts) for name in figures.SECTIONS} == dict.fromkeys(figures.SECTIONS, 1)


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    def anchors(path: Path) -> set[str]:  # as GitHub makes them of headings
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    found = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert found
    for file, anchor in found:
        path = ((ROOT / name).parent / file) if file else ROOT / name
        assert path.is_file() and (not anchor or anchor in anchors(path)), f"{name}: {file}#{anchor}"


def test_figures_refuse_what_they_do_not_know(study: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for content, folder, message in (("<!--study:c1-->\nrest", study, "no <!--end-->"), ("", tmp_path / "nothing", "no such folder")):
        readme.write_text(content, encoding="utf-8")
        assert message in run("results/figures.py", "--study", folder, "--figures", tmp_path / "f", "--readme", readme, status=2)
        assert readme.read_text(encoding="utf-8") == content
    (study / "other.json").write_text('{"tasks": {}}', encoding="utf-8")
    assert "not a cell of the study" in run("results/figures.py", "--study", study, "--readme", readme, status=2)


def test_slope_is_per_doubling_and_differences_say_when_they_are_noise(study: Path) -> None:
    cells = figures.load(study)
    values = figures.slopes([cells["c2-steps-20000"], cells["c2-steps-40000"]], (20_000, 40_000), "fewrel", "bert-1")
    assert values == pytest.approx([1.0, 1.0, 1.0])
    assert "within noise" in figures.difference([1.0, -1.0, 0.5]) and "within noise" not in figures.difference([1.0, 1.1, 0.9])
    mean, half = mean_and_interval([1.0, 1.1, 0.9])
    assert figures.difference([1.0, 1.1, 0.9]) == f"{mean:+.1f} points ({mean - half:+.1f} to {mean + half:+.1f})"


def test_plan_is_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    plan.trained.clear()
    plan.main()
    for name in ("plan.json", "reproduce.sh"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "results" / name).read_text(encoding="utf-8"), f"run results/plan.py: {name}"
    record = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert record["minutes_predicted"] <= 360
    assert record["minutes_predicted"] == pytest.approx(sum(c["minutes"] for c in record["cells"]), abs=1)


def test_the_commands_of_the_study_run(tmp_path: Path) -> None:
    """The first one, an arm, a control and a cell of the grid, at the smoke size and on made-up data."""
    write_articles(tmp_path / "wiki.jsonl.gz", 150)
    write_raw_folder(tmp_path / "raw")
    (tmp_path / "results" / "study").mkdir(parents=True)
    replacements = {"data/wikipedia/articles-*.jsonl.gz": str(tmp_path / "wiki.jsonl.gz"), "data": str(tmp_path / "raw"), "694": "0", "4000": "150"}
    lines = (ROOT / "results" / "reproduce.sh").read_text(encoding="utf-8").splitlines()
    commands = {re.search(r"--out \S*?([\w-]+)(\.json)?$", line)[1]: line for line in lines if line.startswith("python ") and "--out" in line}
    for name in ("prepared", "control-counts", "control-shuffled", "c3-fewrel-high", "grid-5-5000"):
        words = [replacements.get(w, w) for w in shlex.split(commands[name])[1:]]
        words = [str(tmp_path / w) if w.startswith(("runs/", "results/")) else "100" if w in ("5000", "90000") else w for w in words]
        words = ["20" if w == "10000" else "6" if w == "1000" else w for w in words]
        run(*words, "--preset", "smoke", *(["--test-per-class", "4", "--members", "1"] if words[0] == "committee.py" else ["--max-length", "32"]))
    assert {p.stem for p in (tmp_path / "results" / "study").glob("*.json")} == {"control-counts", "control-shuffled", "c3-fewrel-high", "grid-5-5000"}


def test_variants_do_what_their_names_say() -> None:
    recipe = pretrain.PRESETS["quick"]
    for name in ("cosine schedule", "full rate, falling in the last third"):
        _, schedule = variants.VARIANTS[name]
        factors = [schedule(recipe, step, 300, 10) for step in range(300)]
        assert factors[0] == pytest.approx(1 / 15) and max(factors) == 1 and factors[14] == 1 and 0 <= factors[-1] < 0.02
        assert sum(factors) > sum(pretrain.schedule(recipe, step, 300, 10) for step in range(300)) - 1
    table = TokenTable(np.arange(5, 205, dtype=np.uint16), np.array([0, 100, 200]), {})
    ramped = variants.RampedTable(table, torch.device("cpu"))
    assert ramped.batch(np.array([0, 1])).shape == (2, 32)
    ramped.started -= 80
    assert ramped.batch(np.array([0, 1])).shape == (2, 64)
    with torch.no_grad():
        assert ramped.batch(np.array([0, 1])).shape == (2, 104)
    ramped.started -= 80
    assert ramped.batch(np.array([0, 1])).shape == (2, 104)
    fused = torch.nn.Parameter(torch.ones(96, 32))
    fused.grad = torch.randn(96, 32)
    variants.VARIANTS["PyTorch's Muon, query, key and value as one"][1]([fused], lr=0.1, weight_decay=0.0, dtype=torch.float32).step()
    values = torch.linalg.svdvals(fused.detach() - 1) / 0.1 / 3**0.5
    assert 0.5 < values.min() and values.max() < 1.4  # one matrix of 96 rows, orthogonalised


def test_a_variant_replaces_pretraining_alone() -> None:
    before = pretrain.schedule
    with variants.replaced("cosine schedule"):
        assert pretrain.schedule is variants.cosine
    assert pretrain.schedule is before
    with variants.replaced(None):
        assert pretrain.schedule is before
