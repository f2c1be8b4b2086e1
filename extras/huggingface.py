"""extras/huggingface.py - runs to and from Hugging Face: weights, tokenizer and configuration in the form of transformers.

Imports the six scripts; none of them imports this file. Neither command needs transformers: the formats are written out below.

    python -m extras.huggingface export runs/pretrain/RUN my-bert        # then AutoModelForMaskedLM.from_pretrained("my-bert")
    python -m extras.huggingface export runs/finetune/RUN my-classifier  # AutoModelForSequenceClassification, pipelines; pooling=cls only
    python -m extras.huggingface import my-bert NAME                     # and back: a pre-training run runs/pretrain/NAME
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from data import write_atomically
from finetune import load_classifier
from model import INIT_STD, BertConfig, Classifier, MaskedLM
from pretrain import (Run, choose_runtime, load_masked_lm, load_settings, read_json, save_tensors, tokenizer_of, weights_hash,
                      write_json)
from tokenizer import FIRST_PIECE, PAD, UNK, InputError, Parser, Tokenizer, run_script

# -------------------------------------------------------------------------------------------- names of the tensors
# BERT is their type "bert", a pre-norm model their "megatron-bert"; convolutions and other pooling than cls have no counterpart there.
TYPE_TABLE = "bert.embeddings.token_type_embeddings.weight"
TIED = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",  # a copy -> the tensor it repeats
        "cls.predictions.decoder.bias": "cls.predictions.bias"}
UNUSED = re.compile(r"bert\.embeddings\.position_ids|bert\.pooler\.dense\.\w+|cls\.seq_relationship\.\w+")


def hugging_face_names(model: MaskedLM | Classifier) -> dict[str, list[str]]:
    """Their name of each of a model's tensors; three, to be concatenated, of the fused projection."""
    norms = ("attention.ln", "ln") if model.config.norm == "pre" else ("attention.output.LayerNorm", "output.LayerNorm")
    names = {"bert.token": "bert.embeddings.word_embeddings", "bert.position": "bert.embeddings.position_embeddings",
             "bert.embedding_norm": "bert.embeddings.LayerNorm", "bert.final_norm": "bert.encoder.ln",
             "dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm", "": "cls.predictions",
             "pooler": "bert.pooler.dense", "output": "classifier"}
    inside = {"attention.qkv": "attention.self.{}", "attention.out": "attention.output.dense", "attention_norm": norms[0],
              "mlp_in": "intermediate.dense", "mlp_out": "output.dense", "mlp_norm": norms[1]}
    for i in range(model.config.layers):
        names |= {f"bert.layers.{i}.{ours}": f"bert.encoder.layer.{i}.{theirs}" for ours, theirs in inside.items()}
    split = ((name, *name.rpartition(".")[::2]) for name in model.state_dict())  # name, its module's, "weight" or "bias"
    return {name: [f"{names[module].format(one)}.{part}" for one in (("query", "key", "value") if "qkv" in module else [""])]
            for name, module, part in split}


def to_hugging_face(model: MaskedLM | Classifier, classes: Sequence[str] = ()) -> tuple[dict, dict[str, Tensor]]:
    """(config.json, tensors by their names). classes: a classifier's. Raises ValueError for what cannot be said there."""
    c, pre, classifier = model.config, model.config.norm == "pre", isinstance(model, Classifier)
    if what := ("a convolutional stem" if c.conv_kernels else f"{c.pooling} pooling" if classifier and c.pooling != "cls" else ""):
        raise ValueError(f"{what} has no counterpart in Hugging Face's BERT: only models without convolutions, and classifiers with "
                         "pooling=cls, can be exported")
    tensors = {TYPE_TABLE: torch.zeros(1, c.width)}  # for the one segment; what it adds is in our position table
    for name, theirs in hugging_face_names(model).items():
        tensors |= zip(theirs, model.state_dict()[name].cpu().chunk(len(theirs)))
    architecture = ("MegatronBert" if pre else "Bert") + ("ForSequenceClassification" if classifier else "ForMaskedLM")
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    return {"architectures": [architecture], "model_type": "megatron-bert" if pre else "bert", "dtype": "float32",
            "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": 4 * c.width, "hidden_act": "gelu", "hidden_dropout_prob": c.dropout,
            "attention_probs_dropout_prob": c.dropout, "max_position_embeddings": c.max_length, "type_vocab_size": 1,
            "initializer_range": INIT_STD, "layer_norm_eps": c.norm_eps, "pad_token_id": PAD, "tie_word_embeddings": True,
            **(labels if classifier else {})}, tensors


