"""Redraws every figure and every table of measurements from the JSON files here: nothing between the READMEs' markers is typed by hand.

    python results/figures.py       rewrites README.md and results/README.md between their study markers, and results/figures/*.png

Without matplotlib (tests/requirements.txt) the tables are still written. A cell that has not been run is "not yet measured".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import InputError, run_script, write_atomically  # noqa: E402
from finetune import mean_and_interval  # noqa: E402
from plan import SIZES  # noqa: E402
from pretrain import pyplot, read_json  # noqa: E402

MISSING = "not yet measured"
TASKS = {"fewrel": "FewRel", "agnews": "AG News", "dbpedia": "DBpedia"}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's, safe for the colour-blind


class Cell:
    """One results.json of committee.py, as the study's cells keep it."""

    def __init__(self, path: Path) -> None:
        self.record = read_json(path)
        if not {"tasks", "pretraining", "settings"} <= set(self.record) or self.record["settings"].get("seeds") != 1:
            raise InputError(f"{path}: not a cell of the study (a results.json of committee.py with one fine-tuning seed)")
        self.tasks = self.record["tasks"]

    def accuracies(self, task: str, model: str, kind: str) -> list[float]:
        """Of each pre-training seed, in %."""
        return [100 * x for x in self.tasks[task]["models"][model][kind]]

    def gaps(self, task: str, model: str) -> list[float]:
        """Pre-trained minus from scratch, in points, seed by seed."""
        return [a - b for a, b in zip(self.accuracies(task, model, "pretrained"), self.accuracies(task, model, "scratch"))]

    def losses(self, model: str) -> list[float]:
        return [run["held_out_loss"] for name, run in self.record["pretraining"].items() if name.rpartition("-seed")[0] == model]


def load(folder: Path) -> dict[str, Cell]:
    if not folder.is_dir():
        raise InputError(f"--study {folder}: no such folder")
    return {path.stem: Cell(path) for path in sorted(folder.glob("*.json"))}


def with_interval(values: Sequence[float], sign: bool = False, digits: int = 1) -> str:
    """Mean and half-width of the 95 % t-interval."""
    mean, half = mean_and_interval(values)
    return f"{mean:{'+' if sign else ''}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else " (one seed)")


def difference(values: Sequence[float], unit: str = "points") -> str:
    """A mean difference with its interval, and what that allows to say."""
    mean, half = mean_and_interval(values)
    if len(values) < 2:
        return f"{mean:+.1f} {unit} (one seed)"
    return against({"mean": mean, "low": mean - half, "high": mean + half}, unit)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def against(d: dict[str, float], unit: str = "points") -> str:
    """A difference with the ends of its interval, as committee.py keeps it, in words."""
    return f"{d['mean']:+.1f} {unit} ({d['low']:+.1f} to {d['high']:+.1f}{'' if d['low'] > 0 or d['high'] < 0 else ', within noise'})"


def slopes(cells: Sequence[Cell], sizes: Sequence[int], task: str, model: str) -> list[float]:
    """Points of gap for each doubling of the articles, seed by seed: the slope of a straight line."""
    gaps = np.array([cell.gaps(task, model) for cell in cells])  # (sizes, seeds)
    return list(np.polyfit(np.log2(sizes), gaps, 1)[0])


