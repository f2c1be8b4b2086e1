"""tokenizer.py - text <-> token ids: a SentencePiece unigram tokenizer trained on the Wikipedia subset.

The paper's authors use bert-base-uncased's 30,522 word pieces; here the vocabulary is learnt from the same articles as
the model (case-folded, Unicode NFKC), so that nothing comes from outside. First of the six files: data.py builds on it.

    python tokenizer.py --train articles.txt --model my.model --vocab-size 8000
    python tokenizer.py --model my.model --show "Paris is the capital of France."
    python tokenizer.py --model my.model --decode 512 17 2043
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import sentencepiece as spm

PAD, UNK, CLS, SEP, MASK = range(5)  # ids of the special tokens; ordinary pieces begin at FIRST_PIECE
FIRST_PIECE = 5
# [UNK] is SentencePiece's unknown piece, the other four are control symbols: the string "[MASK]" in a text is split
# into ordinary pieces and never becomes id 4. num_threads is a constant because it changes the model that is trained.
SPECIALS: dict[str, Any] = dict(pad_id=PAD, unk_id=UNK, bos_id=CLS, eos_id=SEP, pad_piece="[PAD]", unk_piece="[UNK]",
                                bos_piece="[CLS]", eos_piece="[SEP]", control_symbols="[MASK]")
TRAINING: dict[str, Any] = dict(model_type="unigram", normalization_rule_name="nmt_nfkc_cf", character_coverage=0.9995,
                                num_threads=4, minloglevel=2)
# Exercise: train with model_type="bpe" and compare the pieces of one text (--show). Which of the two cuts words where you would?
LONGEST_LINE = 4_000  # bytes; SentencePiece drops training lines over 4,192 without a word
# Two entities in a text may be marked: "[#Paris#] is the capital of [@France@]". Each mark becomes one special token, which nothing
# else inside a text becomes: [MASK] on both sides of the head entity, [SEP] on both sides of the tail (HEAD and TAIL of model.py).
ENTITIES = re.compile(r"\[#(.+?)#\]|\[@(.+?)@\]", re.DOTALL)


class InputError(Exception):
    """Input that cannot be worked with. The message is one line: what, where, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))  # a library's own words, quoted, may have several


