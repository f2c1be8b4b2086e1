"""tokenizer.py - text <-> token ids: a SentencePiece unigram tokenizer trained on the articles.

First of the six files: data.py builds on it. The paper's authors use the 30,522 word pieces of
bert-base-uncased. Here the pieces are learned from the articles that the model reads, so nothing
comes from outside. Text is first brought into one form: Unicode NFKC, small letters.

    python tokenizer.py --train articles.txt --model my.model --vocab-size 8000
    python tokenizer.py --model my.model --show "Paris is the capital of France."
    python tokenizer.py --model my.model --decode 512 17 2043
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import sentencepiece as spm

PAD, UNK, CLS, SEP, MASK = range(5)  # ids of the special tokens
FIRST_PIECE = 5  # ordinary pieces begin here
SPECIAL_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# All but [UNK] are control symbols: the string "[MASK]" in a text never becomes id 4.
SPECIAL_OPTIONS: dict[str, Any] = dict(
    pad_id=PAD, unk_id=UNK, bos_id=CLS, eos_id=SEP, pad_piece="[PAD]", unk_piece="[UNK]",
    bos_piece="[CLS]", eos_piece="[SEP]", control_symbols="[MASK]")
# num_threads is fixed: with another number, the same texts give slightly other pieces.
TRAINING_OPTIONS: dict[str, Any] = dict(
    model_type="unigram", normalization_rule_name="nmt_nfkc_cf", character_coverage=0.9995,
    num_threads=4, minloglevel=2, max_sentence_length=1 << 16)
# Exercise: set model_type="bpe" and run `data.py prepare bpe --task topics`. Compare the pieces of
# a text: `tokenizer.py --model data/vital/tokenizer.model --show TEXT`, and with data/bpe. Models
# must be trained again for other pieces: `committee.py --data bpe`.
MOST_CHARACTERS = 20_000_000  # of training text; SentencePiece needs about 30 bytes for each
LONGEST_TEXT = 16_000  # characters of up to 4 bytes: see max_sentence_length
# A task may ask how two entities (persons, places, ...) of a text are related. Then they are
# marked: "[#Paris#] is the capital of [@France@]". Each mark becomes a special token:
# [MASK] on both sides of the head entity, [SEP] on both sides of the tail (see model.py).
ENTITIES = re.compile(r"\[#(.+?)#\]|\[@(.+?)@\]", re.DOTALL)


class InputError(Exception):
    """Input that cannot be worked with. The message is one line: what, where, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", " "))


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main(). Bad input ends in one line and exit status 2, Ctrl-C in status 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot show
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (`| head`) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = (f"{error.filename}: {error.strerror}. Choose another path, or change the "
                       "permissions")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues an interrupted run", file=sys.stderr)
        sys.exit(130)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a limit on file sizes into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"no space left on the disk while writing {path} ({error.strerror}). "
                         "Free some, then run the same command again") from error


