"""extras/huggingface.py - runs to and from Hugging Face's transformers.

It imports the six scripts; none of them imports it.

    pip install -r extras/requirements.txt
    python -m extras.huggingface export runs/pretrain/RUN my-bert
    python -m extras.huggingface export runs/finetune/RUN my-classifier
    python -m extras.huggingface import my-bert NAME                        makes runs/pretrain/NAME

AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer and the pipelines read the
exported folder. Our BERT is their type "bert"; with LayerNorm before the blocks, "megatron-bert".
A classifier can be exported if it was fine-tuned with --set pooling=cls. Their pipeline does not
cut off long texts by itself: give it truncation=True.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data import read_json
from finetune import load_classifier, start_of
from model import INIT_STD, BertConfig, Classifier, MaskedLM
from pretrain import Run, choose_runtime, load_masked_lm, load_settings, save_tensors
from pretrain import tokenizer_of, weights_hash
from tokenizer import CLS, FIRST_PIECE, PAD, SEP, SPECIAL_PIECES, UNK, InputError, Parser
from tokenizer import Tokenizer, run_script, write_atomically

THEIR_CLASSES: dict[tuple[str, type], Any] = {
    ("post", MaskedLM): transformers.BertForMaskedLM,
    ("post", Classifier): transformers.BertForSequenceClassification,
    ("pre", MaskedLM): transformers.MegatronBertForMaskedLM,
    ("pre", Classifier): transformers.MegatronBertForSequenceClassification,
}
TYPE_TABLE = "bert.embeddings.token_type_embeddings.weight"
PROTOBUF: Any = sentencepiece_model_pb2  # its classes exist only at run time
IGNORED_TENSORS = ("bert.pooler.", "pooler.", "cls.seq_relationship.", "classifier.",
                   "bert.embeddings.position_ids")


# ---- weights -------------------------------------------------------------------------------------


def their_names(model: MaskedLM | Classifier) -> dict[str, list[str]]:
    """For each tensor of our model, its names there: three for attention.qkv, else one."""
    is_pre = model.config.norm == "pre"
    modules = {
        "bert.token": "bert.embeddings.word_embeddings",
        "bert.position": "bert.embeddings.position_embeddings",
        "bert.embedding_norm": "bert.embeddings.LayerNorm",
        "bert.final_norm": "bert.encoder.ln",
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "": "cls.predictions",  # the bias of MaskedLM itself
        "pooler": "bert.pooler.dense",
        "output": "classifier",
    }
    in_layer = {
        "attention.qkv": "attention.self.{}",
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.ln" if is_pre else "attention.output.LayerNorm",
        "mlp_in": "intermediate.dense",
        "mlp_out": "output.dense",
        "mlp_norm": "ln" if is_pre else "output.LayerNorm",
    }
    for i in range(model.config.layers):
        for ours, theirs in in_layer.items():
            modules[f"bert.layers.{i}.{ours}"] = f"bert.encoder.layer.{i}.{theirs}"
    names: dict[str, list[str]] = {}
    for name in model.state_dict():
        module, _, kind = name.rpartition(".")  # kind: weight or bias
        parts = ("query", "key", "value") if "qkv" in module else ("",)
        names[name] = [f"{modules[module].format(part)}.{kind}" for part in parts]
    return names


def to_hugging_face(model: MaskedLM | Classifier, classes: Sequence[str] = ()) -> PreTrainedModel:
    """The same model in transformers. classes: a classifier's.

    Raises InputError for a convolutional stem and for other pooling than cls: transformers' BERT
    has neither.
    """
    c = model.config
    is_classifier = isinstance(model, Classifier)
    if c.conv_kernels:
        raise InputError("export: a convolutional stem has no counterpart in transformers. Choose "
                         "a model without one")
    if is_classifier and c.pooling != "cls":
        raise InputError(f"export: {c.pooling} pooling has no counterpart in transformers. "
                         "Fine-tune with --set pooling=cls (committee.py: --finetune-set)")
    kind = THEIR_CLASSES[c.norm, type(model)]
    config = kind.config_class(
        vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, intermediate_size=4 * c.width, hidden_act="gelu",
        hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
        max_position_embeddings=c.max_length, type_vocab_size=1, initializer_range=INIT_STD,
        layer_norm_eps=c.norm_eps, pad_token_id=PAD)
    if is_classifier:
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: i for i, label in enumerate(classes)}
    theirs = kind(config).to(next(model.parameters()).dtype).eval()
    weights = theirs.state_dict()
    weights[TYPE_TABLE].zero_()  # for the one segment; what it adds is in our position table
    for name, parts in their_names(model).items():
        tensor = model.state_dict()[name].cpu()
        for part, value in zip(parts, tensor.chunk(len(parts))):
            weights[part].copy_(value)
    return theirs


def our_config(theirs: transformers.PretrainedConfig) -> BertConfig:
    """Our configuration of their model. Raises InputError for what our BERT does not have."""
    wanted = {
        "intermediate_size": 4 * theirs.hidden_size, "hidden_act": "gelu", "is_decoder": False,
        "add_cross_attention": False, "tie_word_embeddings": True, "pad_token_id": PAD,
        "position_embedding_type": "absolute"}
    if theirs.model_type not in ("bert", "megatron-bert"):
        raise InputError(f"type {theirs.model_type!r} is neither bert nor megatron-bert")
    for name, value in wanted.items():
        if getattr(theirs, name, value) != value:
            raise InputError(f"{name} is {getattr(theirs, name)!r}, and this BERT has {value!r}")
    return BertConfig(
        vocab_size=theirs.vocab_size, layers=theirs.num_hidden_layers, width=theirs.hidden_size,
        heads=theirs.num_attention_heads, max_length=theirs.max_position_embeddings,
        dropout=theirs.hidden_dropout_prob, norm_eps=theirs.layer_norm_eps,
        norm="post" if theirs.model_type == "bert" else "pre")


def from_hugging_face(folder: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Read a folder of transformers: our configuration and the weights of a MaskedLM.

    Without a masked-language-model head there: the weights of its `bert` alone. Raises InputError,
    and names what is missing, unknown or different.
    """
    try:
        settings = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
        config = our_config(settings)
        theirs, report = THEIR_CLASSES[config.norm, MaskedLM].from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32,
            attn_implementation="eager", output_loading_info=True,
            ignore_mismatched_sizes=True)  # so that they are named below
    except Exception as error:  # a damaged folder raises one of a dozen kinds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be imported: {reason}") from None
    with torch.device("meta"):
        model = MaskedLM(config)
    names = their_names(model)
    missing = set(report["missing_keys"])
    head = {part for name, parts in names.items() if not name.startswith("bert.") for part in parts}
    if head <= missing:
        names = {name: parts for name, parts in names.items() if name.startswith("bert.")}
    wanted = {TYPE_TABLE}.union(*names.values())
    if report["mismatched_keys"]:
        raise InputError(f"{folder}: cannot be imported: shapes that config.json does not give: "
                         f"{sorted(map(str, report['mismatched_keys']))[:9]}")
    unknown = [name for name in report["unexpected_keys"] if not name.startswith(IGNORED_TENSORS)]
    if lacking := sorted(missing & wanted):
        raise InputError(f"{folder}: cannot be imported: missing tensors {lacking[:9]}")
    if unknown:
        raise InputError(f"{folder}: cannot be imported: unknown tensors {sorted(unknown)[:9]}")
    found = theirs.state_dict()
    decoder = "cls.predictions.decoder.weight"
    if head & wanted and not torch.equal(found[decoder], theirs.get_input_embeddings().weight):
        raise InputError(f"{folder}: cannot be imported: {decoder} is not tied to the embeddings")
    weights = {}
    for name, parts in names.items():
        weights[name] = torch.cat([found[part] for part in parts])
    weights["bert.position.weight"] += found[TYPE_TABLE][0]  # one segment: a constant
    return config, weights