# --------------------------------------------------------------------------------------------------- the tables
def claim_1(cells: dict[str, Cell]) -> str:
    rows, verdicts = [], []
    for task, title in TASKS.items():
        for model in ("bert-6", "bert-1"):
            row = [title, model]
            if "c1" in cells:
                c = cells["c1"]
                values = [c.accuracies(task, model, kind) for kind in ("pretrained", "scratch")]
                row += [str(len(values[0])), *map(with_interval, values), with_interval(c.gaps(task, model), sign=True)]
                verdicts.append(f"{title}, {model} {difference(c.gaps(task, model))}")
            else:
                row += ["", MISSING, "", ""]
            rows.append(row)
    text = table(["task", "model", "seeds", "pre-trained, %", "from scratch, %", "gap, points"], rows)
    if "clean" in cells and "c1" in cells:  # their first seeds are the same
        both = {t: [cells[name].accuracies(t, "bert-1", "pretrained") for name in ("clean", "c1")] for t in cells["clean"].tasks}
        change = {t: [a - b for a, b in zip(*values)] for t, values in both.items()}
        text += ("\n\nPre-trained without the articles that share ten words in a row with a test row, BERT-1 changes by: "
                 + "; ".join(f"{TASKS[t]} {difference(values)}" for t, values in change.items()) + ".")
    return text + (f"\n\nPre-training is worth: {'; '.join(verdicts)}." if verdicts else "")


def claim_2(cells: dict[str, Cell]) -> str:
    rows, verdicts = [], []
    for kind, title in (("steps", "equal steps"), ("passes", "two passes")):
        there = {n: cells[f"c2-{kind}-{n}"] for n in SIZES if f"c2-{kind}-{n}" in cells}
        for n in SIZES:
            row = [title, f"{n:,}"]
            if n in there:
                c = there[n]
                steps = {run["steps"] for run in c.record["pretraining"].values()}
                row += ["/".join(f"{s:,}" for s in steps), with_interval(c.losses("bert-1"), digits=2),
                        with_interval(c.accuracies("fewrel", "bert-1", "pretrained")), with_interval(c.gaps("fewrel", "bert-1"), sign=True)]
            else:
                row += ["", MISSING, "", ""]
            rows.append(row)
        if len(there) > 2:
            verdicts.append(f"{title}: {difference(slopes(list(there.values()), list(there), 'fewrel', 'bert-1'), 'points a doubling')}")
    text = table(["", "articles", "steps", "held-out loss, nats", "FewRel, pre-trained, %", "gap, points"], rows)
    return text + (f"\n\nThe gap's slope, BERT-1: {'; '.join(verdicts)}." if verdicts else "")


def claim_3(cells: dict[str, Cell]) -> str:
    rows, verdicts = [], []
    for task in ("fewrel", "agnews"):
        for arm in ("low", "random", "high"):
            row = [TASKS[task], arm]
            if c := cells.get(f"c3-{task}-{arm}"):
                row += [with_interval(c.losses("bert-1"), digits=2), with_interval(c.accuracies(task, "bert-1", "pretrained")),
                        with_interval(c.gaps(task, "bert-1"), sign=True)]
            else:
                row += [MISSING, "", ""]
            rows.append(row)
        low, high = (cells.get(f"c3-{task}-{arm}") for arm in ("low", "high"))
        if low and high:
            verdicts.append(f"{TASKS[task]} {difference([a - b for a, b in zip(high.gaps(task, 'bert-1'), low.gaps(task, 'bert-1'))])}")
    text = table(["task", "overlap", "held-out loss, nats", "pre-trained, %", "gap, points"], rows)
    return text + (f"\n\nHigh minus low overlap, BERT-1: {'; '.join(verdicts)}." if verdicts else "")