@contextmanager
def write_atomically(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that gets the name `path` only when it is complete and on the disk.

    mode: "wb", or "w" for UTF-8 text. Whatever interrupts the writing, the old file stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # same folder: a rename is atomic
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else "\n"  # the same bytes on every system
    try:
        with full_disk_named(path):
            with open(temporary, mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as its help, and one-line errors with a suggestion."""

    def __init__(self, page: str | None = None, **more: Any) -> None:
        if "prog" not in more:  # a script, not one of its commands
            more.setdefault("usage", "python %(prog)s [flags]")
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=page, formatter_class=formatter, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Each parser, also that of a script's command, refuses what it does not know."""
        values, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return values, rest

    def error(self, message: str) -> NoReturn:
        pattern = r"unrecognized arguments: (-[^\s=]*)|invalid choice: '([^']*)'"
        suggestions: list[str] = []
        if wrong := re.search(pattern, message):
            flags: list[str] = []
            values: list[str] = []
            for action in self._actions:
                flags += action.option_strings
                values += map(str, action.choices or ())
            word, known = (wrong[1], flags) if wrong[1] else (wrong[2], values)
            suggestions = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
        hint = f"; did you mean {suggestions[0]}?" if suggestions else ""
        self.exit(2, f"error: {message}{hint} ({self.prog} --help lists all flags)\n")


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, `least` or more."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)
    return parse


def without_surrogates(text: str) -> str:
    """The text with "?" for each lone surrogate, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def training_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts in one line each, cut to LONGEST_TEXT, until they have MOST_CHARACTERS in all."""
    total = 0
    for text in texts:
        line = " ".join(text[:LONGEST_TEXT].replace("\0", " ").split())
        total += len(line)
        yield line
        if total >= MOST_CHARACTERS:
            return


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train on the texts and return the content of a `.model` file.

    Raises InputError if the texts are too few for vocab_size pieces; it names the largest size.
    """
    if not FIRST_PIECE < vocab_size <= 65_536:
        raise InputError(f"--vocab-size {vocab_size}: must lie between {FIRST_PIECE + 1} and 65536 "
                         "(ids are 16 bits wide)")
    model = io.BytesIO()
    lines = [without_surrogates(line) for line in training_texts(texts)]
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model,
                                       vocab_size=vocab_size, **SPECIAL_OPTIONS,
                                       **TRAINING_OPTIONS)
    except (RuntimeError, OSError) as error:  # its text names the largest size that fits
        reason = str(error).rpartition("] ")[2] or "is there any text?"
        raise InputError(f"no tokenizer of --vocab-size {vocab_size} could be trained on these "
                         f"texts: {reason}") from None
    return model.getvalue()


class Tokenizer:
    """A trained tokenizer. model: the content of a `.model` file with our special tokens."""

    def __init__(self, model: bytes, name: str = "tokenizer.model") -> None:
        try:
            self.pieces = spm.SentencePieceProcessor()
            self.pieces.load_from_serialized_proto(model)
        except RuntimeError:
            raise InputError(f"{name}: not a SentencePiece model. Train one with tokenizer.py "
                             "--train") from None
        first = [self.pieces.id_to_piece(i) for i in range(min(FIRST_PIECE, len(self.pieces)))]
        if first != SPECIAL_PIECES:
            raise InputError(f"{name}: its first pieces are {first}, not this project's special "
                             "tokens. Train one with tokenizer.py --train")
        self.model = model
        self.vocab_size: int = len(self.pieces)
        self.hash = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. Name a .model file, or train one with "
                             "tokenizer.py --train") from None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint16: [CLS] pieces [SEP]."""
        clean = [without_surrogates(text) for text in texts]
        rows = self.pieces.encode(clean, num_threads=2)
        for i, text in enumerate(clean):
            if "[#" in text or "[@" in text:
                rows[i] = self._encode_marked(text)
        return [np.array([CLS, *ids, SEP], dtype=np.uint16) for ids in rows]

    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a text with marked entities; each stretch is encoded by itself."""
        # [before, head, tail, between, head, tail, ..., after]; of head and tail one is None
        before, *others = ENTITIES.split(text)
        ids = self.pieces.encode(before)
        for head, tail, after in zip(others[::3], others[1::3], others[2::3]):
            mark = MASK if head else SEP
            ids += [mark, *self.pieces.encode(head or tail), mark]
            ids += self.encode_after_mark(after)
        return ids

    def encode_after_mark(self, text: str) -> list[int]:
        """Token ids of a text that follows a special token, as the "." does in "[MASK]."."""
        ids = self.pieces.encode(text)
        has_blank = text[:1].isspace()
        if ids[:1] == [self.pieces.piece_to_id("▁")] and not has_blank:
            return ids[1:]  # SentencePiece has put this blank there
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without the special tokens."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is not in 0..{self.vocab_size - 1}")
        return self.pieces.decode([i for i in ids if i >= FIRST_PIECE])


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `path` (.model) and, beside it, a readable `.vocab`: piece and log-probability."""
    vocabulary = ""
    for i in range(tokenizer.vocab_size):
        vocabulary += f"{tokenizer.pieces.id_to_piece(i)}\t{tokenizer.pieces.get_score(i):.4f}\n"
    with write_atomically(path.with_suffix(".vocab"), "w") as file:
        file.write(vocabulary)
    with write_atomically(path) as file:
        file.write(tokenizer.model)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the .model file to write (--train) or to use")
    add("--train", nargs="+", metavar="FILE", help="articles, as data.py reads them")
    add("--vocab-size", type=whole_number(1), default=8_000,
        help="pieces (default %(default)s; paper 30522)")
    add("--show", metavar="TEXT", help="print the pieces and ids of a text")
    add("--decode", nargs="+", type=int, metavar="ID", help="print the text of these ids")
    args = parser.parse_args()
    if args.train:
        from data import read_articles  # here, since data.py imports this file

        texts = (article.text for article in read_articles(args.train, "--train"))
        save_tokenizer(Tokenizer(train_tokenizer(texts, args.vocab_size)), args.model)
        print(f"wrote {args.model} and {args.model.with_suffix('.vocab')}")
    tokenizer = Tokenizer.load(args.model)
    if args.show is not None:
        for i in tokenizer.encode([args.show])[0]:
            print(f"{i:6d}  {tokenizer.pieces.id_to_piece(int(i))}")
    if args.decode:
        print(tokenizer.decode(args.decode))
    if not (args.train or args.show is not None or args.decode):
        print(f"{args.model}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.hash[:16]}")


if __name__ == "__main__":
    # This file runs as __main__, and data.py imports it again as `tokenizer`, with a second class
    # InputError. So main() is taken from there.
    from tokenizer import main, run_script

    run_script(main)
