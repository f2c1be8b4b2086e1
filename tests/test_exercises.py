"""Each exercise does what its text promises: a solution is put in, and the difference is seen."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import finetune
import model
import pretrain
import tokenizer
from conftest import ROOT
from data import DataFolder, Task
from material import PLACES, articles, on_cpu, pretrain_run, small_tokenizer, tables_of
from model import BertConfig

# file: what is replaced or, if it ends in a line break, preceded by the solution
CAUSAL = ("    return scores.add_(mask).softmax(dim=-1)",
          "    future = torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(1)\n"
          "    return (scores + mask + future).softmax(dim=-1)")
NO_POSITIONS = (" + self.position(positions).unsqueeze(-3)", "")
WAVES = (" + self.position(positions).unsqueeze(-3)",
         " + 0.14 * waves(positions, self.config.width)")
HARD_VOTE = ("logits.float().softmax(dim=-1)",
             "F.one_hot(logits.argmax(-1), logits.size(-1)).float()")
WHOLE_WORDS = ("    draw = torch.rand(len(flat), generator=generator, device=device)\n",
               "    word = BEGINS_WORD[flat].cumsum(0)\n"
               "    draw = torch.rand(len(flat) + 1, generator=generator, device=device)[word]\n")
CONSTANT = ("(steps - step) / (steps - warmup)", "1.0")
HEAD_ALONE = ("        model.to(runtime.device)\n",
              "        model.bert.requires_grad_(False)\n        model.to(runtime.device)\n")
BPE = ('model_type="unigram"', 'model_type="bpe"')


def with_change(original: ModuleType, change: tuple[str, str], folder: Path) -> ModuleType:
    """A script of ours after a change, which must fit in exactly one place."""
    text = Path(str(original.__file__)).read_text(encoding="utf-8")
    assert text.count(change[0]) == 1, change[0]
    path = folder / f"changed_{original.__name__}.py"
    path.write_text(text.replace(*change), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_exercise_has_a_test_here() -> None:
    """Eight marks, and next to each the place that a test changes."""
    changes = {"tokenizer.py": [BPE], "model.py": [CAUSAL, NO_POSITIONS, WAVES, HARD_VOTE],
               "pretrain.py": [WHOLE_WORDS, CONSTANT], "finetune.py": [HEAD_ALONE]}
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        marks = [match.start() for match in re.finditer("# Exercise:", text)]
        places = [text.index(change[0]) for change in changes.get(path.name, [])]
        assert len(marks) == len(places), path
        for mark, place in zip(marks, sorted(places)):
            assert abs(place - mark) < 1_500, text[mark : mark + 60]


def test_bpe_cuts_texts_into_other_pieces(tmp_path: Path) -> None:
    texts = [article["text"] for article in articles(100)]
    pieces = []
    for module in (tokenizer, with_change(tokenizer, BPE, tmp_path)):
        trained = module.Tokenizer(module.train_tokenizer(texts, 150))
        pieces.append(trained.encode(["The museum of Norway"])[0].tolist())
        assert trained.decode(pieces[-1]) == "the museum of norway"
    assert pieces[0] != pieces[1]


def test_causal_attention_sees_no_later_token(tmp_path: Path) -> None:
    q, k = torch.randn(2, 1, 2, 5, 8)
    mask = torch.zeros(1, 1, 1, 5)
    changed = with_change(model, CAUSAL, tmp_path)
    later = torch.ones(5, 5).triu(1).bool()
    assert (model.attention_weights(q, k, mask)[..., later] > 0).all()
    assert (changed.attention_weights(q, k, mask)[..., later] == 0).all()


def test_without_positions_the_order_of_tokens_is_lost(tmp_path: Path) -> None:
    changed = with_change(model, NO_POSITIONS, tmp_path)
    torch.manual_seed(0)
    bert = model.MaskedLM(BertConfig(50, 1, 64, 1, 8)).eval().bert
    other = changed.MaskedLM(changed.BertConfig(50, 1, 64, 1, 8)).eval().bert
    ids, turned = torch.tensor([[2, 7, 9, 30, 3]]), torch.tensor([[2, 30, 9, 7, 3]])
    assert not torch.allclose(bert(ids)[0, 0], bert(turned)[0, 0], atol=1e-4)
    assert torch.allclose(other(ids)[0, 0], other(turned)[0, 0], atol=1e-5)


def test_fixed_waves_take_the_place_of_learned_positions(tmp_path: Path) -> None:
    changed = with_change(model, WAVES, tmp_path)

    def waves(positions: torch.Tensor, width: int) -> torch.Tensor:
        angles = positions[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

    changed.waves = waves
    torch.manual_seed(0)
    bert = changed.MaskedLM(changed.BertConfig(50, 1, 64, 1, 8)).eval().bert
    ids, turned = torch.tensor([[2, 7, 9, 30, 3]]), torch.tensor([[2, 30, 9, 7, 3]])
    before = bert(ids)
    assert not torch.allclose(before[0, 0], bert(turned)[0, 0], atol=1e-4)
    torch.nn.init.zeros_(bert.position.weight)
    assert torch.equal(before, bert(ids))  # the learned table is not read


def test_a_hard_vote_ignores_how_sure_a_member_is(tmp_path: Path) -> None:
    logits = torch.tensor([[[0.1, 0.0]], [[0.1, 0.0]], [[0.0, 9.0]]])  # two unsure, one sure
    changed = with_change(model, HARD_VOTE, tmp_path)
    assert model.vote(logits).argmax() == 1
    assert torch.allclose(changed.vote(logits), torch.tensor([[2 / 3, 1 / 3]]))


def test_whole_words_are_masked_together(tmp_path: Path) -> None:
    own = small_tokenizer()
    names = [own.pieces.id_to_piece(i) for i in range(own.vocab_size)]
    begins = torch.tensor([name.startswith("▁") or i < 5 for i, name in enumerate(names)])
    changed = with_change(pretrain, WHOLE_WORDS, tmp_path)
    changed.BEGINS_WORD = begins.long()
    ids = torch.tensor(own.encode([" ".join(a["text"] for a in articles(40))])[0].astype("int64"))
    torn = []
    for module in (pretrain, changed):
        _, positions, labels = module.mask_tokens(ids[None], own.vocab_size, 0.15)
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        chosen[positions[labels >= 0]] = True
        inside = ~begins[ids[1:]]  # this token and the one before it belong to one word
        torn.append(int((chosen[1:] != chosen[:-1])[inside].sum()))
    assert torn[0] > 20 and torn[1] == 0


def test_a_constant_rate_does_not_decay(tmp_path: Path) -> None:
    recipe = replace(pretrain.PRESETS["smoke"], warmup=0.2)
    changed = with_change(pretrain, CONSTANT, tmp_path)
    assert [pretrain.schedule(recipe, step, 10) for step in (0, 1, 9)] == [0.5, 1.0, 0.125]
    assert [changed.schedule(recipe, step, 10) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]


def test_the_head_alone_leaves_bert_as_it_was(corpus: DataFolder, tmp_path: Path) -> None:
    rows = [(f"the city of {PLACES[i % 2]} number {i}", i % 2) for i in range(24)]
    task = Task("places", PLACES[:2], rows[:16], [], rows[16:])
    checkpoint = pretrain_run("bert-1", pretrain.PRESETS["smoke"], corpus, 0, tmp_path / "runs")
    before = pretrain.load_checkpoint(checkpoint)["model"]
    moved = []
    for module in (finetune, with_change(finetune, HEAD_ALONE, tmp_path)):
        runtime = on_cpu(tmp_path / module.__name__)
        run = module.finetune(tables_of(task, corpus), module.start_of(checkpoint),
                              module.PRESETS["smoke"], 0, runtime)
        after = pretrain.load_checkpoint(run)["model"]
        changes = [not torch.equal(after[name], before[name]) for name in after if name in before]
        moved.append(sum(changes))
    assert moved[0] > 10 and moved[1] == 0


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