def claim_4(cells: dict[str, Cell]) -> str:
    c = cells.get("c4")
    if not c:
        return table(["task", "committee of", "accuracy, %"], [["", "", MISSING]])
    rows = []
    for task, title in TASKS.items():
        part = c.tasks[task]
        (votes,) = part["committee"]["bert-1"]
        deep = c.accuracies(task, "bert-6", "pretrained")[0]
        quality = part["quality"]
        reached = next((str(k) for k, v in enumerate(votes, 1) if 100 * v >= deep), "not reached")
        rows.append([title, f"{deep:.1f}", *(f"{100 * v:.1f}" for v in votes), reached, f"{100 * quality['agreement']:.0f}",
                     *(f"{quality[k]:.3f}" for k in ("deep", "member", "committee"))])
    text = table(["task", "bert-6, %", *(f"{k} bert-1" for k in range(1, len(votes) + 1)), "level with bert-6 from", "agreement, %",
                  "calibration error: bert-6", "member", "committee"], rows)
    verdicts = "; ".join(f"{title} {against(c.tasks[task]['against_deep'])}" for task, title in TASKS.items())
    text += f"\n\nCommittee of {len(votes)} minus bert-6 (95 % bootstrap over test rows, one seed): {verdicts}."
    stems = {model: cells[name] for model, name in (("bert-1-conv3", "stem-with"), ("bert-1", "stem-without")) if name in cells}
    if stems:
        text += "\n\nThree members with a convolutional stem, and without, 300 steps, FewRel with 20 labels a class: " + "; ".join(
            f"{m} {with_interval(s.accuracies('fewrel', m, 'pretrained'))} % (gap {with_interval(s.gaps('fewrel', m), sign=True)}), as a "
            f"committee {100 * s.tasks['fewrel']['committee'][m][0][-1]:.1f} %" for m, s in stems.items()) + "."
    if mixed := cells.get("mixed"):
        part = mixed.tasks["fewrel"]
        (curve,) = part["committee"]["bert-1+bert-1-wide"]
        alone = {m: np.mean(mixed.accuracies("fewrel", m, "pretrained")) for m in ("bert-1", "bert-1-wide")}
        text += (f"\n\nBERT-1s and BERT-1s of twice the width (bert-1-wide) in turn, on FewRel: alone {alone['bert-1']:.1f} and "
                 f"{alone['bert-1-wide']:.1f} %, the committee of {len(curve)} {100 * curve[-1]:.1f} %; minus bert-6 "
                 f"{against(part['against_deep'])}; two members agree on {100 * part['quality']['agreement']:.0f} % of the rows.")
    name = f"committee-{len(votes)}"
    latency, price = c.record["latency_ms"], c.record["price"]
    rows = [[m, f"{latency[m]['median']:.2f} ({latency[m]['p10']:.2f}-{latency[m]['p90']:.2f})", f"{latency[m]['texts_per_s']:.0f}",
             f"{price[m]['parameters'] / 1e6:.2f}", f"{price[m]['operations'] / 1e6:.0f}"] for m in ("bert-6", "member", name)]
    header = ["", "ms a text, median (10-90 %)", "texts/s in batches of 64", "M parameters", "M operations a text"]
    return text + "\n\n" + table(header, rows)


def controls(cells: dict[str, Cell]) -> str:
    arms = {"c2-steps-90000": "pre-training as it is", "control-counts": "both starts, and not a step of training",
            "control-plain": "neither start: masked language modelling alone", "control-shuffled": "tokens shuffled within each article",
            "control-unigram": "tokens drawn from the unigram distribution"}
    rows = []
    for name, title in arms.items():
        if c := cells.get(name):
            rows.append([title, with_interval(c.losses("bert-1"), digits=2), with_interval(c.accuracies("fewrel", "bert-1", "pretrained")),
                         with_interval(c.gaps("fewrel", "bert-1"), sign=True)])
        else:
            rows.append([title, MISSING, "", ""])
    return table(["BERT-1, 90,000 articles", "held-out loss, nats", "FewRel, %", "gap, points"], rows)


def grid(cells: dict[str, Cell]) -> str:
    rows = []
    for labels in (5, 20, 100, 624):
        row = [str(labels)]
        small, large = (cells.get(f"c2-steps-{n}" if labels == 100 else f"grid-{labels}-{n}") for n in (5_000, 90_000))
        row.append(with_interval(large.accuracies("fewrel", "bert-1", "scratch")) if large else MISSING)
        for c in (small, large):
            row.append(f"{with_interval(c.accuracies('fewrel', 'bert-1', 'pretrained'))}; "
                       f"gap {with_interval(c.gaps('fewrel', 'bert-1'), sign=True)}" if c else MISSING)
        rows.append(row)
    return table(["labels a class", "from scratch, %", "5,000 articles, %", "90,000 articles, %"], rows)