def from_hugging_face(folder: Path) -> tuple[BertConfig, dict[str, Tensor], list[str]]:
    """A folder of theirs -> (configuration, our weights, class names): those of a Classifier; without classes, of a
    MaskedLM; without the tensors of a head, of its `bert` alone. Raises ValueError, naming what does not fit."""
    try:
        settings, file = json.loads((folder / "config.json").read_text(encoding="utf-8")), folder / "model.safetensors"
        found = read_safetensors(file) if file.exists() else torch.load(folder / "pytorch_model.bin", "cpu", weights_only=True)
        config = config_from_hugging_face(settings)
        weights, classes = weights_from_hugging_face(config, found)
        labels = settings.get("id2label") or {}
        return config, weights, [str(labels.get(str(i), f"LABEL_{i}")) for i in range(classes)]
    except Exception as error:  # a damaged file raises one of a dozen kinds, a missing setting a KeyError
        what = " ".join(str(error).split()) if isinstance(error, ValueError | RuntimeError) else repr(error)
        raise ValueError(f"{folder}: cannot be imported: {what}") from None


def config_from_hugging_face(settings: dict) -> BertConfig:
    kind, width = settings["model_type"], settings["hidden_size"]
    only = {"model_type": kind if kind == "megatron-bert" else "bert", "intermediate_size": 4 * width, "hidden_act": "gelu",
            "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
            "tie_word_embeddings": True, "pad_token_id": PAD}
    if wrong := [f"{key} {settings[key]!r} (only {value!r})" for key, value in only.items() if settings.get(key, value) != value]:
        raise ValueError(f"config.json asks for what this BERT does not have: {', '.join(wrong)}")
    return BertConfig(
        vocab_size=settings["vocab_size"], layers=settings["num_hidden_layers"], width=width,
        heads=settings["num_attention_heads"], max_length=settings["max_position_embeddings"],
        dropout=settings.get("hidden_dropout_prob", 0.1),
        norm="post" if kind == "bert" else "pre", norm_eps=settings.get("layer_norm_eps", 1e-12))


