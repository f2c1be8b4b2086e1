"""Provably BERT: the same function, gradients and token ids as Hugging Face's, both ways."""

from __future__ import annotations

import dataclasses
import errno
import glob
import gzip
import io
import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("google.protobuf")

import finetune
import pretrain
from extras import huggingface
from extras.huggingface import export_model, from_hugging_face, import_checkpoint, their_names
from extras.huggingface import TYPE_TABLE, to_fast_tokenizer, to_hugging_face
from material import articles, on_cpu, prepared_folder, write_task_file
from model import Attention, BertConfig, Classifier, ConvStem, MaskedLM
from test_golden import GOLDEN, SHOWN, golden_batch, golden_model
from tokenizer import SEP, SPECIAL_OPTIONS, InputError, Tokenizer, run_script, train_tokenizer

SHAPES = [  # layers, width, heads, vocabulary, positions, lengths of the texts
    (1, 64, 1, 97, 16, (16, 9, 3)),
    (2, 64, 4, 301, 24, (17, 24, 5, 11)),
    (6, 192, 3, 50, 40, (20, 1, 40, 28)),
    (1, 768, 12, 1500, 32, (8, 21, 13)),
]
CLASSES = ["sport", "politics", "arts and letters"]
DTYPES = [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-10)]  # and the tolerances
ATTENTION = {torch.float32: ("sdpa", True), torch.float64: ("eager", False)}  # theirs, ours
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
by_norm = pytest.mark.parametrize("norm", ["post", "pre"])
by_head = pytest.mark.parametrize("head", ["mlm", "classifier"])


# ---- the same function ---------------------------------------------------------------------------


def shake(model: Any, seed: int) -> Any:
    """Random numbers in every parameter: biases of 0 and norms of 1 would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * p.size(-1) ** -0.5
        else:
            p.data = 0.3 * noise + float(name.endswith("weight"))
    model.tie_weights() if hasattr(model, "tie_weights") else None
    return model.eval()


def make_ours(config: BertConfig, head: str) -> Any:
    return MaskedLM(config) if head == "mlm" else Classifier(config, len(CLASSES))


def make_theirs(ours: MaskedLM | Classifier, attention: str = "eager") -> Any:
    theirs = to_hugging_face(ours, CLASSES)
    if ours.config.norm == "post":  # MegatronBert has only one
        theirs.set_attn_implementation(attention)
    return theirs


def ragged_batch(vocab_size: int, lengths: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (len(lengths), max(lengths))
    input_ids = torch.randint(1, vocab_size, shape, generator=generator)
    return input_ids * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def layer_outputs(layers: nn.ModuleList) -> list[Tensor]:
    """A list that the next forward pass fills with the output of every layer."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        layer.register_forward_hook(hook)
    return outputs