def compute(cells: dict[str, Cell]) -> str:
    """Accuracy on FewRel against the seconds of pre-training that it takes, at the best rate that any run of the model reached: some
    were trained on a busy machine."""
    known = [*cells.values(), Cell(HERE / "committee-fewrel-quick.json")]
    runs_of = {model: [run for c in known for name, run in c.record["pretraining"].items() if name.startswith(f"{model}-seed")]
               for model in ("bert-1", "bert-6")}
    rates = {model: max(run["tokens"] / run["seconds"] for run in runs) for model, runs in runs_of.items() if runs}
    rows = []
    for name, title in {"c2-steps-90000": "90,000 articles", **{f"c2-passes-{n}": f"{n:,} articles, two passes" for n in SIZES},
                        "c1": "90,000 articles"}.items():
        model = "bert-6" if name == "c1" else "bert-1"
        if not (c := cells.get(name)):
            rows.append([model, title, "", MISSING, "", "", ""])
            continue
        runs = [run for key, run in c.record["pretraining"].items() if key.startswith(f"{model}-seed")]
        seconds, gap = float(np.mean([run["tokens"] for run in runs])) / rates[model], float(np.mean(c.gaps("fewrel", model)))
        rows.append([model, title, f"{runs[0]['steps']:,}", f"{seconds:.0f}", with_interval(c.accuracies("fewrel", model, "pretrained")),
                     with_interval(c.gaps("fewrel", model), sign=True), f"{60 * gap / seconds:.1f}"])
    return (table(["", "", "steps", "seconds of pre-training*", "FewRel, %", "gap, points", "points a minute"], rows)
            + "\n\n*Tokens by the best rate that any run reached, one core of two (some runs shared the machine): "
            + ", ".join(f"{rate:,.0f} tokens/s for {model}" for model, rate in rates.items()) + ".")


# ------------------------------------------------------------------------------------- the recipe, results/ablate.py
def arms_of(pattern: str) -> dict[str, dict]:
    """The arms of results/PATTERN, as ablate.py wrote them, by name; of an arm in several files that with the most seeds."""
    found: dict[str, dict] = {}
    for path in sorted(HERE.glob(pattern)):
        for name, arm in read_json(path)["arms"].items():
            if name not in found or len(arm["held_out_loss"]) > len(found[name]["held_out_loss"]):
                found[name] = arm
    return found


def percent(arm: dict, kind: str) -> str:
    (part,) = arm["tasks"].values()
    (model,) = part["models"].values()
    return with_interval([100 * x for x in model[kind]]) if kind in model else ""


def leaves(arm: dict) -> str:
    """When a loss curve leaves the unigram baseline: mean seconds of training, or how many of the runs have not left it."""
    found = [x for x in arm.get("break_seconds", []) if x is not None]
    missing = len(arm.get("break_seconds", [])) - len(found)
    return (with_interval(found, digits=0) if found and not missing else f"{missing} of {missing + len(found)} did not" if missing else "")


def arms_table(pattern: str, title: str, task: str = "FewRel") -> str:
    header = [title, "seeds", "held-out loss, nats", "off the plateau after, s", f"{task}, pre-trained, %", "from scratch, %"]
    rows = [[name, str(len(arm["held_out_loss"])), *(cell.removesuffix(" (one seed)") for cell in (
        with_interval(arm["held_out_loss"], digits=2), leaves(arm), percent(arm, "pretrained"), percent(arm, "scratch")))]
        for name, arm in arms_of(pattern).items()]
    return table(header, rows) if rows else MISSING


def ablation(cells: dict[str, Cell]) -> str:
    return arms_table("recipe-ablation*.json", "BERT-1, embedded default, 300 steps", "`topics`")


def five_minutes(cells: dict[str, Cell]) -> str:
    return arms_table("recipe-five-minutes-*.json", "BERT-1, 90,000 articles, five minutes on one core")