def weights_from_hugging_face(config: BertConfig, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Their tensors -> (ours, number of classes); every one of theirs is used, or known to be of no use here."""
    found = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)): t for name, t in found.items()}  # names of 2018
    if "embeddings.word_embeddings.weight" in found:  # a bare BertModel
        found = {f"bert.{name}": t for name, t in found.items()}
    for copy, name in TIED.items():
        if copy in found and not torch.equal(found.setdefault(name, found[copy]), found.pop(copy)):
            raise ValueError(f"{copy} is not tied to {name}, as it is here")
    classes = len(found.get("classifier.weight", ()))
    with torch.device("meta"):
        model = Classifier(config, classes) if classes else MaskedLM(config)
    headless = not any(name.startswith(("cls.predictions.", "classifier.")) for name in found)
    names = {k: v for k, v in hugging_face_names(model).items() if not headless or k.startswith("bert.")}
    wanted = {TYPE_TABLE, *(name for theirs in names.values() for name in theirs)}
    missing, unknown = wanted - set(found), {name for name in set(found) - wanted if not UNUSED.fullmatch(name)}
    if missing or unknown:
        raise ValueError(f"missing tensors: {sorted(missing)[:9]}, unknown tensors: {sorted(unknown)[:9]}")
    found = {name: t if t.dtype == torch.float64 else t.float() for name, t in found.items()}
    weights = {ours: torch.cat([found[name] for name in theirs]) for ours, theirs in names.items()}
    weights["bert.position.weight"] += found[TYPE_TABLE][0]  # there is one segment, so its row is a constant
    model.load_state_dict(weights, strict=False, assign=True)  # for its check of the shapes
    return weights, classes


# ---------------------------------------------------------------------------------------------------- safetensors
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: the header's length (8 bytes), the header (JSON), the numbers (little-endian).

    Raises ValueError where these do not fit together. Source: https://github.com/huggingface/safetensors, "Format".
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        space, at, tensors = path.stat().st_size - 8 - length, 0, {}  # space: bytes of numbers
        if space < 0:
            raise ValueError(f"{path.name} is not a safetensors file, or cut short")
        header = json.loads(file.read(length))
        for start, end, name, kind, shape in sorted((*e["data_offsets"], name, e["dtype"], e["shape"])
                                                    for name, e in header.items() if name != "__metadata__"):
            size = math.prod(shape)
            if kind not in SAFETENSORS or min(shape, default=0) < 0 or not start == at <= end <= space \
                    or end - start != size * SAFETENSORS[kind].itemsize:
                raise ValueError(f"{path.name}: type {kind}, shape {shape} and offsets {start} to {end} of {name} do not fit")
            data, at = bytearray(file.read(end - start) or 8), end  # (a tensor without numbers still needs a buffer)
            tensors[name] = torch.frombuffer(data, dtype=SAFETENSORS[kind])[:size].view(shape)
    if at != space:
        raise ValueError(f"{path.name}: {space - at} bytes belong to no tensor")
    return tensors


def write_safetensors(tensors: dict[str, Tensor], file: IO[bytes]) -> None:
    """Write tensors into a file open for bytes, as read_safetensors reads them."""
    header: dict[str, dict]
    kinds, header, at = {dtype: kind for kind, dtype in SAFETENSORS.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [at, at := at + t.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for t in tensors.values():
        file.write(t.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())


# -------------------------------------------------------------------------------------------------- the tokenizer
def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value: int or bytes) of a protobuf message's fields; a .model is one, and `import google.protobuf` would be a dependency.

    Source: https://protobuf.dev/programming-guides/encoding/ and sentencepiece_model.proto (the numbers below are its).
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            yield number, message[at : at + size]
            at += size


def hugging_face_files(tokenizer: Tokenizer, max_length: int) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json, with which Hugging Face's AutoTokenizer gives the same ids.

    Where it cannot: it knows no marks around entities; it takes "[MASK]" and the other special tokens in a text for those tokens
    (its fill-mask needs that); it drops a combining mark or joiner after a capital or other character that the normalisation
    replaces, unless the two have a composed form; it composes marks that stand in an unusual order; and of segmentations with
    equal scores it may choose another. Raises InputError for a .model unlike ours.
    """
    fields = list(protobuf_fields(tokenizer.model))
    pieces = [dict(protobuf_fields(value)) for number, value in fields if number == 1]  # 1 piece, 2 score, 3 type (1: normal)
    trainer, rules = ({k: v for number, value in fields if number == n for k, v in protobuf_fields(value)} for n in (2, 3))
    # trainer 3: 1 is unigram; rules 2: the charsmap, 3: a blank before the text, 4: single blanks, 5: blanks become U+2581
    plain = trainer.get(3, 1) == 1 and all(p.get(3, 1) == 1 for p in pieces[FIRST_PIECE:])
    if not plain or not all(rules.get(n, 1) for n in (3, 4, 5)):
        raise InputError("this .model is not a plain unigram model as tokenizer.py --train makes it: it cannot be exported")
    charsmap = [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules[2]).decode()}] if rules.get(2) else []
    specials = [piece[1].decode() for piece in pieces[:FIRST_PIECE]]
    cls, sep = ({"SpecialToken": {"id": special, "type_id": 0}} for special in ("[CLS]", "[SEP]"))
    text, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    blanks = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    contents = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": special, "special": True, "normalized": False, "single_word": False,
                          "lstrip": False, "rstrip": False} for i, special in enumerate(specials)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, *charsmap,  # its Precompiled takes only the first letter of a short, decomposed one: compose before
            {"type": "Replace", "pattern": {"Regex": " +$"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": blanks, "decoder": blanks,
        "post_processor": {"type": "TemplateProcessing", "single": [cls, text, sep], "pair": [cls, text, sep, second, sep],
                           "special_tokens": {s: {"id": s, "ids": [i], "tokens": [s]} for i, s in enumerate(specials)}},
        "model": {"type": "Unigram", "unk_id": UNK, "byte_fallback": False,
                  "vocab": [[piece[1].decode(), struct.unpack("<f", piece[2])[0]] for piece in pieces]}}
    names = ("pad", "unk", "cls", "sep", "mask")
    return {"tokenizer.json": contents, "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], **{f"{name}_token": s for name, s in zip(names, specials)}}}


# ---------------------------------------------------------------------------------------------------------- folders
def export_model(model: MaskedLM | Classifier, tokenizer: Tokenizer, folder: Path, classes: Sequence[str] = ()) -> None:
    """Write a folder that Hugging Face's AutoModelFor..., AutoTokenizer and pipelines read, and `import` too.

    It gets its name when it is complete. Raises InputError if it exists, or the model has no counterpart there.
    """
    try:
        config, tensors = to_hugging_face(model, classes)
    except ValueError as error:
        raise InputError(f"export: {error}") from None
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"export {folder}: is there already and not empty; name a new folder")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        for name, record in {"config.json": config, **hugging_face_files(tokenizer, model.config.max_length)}.items():
            write_json(part / name, record)
        with write_atomically(part / "tokenizer.model") as file:
            file.write(tokenizer.model)
        with write_atomically(part / "model.safetensors") as file:
            write_safetensors(tensors, file)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise InputError(f"export {folder}: {error.strerror}; name a folder that can be written") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: {config['architectures'][0]} with its tokenizer, for transformers' from_pretrained")


def export_run(run: Path, folder: Path) -> None:
    """Export the model of a pre-training run or of a finished fine-tuning run. Raises InputError."""
    kind = read_json(run / "config.json", "kind")["kind"]
    if kind == "pretrain":
        model, tokenizer = load_masked_lm(run)
        export_model(model, tokenizer, folder)
    elif kind == "finetune":
        export_model(load_classifier(run), tokenizer_of(run, "finetune"), folder, load_settings(run, "finetune")["classes"])
    else:
        raise InputError(f"{run}: neither a pre-training nor a fine-tuning run; name a folder under runs/pretrain or runs/finetune")


def import_checkpoint(folder: Path, name: str, tokenizer_file: Path | None, runs_dir: Path) -> Path:
    """Make a Hugging Face folder of type bert or megatron-bert a pre-training run, under runs_dir and of this name.

    tokenizer_file: to be used instead of the tokenizer.model which our export leaves in the folder. Raises InputError; so it
    does if there is a run of that name with other contents.
    """
    if not name.strip(".") or Path(name).name != name:
        raise InputError(f"{name!r} is not the name of a run folder; name one without slashes, such as my-bert")
    own = folder / "tokenizer.model"
    if not (tokenizer_file or own.exists()) and folder.is_dir():
        raise InputError(f"{folder}: has no tokenizer.model, so its tokenizer (a WordPiece vocab.txt?) differs from ours, and its "
                         "embedding rows belong to other tokens; --tokenizer FILE.model goes on in spite of that")
    try:
        config, weights, _ = from_hugging_face(folder)
    except ValueError as error:
        raise InputError(str(error)) from None
    tokenizer = Tokenizer.load(tokenizer_file or own)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: has {config.vocab_size} embedding rows, the tokenizer {tokenizer.vocab_size} pieces; "
                         "give a smaller one with --tokenizer")
    if not own.exists() or own.read_bytes() != tokenizer.model:
        print(f"note: {folder} was trained with another tokenizer than {tokenizer_file}: its embedding rows belong to other "
              "tokens, so only its layers bring knowledge along", flush=True)
    weights = {name: t for name, t in weights.items() if not name.startswith(("pooler.", "output."))}  # of a classifier
    settings = {"kind": "pretrain", "model": f"hf-{folder.resolve().name}", "config": dataclasses.asdict(config), "seed": 0,
                "tokenizer": tokenizer.hash, "weights": weights_hash(weights)}
    run_folder = runs_dir / "pretrain" / name
    with Run(run_folder, settings, tokenizer, choose_runtime("cpu")):
        if not (run_folder / "last.pt").exists():
            save_tensors(run_folder / "last.pt", {"step": 0, "model": weights, "optimizers": []})
    return run_folder