def in_one_line(error: Exception) -> str:
    """What an InputError, or an OSError such as "permission denied", has to say."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; name another place, or make this one usable"
    return str(error)


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main(): bad input, or a file that the system refuses, ends in one line and exit status 2, Ctrl-C in
    status 130, SIGTERM in 143; no traceback, and temporary files are removed. What is printed is UTF-8 everywhere, piped on Windows too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a letter that the terminal lacks must not end a run
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed (`| head`) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse with a script's docstring as its help page, and one line, with the nearest valid name, for a wrong flag or value."""

    def __init__(self, page: str | None = None, **more: Any) -> None:
        if "prog" not in more:  # a script's own page; a subcommand's usage names its arguments
            more["usage"] = "python %(prog)s [flags]"
        super().__init__(description=page, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        values = [str(value) for action in self._actions for value in action.choices or ()]
        wrong = re.search(r"unrecognized arguments: (-[^\s=]*)|invalid choice: '([^']*)'", message)
        near = difflib.get_close_matches(wrong[1] or wrong[2], flags if wrong[1] else values, n=1, cutoff=0.5) if wrong else []
        self.exit(2, f"error: {message}" + (f"; did you mean {near[0]}?" if near else "") + f" ({self.prog} --help tells all flags)\n")


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The texts as lines short enough for SentencePiece, cut at blanks where there are any."""
    for text in texts:
        for line in text.splitlines():
            while len(line.encode("utf-8", "replace")) > LONGEST_LINE:
                cut = line.rfind(" ", 1, LONGEST_LINE // 4)  # a character has at most 4 bytes
                cut = cut if cut > 0 else LONGEST_LINE // 4
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train on the texts and return the serialised model, the content of a `.model` file.

    Raises InputError when the texts hold too little for vocab_size pieces, naming the largest size that fits.
    """
    if not FIRST_PIECE < vocab_size <= 65_536:
        raise InputError(f"--vocab-size {vocab_size}: must lie between {FIRST_PIECE + 1} and 65536 (ids are 16 bits wide)")
    model = io.BytesIO()
    stopped: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            yield from training_lines(texts)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            stopped.append(error)  # the library would turn it, Ctrl-C included, into a RuntimeError of its own
            raise

    try:
        spm.SentencePieceTrainer.train(sentence_iterator=lines(), model_writer=model,
                                       vocab_size=vocab_size, **SPECIALS, **TRAINING)
    except (RuntimeError, OSError) as error:  # the library reports every failure this way; its text holds the limit
        if stopped:
            raise stopped[0] from None
        message = str(error)
        if fits := re.search(r"less than or equal to (\d+)|<= ?(\d+)", message):
            raise InputError(f"--vocab-size {vocab_size} is too large for these texts: "
                             f"the largest that fits is {fits[1] or fits[2]}") from None
        if needs := re.search(r"smaller than required_chars\.? *\d* *vs *(\d+)", message):
            raise InputError(f"--vocab-size {vocab_size} is too small: these texts have {needs[1]} different "
                             "characters and special tokens; give a larger one") from None
        raise InputError(f"no tokenizer could be trained on these texts (is there any text?): {message}") from None
    return model.getvalue()


class Tokenizer:
    """A trained tokenizer.

    model: the content of a `.model` file. Raises InputError if that is not a SentencePiece model with our special ids.
    """

    def __init__(self, model: bytes, name: str = "tokenizer.model") -> None:
        try:
            self.pieces = spm.SentencePieceProcessor()
            self.pieces.load_from_serialized_proto(model)
        except RuntimeError:
            raise InputError(f"{name}: not a SentencePiece model; train one with tokenizer.py --train") from None
        found = [self.pieces.id_to_piece(i) for i in range(min(FIRST_PIECE, len(self.pieces)))]
        if found != ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]:
            raise InputError(f"{name}: its first pieces are {found}, not this project's special tokens; "
                             "train one with tokenizer.py --train")
        self.model = model
        self.vocab_size: int = len(self.pieces)
        self.hash = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; name a .model file, or train one with --train") from None

    def encode(self, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Token ids of each text, uint16: [CLS] pieces [SEP], cut to max_length in all. Marks around entities are a token each."""
        # a lone surrogate cannot be encoded in UTF-8; it becomes "?"
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        ids = self.pieces.encode(clean, num_threads=2)
        for i, text in enumerate(clean):
            if "[#" in text or "[@" in text:
                ids[i] = self.marked(text)
        return [np.array([CLS, *piece_ids[: max_length - 2], SEP], dtype=np.uint16) for piece_ids in ids]

    def marked(self, text: str) -> list[int]:
        """Token ids of a text with marked entities, without [CLS] and the last [SEP]; each stretch is encoded by itself."""
        ids, end = [], 0
        for found in ENTITIES.finditer(text):
            mark = MASK if found[1] else SEP
            ids += [*self.pieces.encode(text[end : found.start()]), mark, *self.pieces.encode(found[1] or found[2]), mark]
            end = found.end()
        return ids + self.pieces.encode(text[end:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out. Raises InputError for ids beyond the vocabulary."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(f"token id {wrong[0]} is not in 0..{self.vocab_size - 1}")
        return self.pieces.decode([i for i in ids if i >= FIRST_PIECE])

    def vocabulary(self) -> Iterator[tuple[str, float]]:
        """(piece, log-probability) by id."""
        return ((self.pieces.id_to_piece(i), self.pieces.get_score(i)) for i in range(self.vocab_size))


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `path` (.model) and, beside it, a readable `.vocab`: a piece and its log-probability a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = "".join(f"{piece}\t{score:.4f}\n" for piece, score in tokenizer.vocabulary())
    for place, content in ((path.with_suffix(".vocab"), vocabulary.encode("utf-8")), (path, tokenizer.model)):
        part = place.with_name(place.name + ".tmp")
        try:
            part.write_bytes(content)
            os.replace(part, place)  # a model that was there before stays until the new one is whole
        finally:
            part.unlink(missing_ok=True)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the .model file to write (--train) or to use")
    parser.add_argument("--train", nargs="+", type=Path, metavar="TEXT", help="train on these UTF-8 text files")
    parser.add_argument("--vocab-size", type=int, default=8_000, help="number of pieces (default %(default)s; paper 30522)")
    parser.add_argument("--show", metavar="TEXT", help="print the pieces and ids of a text")
    parser.add_argument("--decode", nargs="+", type=int, metavar="ID", help="print the text of these ids")
    args = parser.parse_args()
    if args.train:
        for path in args.train:
            if not path.is_file():
                raise InputError(f"{path}: no such file; --train takes text files")
        texts = (line for path in args.train for line in path.open(encoding="utf-8", errors="replace"))
        save_tokenizer(Tokenizer(train_tokenizer(texts, args.vocab_size)), args.model)
        print(f"wrote {args.model} and {args.model.with_suffix('.vocab')}")
    tokenizer = Tokenizer.load(args.model)
    if args.show is not None:
        for i in tokenizer.encode([args.show], max_length=10**6)[0]:
            print(f"{i:6d}  {tokenizer.pieces.id_to_piece(int(i))}")
    if args.decode:
        print(tokenizer.decode(args.decode))
    if not (args.train or args.show is not None or args.decode):
        print(f"{args.model}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.hash[:16]}")


if __name__ == "__main__":
    run_script(main)