def ten_minutes(cells: dict[str, Cell]) -> str:
    return "\n\n".join((arms_table("recipe-ten-minutes-*.json", "BERT-6, 90,000 articles, ten minutes on one core"),
                        arms_table("recipe-batch-bert-6-*.json", "the same on an EPYC, with faster code")))


def half_hour(cells: dict[str, Cell]) -> str:
    return "\n\n".join(arms_table(f"recipe-30-minutes-*-{model}.json", f"{model.upper()}, 90,000 articles, half an hour on one core")
                       for model in ("bert-1", "bert-6"))


def markers(cells: dict[str, Cell]) -> str:
    return "\n\n".join(arms_table(f"recipe-markers-{model}.json", f"{model.upper()}, 90,000 articles, {minutes} minutes on one core; "
                                  "entities marked, the classifier reads") for model, minutes in (("bert-1", "five"), ("bert-6", "ten")))


def short_conv(cells: dict[str, Cell]) -> str:
    marked = "on one core; entities marked, the classifier reads"
    titles = {"bert-1": f"BERT-1, 90,000 articles, five minutes {marked}", "bert-6": f"BERT-6, 90,000 articles, ten minutes {marked}",
              "topics-bert-1": "BERT-1, embedded default, 300 steps"}
    return "\n\n".join(arms_table(f"recipe-short-conv-{name}.json", title, "`topics`" if "topics" in name else "FewRel")
                       for name, title in titles.items())


def wide(cells: dict[str, Cell]) -> str:
    return arms_table("recipe-wide-*.json", "BERT-1, width 256, 8 heads, 16,000 pieces counted within five tokens; seven minutes; "
                      "entities marked, the classifier reads")


def wider(cells: dict[str, Cell]) -> str:
    """The wider BERT-1 on test rows, with openings and with whole articles."""
    rows, gaps = [], dict[str, list[list[float]]]()
    titles = {"openings": "90,000 openings (the command above)", "whole": "125,000 whole articles, answers among 4,000 pieces"}
    for name, title in titles.items():
        cell = Cell(HERE / f"committee-fewrel-wide-{name}.json")
        for model in ("bert-6", "bert-1"):
            accuracies = (with_interval(cell.accuracies("fewrel", model, kind)) for kind in ("pretrained", "scratch"))
            rows.append([title, model, *accuracies, difference(cell.gaps("fewrel", model))])
            gaps.setdefault(model, []).append(cell.gaps("fewrel", model))
    means = {model: np.mean(values, axis=0) for model, values in gaps.items()}  # of the two runs, seed by seed
    both = "; ".join(f"{model} {difference(list(values))}" for model, values in means.items())
    return (table(["", "model", "pre-trained, %", "from scratch, %", "gap"], rows)
            + f"\n\nMean of both runs, {len(means['bert-1'])} seeds: {both}.")


def more_text(cells: dict[str, Cell]) -> str:
    return "\n\n".join(arms_table(f"recipe-text-{name}-*.json", f"the settings of the last row above, {how}") for name, how in (
        ("counts", "counted alone, without a step of training"),
        ("seven-minutes", "seven minutes on one core of an EPYC"), ("eleven-minutes", "eleven minutes on one core of an EPYC")))


def windows(cells: dict[str, Cell]) -> str:
    return "\n\n".join((arms_table("recipe-windows-fewrel-*.json", "BERT-1, 90,000 articles; entities marked, the classifier reads"),
                        arms_table("recipe-windows-topics-*.json", "BERT-1, embedded default", "`topics`")))