# ---- the tokenizer -------------------------------------------------------------------------------


def to_fast_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The same tokenizer in transformers.

    It differs in this: it knows no marks around entities. It takes "[MASK]" and other special
    tokens in a text for those tokens (fill-mask needs that). In "[MASK]'s" it sees no blank after
    the mask; ours may see one. Of two ways to cut a text that have the same score it may choose the
    other. It drops some combining marks after characters that the normalisation replaces. Raises
    InputError for a .model unlike ours.
    """
    proto = PROTOBUF.ModelProto.FromString(tokenizer.model)
    rules = proto.normalizer_spec
    is_unigram = proto.trainer_spec.model_type == PROTOBUF.TrainerSpec.UNIGRAM
    normal = PROTOBUF.ModelProto.SentencePiece.NORMAL
    others = [piece.piece for piece in proto.pieces[FIRST_PIECE:] if piece.type != normal]
    blanks = rules.add_dummy_prefix and rules.remove_extra_whitespaces and rules.escape_whitespaces
    if not is_unigram or others or not blanks:
        raise InputError("export: this .model is not a plain unigram model, so it cannot be "
                         "exported. Train one with tokenizer.py --train")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=UNK, byte_fallback=False))
    # NFC first: Precompiled replaces only the first of a letter and its separate accent.
    steps: list[Any] = [normalizers.NFC()]
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    steps.append(normalizers.Replace(Regex(" +$"), ""))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=True)
    fast.decoder = decoders.Metaspace("\u2581", prepend_scheme="first", split=True)
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    pad, unk, cls, sep, mask = SPECIAL_PIECES
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep,
        mask_token=mask, model_max_length=max_length, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"])


# ---- folders -------------------------------------------------------------------------------------


def export_model(model: MaskedLM | Classifier, tokenizer: Tokenizer, folder: Path,
                 classes: Sequence[str] = ()) -> None:
    """Write a folder that transformers reads, and `import` too.

    It gets its name when it is complete. Raises InputError if there is something already.
    """
    theirs = to_hugging_face(model, classes)
    fast = to_fast_tokenizer(tokenizer, model.config.max_length)
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"export {folder}: is there already and not empty. Name a new folder")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        theirs.save_pretrained(part)
        fast.save_pretrained(part)
        with write_atomically(part / "tokenizer.model") as file:
            file.write(tokenizer.model)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except Exception as error:  # safetensors has its own kind for a full disk
        raise InputError(f"export {folder}: {error}. Name a folder that can be written") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: {type(theirs).__name__} with its tokenizer, for from_pretrained")


def export_run(run: Path, folder: Path) -> None:
    """Export the model of a finished pre-training or fine-tuning run."""
    path = run / "config.json"
    kind = read_json(path, "kind")["kind"] if path.exists() else ""
    if kind == "pretrain":
        start_of(run)  # raises InputError if its training has not ended
        model, tokenizer = load_masked_lm(run)
        export_model(model, tokenizer, folder)
    elif kind == "finetune":
        classes = load_settings(run, "finetune")["classes"]
        export_model(load_classifier(run), tokenizer_of(run), folder, classes)
    else:
        raise InputError(f"{run}: neither a pre-training nor a fine-tuning run. Name a folder in "
                         "runs/pretrain or runs/finetune")


def import_checkpoint(folder: Path, name: str, tokenizer_file: Path | None, runs_dir: Path) -> Path:
    """Make a folder of transformers the pre-training run `name` in runs_dir.

    tokenizer_file: used instead of the tokenizer.model that our export leaves in the folder.
    Raises InputError if the folder cannot be imported or the run is there with other contents.
    """
    if not name.strip(".") or Path(name).name != name:
        raise InputError(f"{name!r} is not the name of a run folder. Name one without slashes")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: cannot be imported: it has no config.json. Name a folder that "
                         "save_pretrained wrote")
    own = folder / "tokenizer.model"
    if not (tokenizer_file or own.exists()):
        raise InputError(f"{folder}: has no tokenizer.model, so its tokenizer (a vocab.txt?) "
                         "differs from ours, and its embeddings belong to other tokens. "
                         "--tokenizer FILE.model goes on in spite of that")
    config, weights = from_hugging_face(folder)
    tokenizer = Tokenizer.load(tokenizer_file or own)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: has {config.vocab_size} embeddings, and the tokenizer "
                         f"{tokenizer.vocab_size} pieces. Name a smaller one with --tokenizer")
    if not own.exists() or own.read_bytes() != tokenizer.model:
        print(f"note: {folder} was trained with another tokenizer than {tokenizer_file}: its "
              "embeddings belong to other tokens, so only its layers are of use", flush=True)
    settings = {"kind": "pretrain", "model": f"hf-{folder.resolve().name}",
                "config": dataclasses.asdict(config), "seed": 0, "tokenizer": tokenizer.hash,
                "weights": weights_hash(weights)}
    run_folder = runs_dir / "pretrain" / name
    with Run(run_folder, settings, tokenizer, choose_runtime("cpu")):
        if not (run_folder / "last.pt").exists():
            save_tensors(run_folder / "last.pt", {"step": 0, "model": weights, "optimizers": []})
    return run_folder


def main() -> None:
    transformers.logging.set_verbosity_error()  # what it would note is checked here
    transformers.logging.disable_progress_bar()
    parser = Parser(__doc__, prog="python -m extras.huggingface")
    commands = parser.add_subparsers(dest="action", required=True, metavar="export|import",
                                     parser_class=Parser)
    add = commands.add_parser("export", help="write a run as transformers' model").add_argument
    add("run", type=Path, metavar="RUN", help="a folder in runs/pretrain or runs/finetune")
    add("folder", type=Path, metavar="DIR", help="the folder to write: new, or empty")
    add = commands.add_parser("import", help="make such a folder a pre-training run").add_argument
    add("folder", type=Path, metavar="DIR", help="a folder of type bert or megatron-bert")
    add("name", metavar="NAME", help="of the run folder to make in runs/pretrain")
    add("--tokenizer", type=Path, metavar="FILE", help="a .model (default: DIR/tokenizer.model)")
    add("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default %(default)s")
    args = parser.parse_args()
    if args.action == "export":
        export_run(args.run, args.folder)
    else:
        run = import_checkpoint(args.folder, args.name, args.tokenizer, args.runs_dir)
        print(f"{run}: imported\nnext: python finetune.py --checkpoint {run} --data DATA_FOLDER")


if __name__ == "__main__":
    run_script(main)