def assert_same_function(ours: Any, theirs: Any, input_ids: Tensor, tolerance: float,
                         of_gradients: float) -> None:
    """Hidden states after every layer, logits, loss, and the gradient of every parameter."""

    def same(a: Tensor, b: Tensor, within: float = tolerance) -> None:
        torch.testing.assert_close(a, b, atol=within, rtol=0)

    real = input_ids != 0
    mask = real.long()
    generator = torch.Generator().manual_seed(1)
    our_layers = layer_outputs(ours.bert.layers)
    their_layers = layer_outputs(theirs.bert.encoder.layer)
    hidden = theirs.bert(input_ids, attention_mask=mask).last_hidden_state
    same(ours.bert(input_ids)[real], hidden[real])
    assert len(our_layers) == len(their_layers) == ours.config.layers
    for a, b in zip(our_layers, their_layers):
        same(a[real], b[real])
    if isinstance(ours, MaskedLM):
        everywhere = real.flatten().nonzero().squeeze(1)
        same(ours(input_ids, everywhere), theirs(input_ids, attention_mask=mask).logits[real])
        order = torch.randperm(len(everywhere), generator=generator)
        positions = everywhere[order[: max(2, len(everywhere) // 4)]]
        labels = torch.randint(ours.config.vocab_size, positions.shape, generator=generator)
        their_labels = torch.full_like(input_ids, -100).flatten()
        their_labels = their_labels.index_put((positions,), labels).view_as(input_ids)
        output = theirs(input_ids, attention_mask=mask, labels=their_labels)
        logits = ours(input_ids, positions)
        same(logits, output.logits.flatten(0, 1)[positions])
    else:
        labels = torch.randint(len(CLASSES), (len(input_ids),), generator=generator)
        output = theirs(input_ids, attention_mask=mask, labels=labels)
        logits = ours(input_ids)
        same(logits, output.logits)
    loss = F.cross_entropy(logits, labels)
    same(loss, output.loss)
    loss.backward()
    output.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    names = their_names(ours)
    for name, p in ours.named_parameters():
        assert p.grad.abs().max() > 0, name
        same(p.grad, torch.cat([gradients[part] for part in names[name]]), of_gradients)
    same(gradients[TYPE_TABLE][0], ours.bert.position.weight.grad.sum(0), of_gradients)


@by_head
@by_norm
@by_shape
def test_our_weights_there(shape: tuple, norm: str, head: str,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    layers, width, heads, vocab_size, max_length, lengths = shape
    config = BertConfig(vocab_size, layers, width, heads, max_length, norm=norm)
    for dtype, tolerance, of_gradients in DTYPES:
        attention, fused = ATTENTION[dtype]
        monkeypatch.setattr(Attention, "fused", fused)
        ours = shake(make_ours(config, head), seed=layers + width).to(dtype)
        theirs = make_theirs(ours, attention)
        input_ids = ragged_batch(vocab_size, lengths)
        assert_same_function(ours, theirs, input_ids, tolerance, of_gradients)


@by_norm
@by_shape
def test_their_weights_here(shape: tuple, norm: str, tmp_path: Path) -> None:
    """Random weights of theirs, token-type table included, saved by them and imported by us."""
    layers, width, heads, vocab_size, max_length, lengths = shape
    kind = huggingface.THEIR_CLASSES[norm, MaskedLM]
    theirs = shake(kind(kind.config_class(
        vocab_size=vocab_size, num_hidden_layers=layers, hidden_size=width,
        num_attention_heads=heads, intermediate_size=4 * width,
        max_position_embeddings=max_length)), seed=width)
    assert theirs.bert.embeddings.token_type_embeddings.weight[0].abs().max() > 0.1
    theirs.save_pretrained(tmp_path)
    config, weights = from_hugging_face(tmp_path)
    ours = make_ours(config, "mlm").eval()
    ours.load_state_dict(weights)
    assert_same_function(ours, theirs, ragged_batch(vocab_size, lengths), 1e-5, 1e-4)


@pytest.mark.parametrize("architecture, head", list(GOLDEN))
def test_golden_numbers(architecture: str, head: str) -> None:
    """The literals of test_golden.py, computed by Hugging Face's models."""
    ours = golden_model(architecture, head)
    input_ids, positions, labels = golden_batch(architecture, head)
    if architecture == "conv":
        logits = conv_reference(ours, input_ids, positions if head == "mlm" else None)
    else:
        logits = make_theirs(ours)(input_ids, attention_mask=(input_ids != 0).long()).logits
        logits = logits.flatten(0, 1)[positions] if head == "mlm" else logits
    shown, loss = GOLDEN[architecture, head]
    expected = torch.tensor(shown, dtype=torch.float64)
    found = logits[:, SHOWN] if head == "mlm" else logits
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(loss, abs=1e-9)


# ---- the convolutional stem ----------------------------------------------------------------------


def authors_stem(ours: ConvStem, channels: int, kernels: tuple[int, ...]) -> nn.Sequential:
    """The paper's definition, independent of model.py, with the weights of `ours`."""
    parts: list[nn.Module] = []
    for before, kernel in zip([1] + [channels] * len(kernels), kernels):
        parts.append(nn.Conv2d(before, channels, kernel, padding="same"))
        parts += [nn.BatchNorm2d(channels), nn.GELU()]
    parts += [nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), nn.GELU()]
    stem = nn.Sequential(*parts).to(ours.convs[0].weight.dtype)
    for theirs, conv in zip(stem[::3], ours.convs):
        theirs.load_state_dict(conv.state_dict())
    for theirs, norm in zip(stem[1::3], ours.norms):
        theirs.load_state_dict(norm.state_dict())
    return stem


def conv_reference(ours: Any, input_ids: Tensor, positions: Tensor | None = None,
                   training: bool = False) -> Tensor:
    """Hugging Face's embeddings, the authors' stem, Hugging Face's layers and head: logits."""
    config = ours.config
    plain = dataclasses.replace(config, conv_channels=0, conv_kernels=())
    plain_model = make_ours(plain, "classifier" if positions is None else "mlm")
    weights = {name: t for name, t in ours.state_dict().items() if ".stem." not in name}
    plain_model.to(next(ours.parameters()).dtype).load_state_dict(weights)
    theirs = make_theirs(plain_model)
    stem = authors_stem(ours.bert.stem, config.conv_channels, config.conv_kernels).train(training)
    x = stem(theirs.bert.embeddings(input_ids)[:, None])[:, 0]
    for layer in theirs.bert.encoder.layer:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    if positions is None:
        return theirs.classifier(theirs.bert.pooler(x))
    return theirs.cls(x).flatten(0, 1)[positions]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("channels, kernels", [(6, (3, 3)), (4, (3, 3, 3)), (6, (16, 3))])
def test_stem_is_the_authors(channels: int, kernels: tuple[int, ...]) -> None:
    """At full length, where padding plays no part: outputs, statistics, gradients, evaluation."""

    def same(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)

    torch.manual_seed(0)
    config = BertConfig(width=64, heads=1, conv_channels=channels, conv_kernels=kernels)
    ours = shake(ConvStem(config), 3).double()
    reference = authors_stem(ours, channels, kernels)
    x, real = torch.randn(3, 20, 64, dtype=torch.float64), torch.ones(3, 20, dtype=torch.bool)
    for _ in range(2):
        a, b = ours.train()(x, real), reference.train()(x[:, None])[:, 0]
        same(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
    for i, norm in enumerate(ours.norms):
        theirs = reference[3 * i + 1]
        same(norm.running_mean, theirs.running_mean)
        same(norm.running_var, theirs.running_var)
        assert norm.num_batches_tracked == theirs.num_batches_tracked == 2
        same(ours.convs[i].weight.grad, reference[3 * i].weight.grad)
        same(norm.weight.grad, theirs.weight.grad)
    same(ours.eval()(x, real), reference.eval()(x[:, None])[:, 0])


def test_a_conv_model_in_training_is_a_stem_before_layers() -> None:
    config = BertConfig(60, 1, 64, 2, 16, dropout=0.0, conv_channels=4, conv_kernels=(3, 3))
    input_ids, positions = ragged_batch(60, (16, 16, 16)), torch.tensor([1, 17, 40])
    for head, (dtype, tolerance, _) in itertools.product(("mlm", "classifier"), DTYPES):
        ours = shake(make_ours(config, head), 5).to(dtype)
        ours.bert.stem.norms[0].running_mean.add_(0.2)
        ours.bert.stem.norms[0].running_var.mul_(1.3)
        arguments = (input_ids, positions) if head == "mlm" else (input_ids,)
        expected = conv_reference(ours, *arguments, training=True)
        found = ours.train()(*arguments)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# ---- import --------------------------------------------------------------------------------------


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def write_folder(folder: Path, settings: dict, tensors: dict[str, Tensor],
                 file: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    copies = {name: t.clone() if isinstance(t, Tensor) else t for name, t in tensors.items()}
    if file == "model.safetensors":
        safetensors_torch.save_file(copies, folder / file, {"format": "pt"})
    else:
        torch.save(copies, folder / file)
    return folder


@pytest.fixture
def exported() -> tuple[MaskedLM, dict, dict[str, Tensor]]:
    """A model, its config.json and its tensors, as we export them."""
    ours = shake(MaskedLM(BertConfig(40, 2, 64, 1, 16)), 1)
    theirs = to_hugging_face(ours)
    tensors = {name: t for name, t in theirs.state_dict().items() if ".decoder." not in name}
    return ours, theirs.config.to_dict() | {"architectures": ["BertForMaskedLM"]}, tensors


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_import_takes_what_is_harmless(file: str, exported: tuple, tmp_path: Path) -> None:
    """Tied copies, next-sentence heads, poolers, buffers, names of 2018, a bare model, fp16."""
    ours, settings, tensors = exported
    more = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.seq_relationship.weight": torch.randn(2, 64),
        "cls.seq_relationship.bias": torch.randn(2),
        "bert.pooler.dense.weight": torch.randn(64, 64),
        "bert.pooler.dense.bias": torch.randn(64),
        "bert.embeddings.position_ids": torch.arange(16)[None]}
    old = {}
    for name, t in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = t
    for number, given in enumerate([tensors, {**tensors, **more}, old]):
        folder = write_folder(tmp_path / str(number), settings, given, file)
        config, weights = from_hugging_face(folder)
        assert config == ours.config
        assert_same_tensors(weights, ours.state_dict())
    bare = {name.removeprefix("bert."): t for name, t in tensors.items() if name[:5] == "bert."}
    _, weights = from_hugging_face(write_folder(tmp_path / "bare", settings, bare, file))
    expected = {name: t for name, t in ours.state_dict().items() if name.startswith("bert.")}
    assert_same_tensors(weights, expected)
    half = {name: t.half() for name, t in tensors.items()}
    _, weights = from_hugging_face(write_folder(tmp_path / "half", settings, half, file))
    assert_same_tensors(weights, {name: t.half().float() for name, t in ours.state_dict().items()})


NOT_OURS = [  # changed setting, and what the error names
    ({"model_type": "roberta"}, "roberta"),
    ({"hidden_act": "gelu_new"}, "gelu_new"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"is_decoder": True}, "is_decoder"),
    ({"add_cross_attention": True}, "cross_attention"),
    ({"intermediate_size": 100}, "intermediate_size"),
    ({"pad_token_id": 1}, "pad_token_id"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"num_attention_heads": 5}, "heads"),
    ({"vocab_size": 41}, "word_embeddings"),
    ({"num_hidden_layers": 1}, "bert.encoder.layer.1"),
    ({"model_type": "megatron-bert"}, "bert.encoder.ln"),
]
KEY = "bert.encoder.layer.1.attention.self.key.bias"
TRANSFORM = "cls.predictions.transform.dense.weight"
NEW = "bert.encoder.layer.2.output.dense.bias"
DECODER = "cls.predictions.decoder.weight"


@pytest.mark.parametrize("change, named", NOT_OURS, ids=lambda value: str(value)[:40])
def test_import_refuses_other_architectures(change: dict, named: str, exported: tuple,
                                            tmp_path: Path) -> None:
    _, settings, tensors = exported
    with pytest.raises(InputError, match=f"cannot be imported.*{named}") as caught:
        from_hugging_face(write_folder(tmp_path, settings | change, tensors))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("without, extra, named", [
    (KEY, {}, KEY), (TRANSFORM, {}, TRANSFORM), (TYPE_TABLE, {}, TYPE_TABLE),
    ("", {NEW: torch.zeros(64)}, NEW), ("", {DECODER: torch.zeros(40, 64)}, DECODER)])
def test_import_names_missing_unknown_and_untied_tensors(without: str, extra: dict, named: str,
                                                         exported: tuple, tmp_path: Path) -> None:
    _, settings, tensors = exported
    given = {name: t for name, t in tensors.items() if name != without}
    with pytest.raises(InputError, match=f"cannot be imported.*{named}"):
        from_hugging_face(write_folder(tmp_path, settings, given | extra))


@pytest.mark.parametrize("content", [b"", b"abc", b"\2" + bytes(7) + b"[]"])
def test_import_names_a_damaged_folder(content: bytes, exported: tuple, tmp_path: Path) -> None:
    write_folder(tmp_path, exported[1], exported[2])
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be imported"):
        from_hugging_face(tmp_path)


def test_import_executes_nothing(exported: tuple, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a pickle nor Python code beside the config."""
    class Harm:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "harm",)

    harm: dict = {"bert.embeddings.word_embeddings.weight": Harm()}
    write_folder(tmp_path, exported[1], harm, "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be imported"):
        from_hugging_face(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "harm.Config"}}
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'harm')!r}).touch()\n"
    (tmp_path / "harm.py").write_text(code, encoding="utf-8")
    write_folder(tmp_path, settings, exported[2])
    with pytest.raises(InputError, match="cannot be imported"):
        from_hugging_face(tmp_path)
    assert not (tmp_path / "harm").exists()


# ---- export, pipelines ---------------------------------------------------------------------------

TRICKY = [
    "", " ", "a", "Café CAFÉ Ångström naïve", "ﬁne oﬃce ﬂow", "ＦＵＬＬ　ｗｉｄｔｈ １２",
    "decomposed: Cafe\u0301 CAFE\u0301 A\u030angstro\u0308m A\u0302\u0301",
    "x\u0301 q\u0323 \u0301start", "😀 👩\u200d💻 🇫🇷 ☺\ufe0f 👍🏽", "  several   blanks  ",
    "\ttabs\tand\n\nnew\r\nlines\n", "漢字かな交じり文。 한국어 \u1112\u1161\u11ab",
    "zero\u200bwidth \u00a0no\u00a0break\u2009thin \ufeffmark", "▁lite▁ral ▁",
    "½ ² ª ™ … № ㎏ ﷺ", "İstanbul Straße ẞ ΣΑΣ ǅ", "नमस्ते ทำไม عَلَيْكُم",
    "\u0000nul\u0001\u007f", "mask] [mask] [ MASK ]", "the river of France . , ;", "river" * 40]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [a["text"] for a in articles(200)] + TRICKY * 3
    return Tokenizer(train_tokenizer(texts, 400))


def write_run(folder: Path, model: MaskedLM | Classifier, tokenizer: Tokenizer) -> Path:
    kind = "pretrain" if isinstance(model, MaskedLM) else "finetune"
    settings = {"kind": kind, "model": "bert-1", "config": dataclasses.asdict(model.config),
                "seed": 0, "classes": CLASSES, "tokenizer": tokenizer.hash}
    with pretrain.Run(folder, settings, tokenizer, on_cpu()) as run:
        run.save(pretrain.TrainingState(step=1), model, [])
    pretrain.write_json(folder / "results.json", {"accuracy": 0.5, "train_loss": 1.0})
    return folder


def call(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


@by_norm
def test_export(norm: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                caplog: pytest.LogCaptureFixture) -> None:
    """Models, tokenizer and pipelines of an exported folder give what ours give, silently."""
    config = BertConfig(tokenizer.vocab_size, 2, 64, 2, 48, norm=norm)
    mlm, classifier = shake(MaskedLM(config), 1), shake(Classifier(config, 3), 2)
    runs = [write_run(tmp_path / "mlm", mlm, tokenizer),
            write_run(tmp_path / "classifier", classifier, tokenizer)]
    folders = [tmp_path / "hf-mlm", tmp_path / "hf-classifier"]
    folders[1].mkdir()  # an empty folder will do
    for run, folder in zip(runs, folders):
        call(monkeypatch, huggingface, "export", run, folder)
    assert sorted(tmp_path.iterdir()) == sorted([*runs, *folders])  # nothing half-written
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    masked, report = transformers.AutoModelForMaskedLM.from_pretrained(
        folders[0], output_loading_info=True)
    assert not any(report.values())
    auto = transformers.AutoModelForSequenceClassification
    classified, report = auto.from_pretrained(folders[1], output_loading_info=True)
    assert not any(report.values())
    fast = transformers.AutoTokenizer.from_pretrained(folders[0])
    assert not caplog.records
    assert classified.config.id2label == dict(enumerate(CLASSES))
    assert classified.config.label2id["sport"] == 0

    texts = ["The river of France crosses the city.", "Café", "a painter " * 40]
    batch = fast(texts, padding=True, truncation=True, return_tensors="pt")
    input_ids = batch["input_ids"]
    expected = [ids.tolist() for ids in tokenizer.encode(texts)]
    expected[2][47:] = [SEP]  # cut off in the same place
    assert [row[row != 0].tolist() for row in input_ids] == expected
    assert input_ids.shape == (3, 48)
    real = input_ids != 0
    assert torch.equal(real.long(), batch["attention_mask"])
    with torch.no_grad():
        logits = mlm(input_ids, real.flatten().nonzero().squeeze(1))
        theirs = masked(input_ids, attention_mask=batch["attention_mask"]).logits[real]
        torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=0)

    fill = transformers.pipeline("fill-mask", model=str(folders[0]), top_k=3)
    for text in ("The [MASK] of France crosses the city.", "It is a [MASK]."):
        answers = [(tokenizer.pieces.id_to_piece(answer["token"]), answer["score"])
                   for answer in fill(text)]
        expected_answers = pretrain.fill_mask(*pretrain.load_masked_lm(runs[0]), text, 3)[0]
        for (piece, p), (our_piece, our_p) in zip(answers, expected_answers, strict=True):
            assert piece == our_piece and p == pytest.approx(our_p, abs=1e-5)
    classify = transformers.pipeline("text-classification", model=str(folders[1]), top_k=None)
    predictor = finetune.Predictor([runs[1]], pretrain.choose_runtime("cpu", "fp32"))
    for scores, text in zip(classify(texts[:2]), texts):
        found_scores = {score["label"]: score["score"] for score in scores}
        assert found_scores == pytest.approx(predictor(text)["probabilities"], abs=1e-5)

    again, weights = from_hugging_face(folders[0])  # and back: every bit
    assert again == config
    assert_same_tensors(weights, mlm.state_dict())
    _, weights = from_hugging_face(folders[1])  # of a classifier, its bert
    bert = {name: t for name, t in classifier.state_dict().items() if name.startswith("bert.")}
    assert_same_tensors(weights, bert)


@pytest.mark.parametrize("settings, head, what", [
    ({"conv_channels": 2, "conv_kernels": (3, 3)}, "mlm", "convolutional stem"),
    ({"pooling": "mean"}, "classifier", "mean pooling"),
    ({}, "mlm", "is there already")])
def test_export_refuses(settings: dict, head: str, what: str, tokenizer: Tokenizer, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One line and exit status 2; nothing is written."""
    config = BertConfig(tokenizer.vocab_size, 1, 64, 1, 16, **settings)
    run = write_run(tmp_path / "run", make_ours(config, head), tokenizer)
    target = tmp_path / "run" if what == "is there already" else tmp_path / "there"
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["x.py", "export", str(run), str(target)])
    with pytest.raises(SystemExit) as caught:
        run_script(huggingface.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and what in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_export_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(InputError, match="Read-only"):
        config = BertConfig(tokenizer.vocab_size, 1, 64, 1, 16)
        export_model(MaskedLM(config), tokenizer, tmp_path / "there")
    assert not list(tmp_path.iterdir())


def test_export_refuses_other_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "data"}', encoding="utf-8")
    with pytest.raises(InputError, match="neither a pre-training nor a fine-tuning run"):
        huggingface.export_run(tmp_path, tmp_path / "there")
    with pytest.raises(InputError, match="neither a pre-training nor a fine-tuning run"):
        huggingface.export_run(tmp_path / "nowhere", tmp_path / "there")
    run = write_run(tmp_path / "run", MaskedLM(BertConfig(tokenizer.vocab_size, 1, 64, 1, 16)),
                    tokenizer)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    pretrain.write_json(run / "config.json", settings | {"recipe": {}})
    (run / "results.json").unlink()
    with pytest.raises(InputError, match="pre-training has not ended"):
        huggingface.export_run(run, tmp_path / "there")


def test_finetune_from_hugging_face(tokenizer: Tokenizer, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    """Our own export and a foreign folder, which needs --tokenizer, can be fine-tuned."""
    foreign, runs_dir, model_file = (tmp_path / name for name in ("foreign", "runs", "my.model"))
    ours = shake(MaskedLM(BertConfig(tokenizer.vocab_size + 3, 1, 64, 1, 32)), 1)
    ours.bias.data[-3:] = 100.0  # of embeddings for which the tokenizer has no piece
    export_model(ours, tokenizer, tmp_path / "export")
    transformers.BertModel(to_hugging_face(ours).config).save_pretrained(foreign)
    model_file.write_bytes(tokenizer.model)

    def bring(folder: Path, name: str, *more: object) -> str:
        capsys.readouterr()
        call(monkeypatch, huggingface, "import", folder, name, "--runs-dir", runs_dir, *more)
        return capsys.readouterr().out

    with pytest.raises(InputError, match="tokenizer.*differs.*--tokenizer"):
        bring(foreign, "other")
    with pytest.raises(InputError, match="cannot be imported: it has no config.json"):
        bring(tmp_path / "nowhere", "other")
    for name in ("", "..", "a/b"):
        with pytest.raises(InputError, match="name of a run folder"):
            bring(tmp_path / "export", name)
    assert not runs_dir.exists()
    assert "another tokenizer" in bring(foreign, "other", "--tokenizer", model_file)
    imported = [runs_dir / "pretrain" / name for name in ("own", "other")]
    for _ in range(2):  # the same contents once more are the same run
        out = bring(tmp_path / "export", "own")
        assert "another tokenizer" not in out
        assert f"next: python finetune.py --checkpoint {imported[0]} --data" in out
    with pytest.raises(InputError, match="made with other settings.*weights"):
        bring(foreign, "own", "--tokenizer", model_file)

    model, again = pretrain.load_masked_lm(imported[0])
    assert again.hash == tokenizer.hash
    assert_same_tensors(model.state_dict(), ours.state_dict())
    guesses = pretrain.fill_mask(*pretrain.load_masked_lm(imported[0]), "the [MASK] of france")
    assert len(guesses[0]) == 5
    with pytest.raises(InputError, match="head"):
        pretrain.load_masked_lm(imported[1])
    labels = [write_task_file(tmp_path / "train.csv", 12)]
    data = prepared_folder(tmp_path / "data/own", labels=labels, tokenizer=model_file)
    for checkpoint in imported:  # imports have no seed: each is a start of its own
        call(monkeypatch, finetune, "--checkpoint", checkpoint, "--preset", "smoke", "--device",
             "cpu", "--dtype", "fp32", "--runs-dir", runs_dir, "--no-scratch", "--data", data)
        pattern = f"finetune/*-{checkpoint.name}-*/results.json"
        assert len(list(runs_dir.glob(pattern))) == 1

    small = MaskedLM(BertConfig(50, 1, 64, 1, 32))  # fewer embeddings than the tokenizer has pieces
    to_hugging_face(small).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="50 embeddings"):
        import_checkpoint(tmp_path / "small", "small", model_file, runs_dir)


# ---- the tokenizer -------------------------------------------------------------------------------


def test_same_ids_on_tricky_texts(tokenizer: Tokenizer) -> None:
    fast = to_fast_tokenizer(tokenizer, 16)
    for text, ids in zip(TRICKY, tokenizer.encode(TRICKY)):
        found = fast(text)["input_ids"]
        if found != ids.tolist():  # two ways to cut the text have the same score
            scores = [sorted(map(tokenizer.pieces.get_score, row)) for row in (found, ids.tolist())]
            assert scores[0] == scores[1] and tokenizer.decode(found) == tokenizer.decode(ids), text
    ids = fast("the river of france")["input_ids"]
    assert fast.decode(ids, skip_special_tokens=True) == "the river of france"
    specials = [fast.pad_token_id, fast.unk_token_id, fast.cls_token_id, fast.sep_token_id]
    assert [*specials, fast.mask_token_id] == [0, 1, 2, 3, 4]


def test_what_cannot_be_the_same(tokenizer: Tokenizer) -> None:
    """The documented differences: special tokens in a text, marks that Precompiled drops."""
    fast = to_fast_tokenizer(tokenizer, 16)
    assert 4 not in tokenizer.encode(["the [MASK] of"])[0]
    before, after = (ids[1:-1].tolist() for ids in tokenizer.encode(["the ", " of"]))
    assert fast("the [MASK] of")["input_ids"] == [2, *before, 4, *after, 3]
    plain, marked = tokenizer.encode(["z", "Z\u0303"])
    assert fast("Z\u0303")["input_ids"] == plain.tolist() != marked.tolist()


@pytest.mark.parametrize("change", [
    {"model_type": "bpe"}, {"user_defined_symbols": "river"}, {"remove_extra_whitespaces": False}])
def test_other_sentencepiece_models_are_refused(change: dict) -> None:
    """tokenizer.json would not say what they do."""
    model = io.BytesIO()
    texts = (a["text"] for a in articles(200))
    settings = {"model_type": "unigram", **SPECIAL_OPTIONS, **change}
    spm.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, vocab_size=150,
                                   minloglevel=2, **settings)
    with pytest.raises(InputError, match="cannot be exported"):
        to_fast_tokenizer(Tokenizer(model.getvalue()), 128)


def test_same_ids_on_real_openings(raw_data: Path) -> None:
    """2,000 article openings: at least 1,995 with identical ids, and every difference a tie."""
    texts: list[str] = []
    for name in sorted(glob.glob(str(raw_data / "wikipedia" / "articles-*.jsonl.gz"))):
        with gzip.open(name, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in itertools.islice(file, 240)]
    assert len(texts) >= 2_400
    tokenizer = Tokenizer(train_tokenizer(texts[:400], 2_000))
    openings = texts[400:2_400]
    fast = to_fast_tokenizer(tokenizer, 10**9)
    score = [tokenizer.pieces.get_score(i) for i in range(tokenizer.vocab_size)]
    different = 0
    for ours, theirs in zip(tokenizer.encode(openings), fast(openings)["input_ids"]):
        if ours.tolist() != theirs:
            different += 1
            assert tokenizer.decode(ours) == tokenizer.decode(theirs)
            totals = [sum(score[i] for i in row) for row in (ours, theirs)]
            assert totals[0] == pytest.approx(totals[1], abs=1e-3)
    assert different <= 5