# ------------------------------------------------------------------------------- speed, tests/benchmark_speed.py
def speed(cells: dict[str, Cell]) -> str:
    texts = []
    for path in sorted(HERE.glob("speed-*.json")):
        record = read_json(path)
        if "rows" not in record or "together" in path.name:
            continue  # of --grow, --profile, --together
        rows = []
        for r in record["rows"]:
            ours, theirs = (f"{r[side]:,.0f}" if r[side] >= 1_000 else f"{r[side]:.3g}" for side in ("ours", "reference"))
            aim = f"{r['reference']:.3g} {r['unit']}" if r.get("reference_is") else f"{r['target']:.1f}"
            ratio = "" if r.get("reference_is") else f"{r['ratio']:.1f}"
            theirs = "" if r.get("reference_is") else theirs
            rows.append([r["name"].strip(), ours, theirs, r["unit"], ratio, aim + ("" if r["met"] else ", not met")])
        machine = record["machine"]
        given = record["settings"]
        texts.append(f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores; {record['hardware']}; texts of {given['task']}, "
                     f"a vocabulary of {given['vocab_size']:,}, {'few' if given['quick'] else 'many'} repetitions:\n\n"
                     + table(["", "ours", "the authors' way", "unit", "times faster", "aim"], rows))
    for path in sorted(HERE.glob("speed-profile-*.json")):
        shares = read_json(path)["profile"]
        kinds = sorted(next(iter(shares.values())), key=lambda kind: -max(share.get(kind, 0) for share in shares.values()))
        texts.append(f"Where a training step's time goes, in % ({path.name}):\n\n" + table(["", *kinds], [
            [name, *(f"{100 * share.get(kind, 0):.0f}" for kind in kinds)] for name, share in shares.items()]))
    return "\n\n".join(texts) or MISSING


def growth(cells: dict[str, Cell]) -> str:
    """Memory and time of every model of the two presets, and the picture of how cost grows."""
    texts = []
    for path in sorted(HERE.glob("speed-growth-*.json")):
        record = read_json(path)
        rows = [[r["preset"], r["model"], f"{r['parameters'] / 1e6:.1f}", f"{r['memory_gb']:.1f}", f"{r['tokens_per_s']:,.0f}",
                 f"{r['tokens'] / 1e6:,.1f}", f"{60 * r['hours']:.1f} minutes" if r["hours"] < 1 else f"{r['hours']:,.0f} hours"]
                for r in record["growth"]["models"]]
        name = path.stem.removeprefix("speed-")
        header = ["preset", "model", "M parameters", "peak memory, GB", "tokens/s", "M tokens", "at that rate"]
        texts.append(f"{record['machine'].get('gpu') or record['machine']['cpu']}, {record['machine']['cores']} cores; "
                     f"{record['hardware']}:\n\n" + table(header, rows) + f"\n\n![{name}](results/figures/{name}.png)")
    return "\n\n".join(texts) or MISSING


def draw_growth(plt, record: dict):
    """Cost of `quick`'s model with one thing changed at a time: tokens/s above, memory below; committees: texts/s, ms."""
    titles = {"width": "width", "layers": "layers", "batch_size": "texts a step", "max_length": "tokens a text", "members": "members K"}
    figure, panels = plt.subplots(2, len(titles), figsize=(14, 5.5), sharex="col")
    for column, (what, title) in zip(panels.T, titles.items()):
        found = record["growth"][what]
        keys = ("texts_per_s", "ms") if what == "members" else ("tokens_per_s", "memory_gb")
        for axes, key, colour, marker in zip(column, keys, (BLUE, ORANGE), "so"):
            axes.plot([x["value"] for x in found], [x[key] for x in found], color=colour, marker=marker)
            axes.set_xscale("log", base=2)
            axes.set_xticks([x["value"] for x in found], [str(x["value"]) for x in found])
            axes.minorticks_off()
            axes.tick_params(axis="x", labelsize=8)
            axes.set_ylim(bottom=0)
            axes.set_ylabel({"texts_per_s": "texts/s, batches of 64", "ms": "ms for one text", "tokens_per_s": "training, tokens/s",
                             "memory_gb": "peak memory, GB"}[key])
        column[1].set_xlabel(title)
    figure.suptitle("How cost grows: quick's BERT-1, one thing changed at a time; committees of K at work")
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------- reliability, tests/ -m slow
def reliability(cells: dict[str, Cell]) -> str:
    """What the long tests did to the scripts, and what came of it."""
    if not (HERE / "reliability.json").exists():
        return MISSING
    record = read_json(HERE / "reliability.json")
    rows = []
    for name, x in record.get("killed", {}).items():
        script, comma, threads = name.partition(",")
        where = ", ".join(f"{k} {v}" for k, v in sorted(x["where"].items()))
        rows.append([f"{script}.py{comma}{threads} killed", f"{x['kills']} times ({where})",
                     "weights and optimizer bit-identical" if x["bit-identical"] else "differed"])
    for part in ("rubbish in files", "rubbish in command lines"):
        if part in record:
            counts = record[part].values()
            rows.append([part, f"{sum(sum(x.values()) for x in counts):,} cases", ", ".join(
                f"{sum(x[key] for x in counts):,} {key}" for key in next(iter(counts)))])
    if peaks := record.get("bombs of 1000 MB: peak memory in MB"):
        rows.append(["archives that unpack to 1,000 MB", "; ".join(peaks), f"refused or passed over, in {max(peaks.values())} MB at most"])
    if soak := record.get("soak"):
        rows.append(["the whole way from download to committee, with one random fault", f"{soak['cycles']} times",
                     f"{soak['survived']} survived, lost work {soak['lost work']}, wrong results {soak['wrong results']}"])
    return table(["", "tried", "what came of it"], rows)