# ------------------------------------------------------------------------------------------------- command line
def main() -> None:
    parser = Parser(__doc__, prog="python -m extras.huggingface")
    commands = parser.add_subparsers(dest="action", required=True, metavar="export|import", parser_class=Parser)
    export_parser = commands.add_parser("export", help="write a run as a Hugging Face folder")
    export_parser.add_argument("run", type=Path, metavar="RUN", help="a folder under runs/pretrain or runs/finetune")
    export_parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write; must not exist, or be empty")
    import_parser = commands.add_parser("import", help="make a Hugging Face folder a pre-training run")
    import_parser.add_argument("folder", type=Path, metavar="DIR", help="a Hugging Face folder of type bert or megatron-bert")
    import_parser.add_argument("name", metavar="NAME", help="of the run folder to make, under runs/pretrain")
    import_parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a .model file (default: the tokenizer.model in DIR)")
    import_parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="FOLDER", help="(default %(default)s)")
    args = parser.parse_args()
    if args.action == "export":
        export_run(args.run, args.folder)
    else:
        run_folder = import_checkpoint(args.folder, args.name, args.tokenizer, args.runs_dir)
        print(f"{run_folder}: imported\nnext: python finetune.py --checkpoint {run_folder} --data DATA_FOLDER")


if __name__ == "__main__":
    run_script(main)