# -------------------------------------------------------------------------------------------------- the figures
def draw(cells: dict[str, Cell], folder: Path) -> list[Path]:
    """PNG files of what there is to draw; none without matplotlib."""
    if not (plt := pyplot()):
        return []
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130, "savefig.bbox": "tight"})
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []

    def save(figure, name: str) -> None:
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], metadata={"Software": None})
        plt.close(figure)

    def points(axes, x: float, values: Sequence[float], colour: str, marker: str, label: str | None = None) -> None:
        mean, half = mean_and_interval(values)
        axes.errorbar(x, mean, yerr=0 if math.isnan(half) else half, color=colour, marker=marker, markersize=7, capsize=4, label=label)

    if c := cells.get("c1"):
        figure, axes = plt.subplots(figsize=(7, 4))
        places = [(t, m) for t in TASKS for m in ("bert-6", "bert-1")]
        for x, (task, model) in enumerate(places):
            for shift, kind, colour, marker, label in ((-0.08, "scratch", ORANGE, "o", "from scratch"),
                                                       (0.08, "pretrained", BLUE, "s", "pre-trained")):
                points(axes, x + shift, c.accuracies(task, model, kind), colour, marker, label if x == 0 else None)
        axes.set_xticks(range(len(places)), [f"{TASKS[t]}\n{m}" for t, m in places])
        axes.set(ylabel="test accuracy, %", title="C1: with and without pre-training")
        axes.legend(frameon=False)
        save(figure, "c1")
    lines = {kind: [(n, cells[f"c2-{kind}-{n}"]) for n in SIZES if f"c2-{kind}-{n}" in cells] for kind in ("steps", "passes")}
    if any(len(x) > 1 for x in lines.values()):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
        for kind, colour, marker, label in (("steps", BLUE, "s", "equal steps"), ("passes", ORANGE, "o", "two passes")):
            for axes, value in ((left, lambda c: c.losses("bert-1")), (right, lambda c: c.gaps("fewrel", "bert-1"))):
                axes.plot([n for n, _ in lines[kind]], [np.mean(value(c)) for _, c in lines[kind]], color=colour)
                for i, (n, c) in enumerate(lines[kind]):
                    points(axes, n, value(c), colour, marker, label if i == 0 else None)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(SIZES, [f"{n // 1000}k" for n in SIZES])
            axes.minorticks_off()
            axes.set_xlabel("pre-training articles")
        left.set(ylabel="held-out loss, nats", title="C2: language, BERT-1")
        right.set(ylabel="gap on FewRel, points", title="C2: what it is worth")
        right.axhline(0, color=GREY, linewidth=1)
        left.legend(frameon=False)
        save(figure, "c2")
    arms = [(task, arm, cells[f"c3-{task}-{arm}"]) for task in ("fewrel", "agnews") for arm in ("low", "random", "high")
            if f"c3-{task}-{arm}" in cells]
    if arms:
        figure, axes = plt.subplots(figsize=(6, 4))
        for x, (task, _, c) in enumerate(arms):
            points(axes, x, c.gaps(task, "bert-1"), BLUE if task == "fewrel" else ORANGE, "s" if task == "fewrel" else "o")
        axes.set_xticks(range(len(arms)), [f"{TASKS[t]}\n{a}" for t, a, _ in arms])
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set(ylabel="gap, points", title="C3: token overlap of the articles with the task, BERT-1")
        save(figure, "c3")
    if c := cells.get("c4"):
        figure, panels = plt.subplots(1, 3, figsize=(11, 3.6))
        for axes, (task, title) in zip(panels, TASKS.items()):
            (votes,) = c.tasks[task]["committee"]["bert-1"]
            axes.plot(range(1, len(votes) + 1), [100 * v for v in votes], color=BLUE, marker="s", label="committee of K bert-1")
            axes.axhline(c.accuracies(task, "bert-6", "pretrained")[0], color=ORANGE, linestyle="--", label="bert-6")
            axes.set(xlabel="members K", title=title, xticks=range(1, len(votes) + 1))
        panels[0].set_ylabel("test accuracy, %")
        panels[0].legend(frameon=False)
        figure.suptitle("C4: the soft committee against the deep model", y=1.03)
        save(figure, "c4")
    for path in HERE.glob("speed-growth-*.json"):
        save(draw_growth(plt, read_json(path)), "growth-" + path.stem.removeprefix("speed-growth-"))
    return made


SECTIONS = {"c1": claim_1, "c2": claim_2, "c3": claim_3, "c4": claim_4, "controls": controls, "grid": grid, "compute": compute,
            "ablation": ablation, "five-minutes": five_minutes, "ten-minutes": ten_minutes, "half-hour": half_hour,
            "short-conv": short_conv, "windows": windows, "wide": wide, "wider": wider, "text": more_text, "markers": markers,
            "speed": speed, "growth": growth, "reliability": reliability}


def rewrite(readme: str, cells: dict[str, Cell], pictures: set[str]) -> str:
    """A README with what stands between <!--study:NAME--> and <!--end--> made anew. (Pictures: the top level's alone have any.)"""
    for name, section in SECTIONS.items():
        start, end = f"<!--study:{name}-->", "<!--end-->"
        before, found, rest = readme.partition(start)
        if found and end not in rest:
            raise InputError(f"README: no {end} behind {start}")
        if found:
            picture = f"![{name}](results/figures/{name}.png)\n\n" if name in pictures else ""
            readme = f"{before}{start}\n{picture}{section(cells)}\n{end}{rest.partition(end)[2]}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "study", metavar="DIR", help="the cells' JSON files (default results/study)")
    parser.add_argument("--figures", type=Path, default=HERE / "figures", metavar="DIR", help="where to draw (default results/figures)")
    parser.add_argument("--readme", type=Path, nargs="+", default=[HERE.parent / "README.md", HERE / "README.md"], metavar="FILE",
                        help="to rewrite (default README.md and results/README.md)")
    args = parser.parse_args()
    for readme in args.readme:
        if not readme.is_file():
            raise InputError(f"--readme {readme}: no such file")
    cells = load(args.study)
    made = draw(cells, args.figures)
    pictures = {path.stem for path in made or args.figures.glob("*.png")}
    texts = {readme: rewrite(readme.read_text(encoding="utf-8"), cells, pictures) for readme in args.readme}
    for readme, text in texts.items():
        with write_atomically(readme) as file:
            file.write(text.encode("utf-8"))
    print(f"{len(cells)} cells; {len(made)} figures; {', '.join(map(str, args.readme))} rewritten")


if __name__ == "__main__":
    run_script(main)
