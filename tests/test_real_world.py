"""Text as people have it: code pages, Excel, WikiExtractor, other scripts, other Wikipedias.
Most cases were reported in public, for other projects."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

import data
import tokenizer as tokenizer_module
from data import InputError, Request, article_files, article_of, encode_texts, iterate_pages
from data import opening_text, prepare, read_article_file, read_dump, read_labels, read_task_files
from data import sample_task, shared_passages, text_lines, unknown_share, whole_texts
from material import articles, small_tokenizer
from tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Der Läufer Nummer {i} gewann das Spiel in Köln" for i in range(12)]
TWO_CLASSES = "".join(f"a,text {i}\nb,other {i}\n" for i in range(6))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def write_labels(path: Path, rows: str) -> Path:
    return write(path, "label,text\n" + rows)


def own_task(path: Path, **sizes: int) -> data.Task:
    counts = {"train_per_class": 0, "dev_per_class": 0, "test_per_class": 0, **sizes}
    return sample_task("x", *read_task_files([path]), **counts)


def texts_of(path: Path) -> list[str]:
    return [article.text for article in read_article_file(path)]


# ---- bytes and characters ----


@pytest.mark.parametrize("end, good, bad, pack", [
    (".txt", "Wort\n\n", "Käse\n", bytes), (".csv", "label,text\n", "a,Käse\n", bytes),
    (".jsonl", '{"text": "Wort"}\n', '{"text": "Käse"}\n', bytes),
    (".txt.gz", "Wort\n\n", "Käse\n", gzip.compress),
    (".jsonl.bz2", '{"text": "Wort"}\n', '{"text": "Käse"}\n', bz2.compress)])
def test_other_encodings_are_refused_with_line_and_byte(tmp_path: Path, end: str, good: str,
                                                        bad: str, pack: Callable) -> None:
    path = tmp_path / f"a{end}"
    read = read_labels if end == ".csv" else texts_of
    places = {"cp1252": (good.count("\n") + 1, "0xe4"), "utf-16-le": (1, "0x00")}  # without a BOM
    for encoding, (line, byte) in places.items():
        path.write_bytes(pack((good + bad).encode(encoding)))
        message = f"a{end}, line {line}: byte {byte} is not UTF-8 text. Save the file as UTF-8"
        with pytest.raises(InputError, match=message):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_readers_know_the_same_encodings_and_line_ends(tmp_path: Path, encoding: str,
                                                           end: str) -> None:
    path = write(tmp_path / "a.csv", f"label,text{end}Küche,x{end}Sport,y", encoding)
    assert read_labels(path) == [("Küche", "x"), ("Sport", "y")]
    path = write(tmp_path / "a.txt", end.join(["eins", "zwei", "", "Käse", ""]), encoding)
    assert texts_of(path) == ["eins\nzwei", "Käse"]
    path = write(tmp_path / "a.jsonl", f'{{"text": "Käse"}}{end}{{"text": "b"}}', encoding)
    assert texts_of(path) == ["Käse", "b"]
    lines = end.join(["a", "", "b\x0bc\u2028d", "e"])  # \x0b and \u2028 end no line
    raw = io.BufferedReader(io.BytesIO(lines.encode(encoding)))
    assert list(text_lines(raw, "standard input")) == ["a\n", "\n", "b\x0bc\u2028d\n", "e"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "Käse".encode("utf-16")[:-1], "not UTF-16 text"),
    ("a.csv", b"label,text\na,In Rom, am Tag\n", "line 2: 3 fields instead of 2. Texts that con"),
    ("a.csv", b"label,text\na,b\nc\n", "line 3: 1 fields instead of 2"),
    ("a.csv", b'label,text\na,b\na,"offen\nb,c\nb,d "e" f\n', "line 3: a quote opens in this row"),
    ("a.csv", b'label,text\na,b\nb,"offen\nb,"zu" und mehr"\n', "line 3: a quote opens"),
    ("a.csv", b"label,text\na,b\n ,c\n", "line 3: a text without a label"),
    ("a.csv", b"", "line 1: the header must name the columns label and text"),
    ("a.csv", b"v1,v2,,,\nham,Go,,,\n", "line 1: the header"),  # Kaggle's spam.csv
    ("a.csv", b"sep=;\nlabel;text\na;b\n", "line 1: the header"),  # Excel writes this line
    ("a.csv", b"label,text\n1,x\n1.0,y\n", "label '1.0' is '1' written in another way"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ["a", "b"]}\n', 'line 2: "text" is missing, or is no'),
    ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', 'line 2: "text" is missing, or is no string')])
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, name: str, content: bytes,
                                             message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        read_task_files([tmp_path / name]) if name == "a.csv" else texts_of(tmp_path / name)


# ---- CSV ----


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["label|text", "text|label", '"Label"| "TEXT" ',
                                    "id|label|text|year"])
def test_the_header_tells_the_separator(tmp_path: Path, separator: str, header: str) -> None:
    texts = [f'{text}; "so", {separator}' for text in TEXTS]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        file.write(header.replace("|", separator) + "\n")
        writer = csv.writer(file, delimiter=separator)
        for text in texts:
            values = {"label": " Küche ", "text": text}
            names = [name.strip(' "').lower() for name in header.split("|")]
            writer.writerow([values.get(name, "7") for name in names])
    assert read_labels(tmp_path / "a.csv") == [("Küche", text) for text in texts]


def test_odd_rows_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Marks of several files put together, invisible blanks, words that are values elsewhere,
    Unicode forms, line ends and commas in class names."""
    bom = "\ufeff"
    rows = (f'{bom}spam,x\nspam,y\n\u200bham\xa0,z\nNA,null\nnan,None\n"a, b",\u202eמילה\n'
            '"two\nlines",u\n,\n\n , \nempty,\nKu\u0308che,v\n Küche ,w\n1.1,x\n1.10,x\n')
    labels = read_labels(write(tmp_path / "a.csv", f"{bom}label,text\n{rows}"))
    assert labels == [
        ("spam", "x"), ("spam", "y"), ("ham", "z"), ("NA", "null"), ("nan", "None"),
        ("a, b", "\u202eמילה"), ("two\nlines", "u"), ("Küche", "v"), ("Küche", "w"),
        ("1.1", "x"), ("1.10", "x")]
    assert "3 rows without a text are left out" in capsys.readouterr().out
    assert {"1.1", "1.10"} <= set(read_task_files([tmp_path / "a.csv"])[0])  # versions differ


@pytest.mark.parametrize("rows, enough", [("c,Regen\n", 3), ("c,immer dasselbe\n" * 20, 21)])
def test_a_class_with_too_few_texts_is_named(tmp_path: Path, rows: str, enough: int) -> None:
    path = write_labels(tmp_path / "a.csv", TWO_CLASSES + rows)
    message = "class 'c' has 1 distinct text, and 3 are needed .train, dev, test.*"
    with pytest.raises(InputError, match=f"{message}--min-class-size {enough}"):
        own_task(path)
    large = "".join(f"{'ab'[i % 2]},text {i}\n" for i in range(60))
    path = write_labels(tmp_path / "b.csv", large + rows)
    assert own_task(path, min_class_size=enough).classes == ["a", "b"]


def test_copies_of_a_text_stay_together(tmp_path: Path) -> None:
    copies = "".join(f"c,text {i % 3}\n" for i in range(30))
    task = own_task(write_labels(tmp_path / "a.csv", copies + TWO_CLASSES.replace("text", "else")))
    for part in (task.train, task.dev, task.test):
        assert Counter(label for _, label in part)[2] == 10


def test_texts_of_signs_alone_are_different_texts(tmp_path: Path) -> None:
    rows = "".join(f"{'ab'[i % 2]},{chr(0x1F600 + i)}\n" for i in range(24))
    task = own_task(write_labels(tmp_path / "a.csv", rows))
    assert len(task.train + task.dev + task.test) == 24
    assert task.dev and task.test


def test_long_fields_and_many_classes(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "long.csv", "a," + "wort " * 60_000 + "\nb,kurz\n")
    texts = [text for _, text in read_labels(path)]
    table = encode_texts(texts, small_tokenizer(), 32)
    assert len(texts[0]) > 131_072 and table.cut_off == 1 and table.lengths[0] == 32
    rows = "".join(f"product-{i % 8_000},word {i}\n" for i in range(24_000))
    begun = time.process_time()
    assert len(own_task(write_labels(tmp_path / "many.csv", rows)).classes) == 8_000
    assert time.process_time() - begun < 5


def test_unknown_words_and_the_range_of_class_sizes_are_told(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = []
    for i in range(200):
        rows.append(f"{'א' if i % 20 else 'ב'},הספר על השולחן {chr(0x4E00 + i)}\n")
    hebrew = write_labels(tmp_path / "he.csv", "".join(rows))
    (tmp_path / "en.model").write_bytes(small_tokenizer().model)
    request = Request(labels=[hebrew], tokenizer=tmp_path / "en.model", preset="smoke")
    folder = prepare(tmp_path / "d/he", request)
    out, err = capsys.readouterr()
    assert "7 to 133 training, 1 to 19 dev and 2 to 38 test rows a class" in out
    assert "task he: 100.0 % of the tokens are unknown, 0.0 % of the texts are cut off" in out
    assert "warning: task he: the tokenizer does not know most of this text" in err
    assert folder.meta["tasks"]["he"]["encoded"]["unknown"] == 1.0


# ---- files of text ----


def test_the_tokenizer_reads_articles_as_data_does(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the JSON source of a .jsonl file, with its quotes and escapes."""
    texts = [article["text"].replace("king", "könig") for article in articles(80)]
    lines = [json.dumps({"title": "t", "text": text}) for text in texts]
    path = write(tmp_path / "x.jsonl", "\n".join(lines))
    command = ["tokenizer.py", "--train", path, "--model", tmp_path / "x.model"]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--vocab-size", "150"])
    tokenizer_module.main()
    vocabulary = (tmp_path / "x.vocab").read_text(encoding="utf-8")
    assert "ö" in vocabulary
    assert not re.search(r'["{\\]', vocabulary)


@pytest.mark.parametrize("text, expected", [
    ("eins\nzwei\ndrei\n\n", ["eins", "zwei", "drei"]),  # a text a line
    ("eins\nzwei\n \ndrei\n", ["eins\nzwei", "drei"]),
    ('<doc id="1" title="Tom &amp; Jerry">\nTom & Jerry\n\nEin Film.\n\nNoch ein Absatz.\n</doc>\n'
     '<doc id="2" title="B">\nB\n\nText.\n</doc>\n', ["Ein Film.\nNoch ein Absatz.", "Text."]),
    (" = Valkyria = \n \n It is a game . \n \n = = Plot = = \n \n It begins . \n",  # WikiText
     ["It is a game .", "It begins ."]),
    ("word " * 2_000_000 + "\r\n\r\nb\r\n", ["word " * 1_999_999 + "word", "b"])])
def test_layouts_of_text_files(tmp_path: Path, capsys: pytest.CaptureFixture, text: str,
                               expected: list[str]) -> None:
    assert texts_of(write(tmp_path / "a.txt", text)) == expected
    notice = "has no blank line, so each line is read as an article" in capsys.readouterr().out
    assert notice == text.startswith("eins\nzwei\ndrei")


def test_brackets_in_names(tmp_path: Path) -> None:
    folder = tmp_path / "corpus [v2]"
    folder.mkdir()
    paths = [write(folder / name, "x") for name in ("a.txt", "b [1].txt")]
    assert article_files([str(folder / "*.txt")]) == paths
    assert article_files([str(paths[1])]) == [paths[1]]
    with pytest.raises(InputError, match="is a folder. Name its files"):
        article_files([str(folder)])


def test_shared_passages_need_no_blanks_between_words() -> None:
    row = "日本の首都は東京であり世界でも有数の大都市。" * 3
    texts = [f"前置き。{row}後書き。", "これはまったく別の文章である。" * 6]
    tokenizer = Tokenizer(train_tokenizer(texts, 40))
    rows, hits = shared_passages(whole_texts(texts, tokenizer), whole_texts([row], tokenizer))
    assert (rows.tolist(), hits.tolist()) == ([True], [True, False])


def test_no_text_is_lost_to_sentencepiece() -> None:
    """It skips texts over 4,192 bytes, drops a line with NUL, and does not know a newline."""
    long = " ".join(article["text"] for article in articles(60))
    tokenizer = Tokenizer(train_tokenizer([long, "river\0king " * 9, "ocean\nbridge " * 9], 90))
    ids = tokenizer.encode(["the river\nof the king", "\ud800"])
    assert unknown_share(ids[0], tokenizer) == 0
    assert len(ids[1]) > 2  # a lone surrogate is no error


# ---- other Wikipedias ----

PROSE = ("'''Ort''' ist eine [[Gemeinde]] am Fluss im Norden des Landes. "
         + "Bekannt sind die alte Brücke und der Markt. " * 6)
NAMES = {1: "Diskussion", 6: "Datei", 10: "Vorlage", 14: "Kategorie"}


def page(title: str, text: str, ns: str = "<ns>0</ns>") -> str:
    content = f"<revision><text>{escape(text)}</text></revision>"
    return f"<page><title>{title}</title>{ns}{content}</page>\n"


def dump(pages: str) -> str:
    names = "".join(f'<namespace key="{key}">{name}</namespace>' for key, name in NAMES.items())
    return f"<mediawiki><siteinfo><namespaces>{names}</namespaces></siteinfo>\n{pages}</mediawiki>"


def test_namespaces_are_those_of_the_dump(tmp_path: Path) -> None:
    text = ("[[Datei:A.jpg|mini|Blick auf die [[Kirche]] von oben]]\n[[Bild:B.png|links|Karte]]\n"
            f"{PROSE}\n== Weblinks ==\n* [http://a.de Seite]\n[[Kategorie:Ort]]")
    pages = page("Ort", text) + page("Diskussion:Ort", PROSE, "<ns>1</ns>")
    path = write(tmp_path / "D.XML.BZ2", "")
    path.write_bytes(bz2.compress(dump(pages).encode()))
    assert texts_of(path) == [opening_text(PROSE)]
    titles = ["Ort", "CSI: Miami", "Vorlage:Ort", "Datei:A.jpg", "Talk:Ort"]
    pages = "".join(page(title, PROSE, ns="") for title in titles)  # an old export
    path = write(tmp_path / "d.xml", dump(pages + page("W", PROSE, "<redirect title='Ort' />")))
    assert [article.title for article in read_dump(path)] == ["Ort", "CSI: Miami"]


@pytest.mark.parametrize("wikitext, plain", [
    ("-{zh-hans:计算机; zh-hant:電腦;}- und -{C}-", "计算机 und C"),  # language variants
    ("a -{T|zh-cn:Titel}- b", "a b"), ("-{A|zh-cn:x;zh-tw:y}-", "x"),
    ("1900{{snd}}1950", "1900–1950"), ("1900{{spnd}}1950", "1900–1950"),
    ("1900{{ndash}}1950", "1900–1950"), ("1900{{–}}1950", "1900–1950"),
    ("um {{convert|340|km|mi}} lang", "um 340 km lang"), ("{{cvt|340|km}}", "340 km"),
    ("{{convert|3|-|5|km}}", "3–5 km"), ("{{convert|3|to|5|km|mi}}", "3 to 5 km"),
    ("der {{lang|la|Homo}} da", "der Homo da"), ("{{transl|ja|Hepburn|Tōkyō}}", "Tōkyō"),
    ("{{nowrap|Old Tom}}", "Old Tom"), ("{{nobr|Old Tom}}", "Old Tom"), ("{{small|s}}", "s"),
    ("{{abbr|AB|Alpha Beta}}", "AB"), ("{{nihongo|Aaa|X|y}}", "Aaa"), ("{{frac|1|2}}", "1/2"),
    ("{{frac|3|1|2}}", "3 1/2"), ("{{val|5.3}} cm", "5.3 cm"), ("{{circa|1900}}", "c. 1900"),
    ("{{formatnum:12345}}", "12345"), ("a{{nbsp}}b", "a b"), ("Paris[[simple:Paris]]", "Paris"),
    ("{{nowrap|[[Paris|the city]] is}}", "the city is"), ("{{nowrap|1=E = mc}}", "E = mc"),
    ("{{nowrap|{{lang|la|Homo}} x}}", "Homo x"), ("17{{unknown}}{{also|x}}18", "17 18"),
    ("A ({{unknown}}) b {{unknown}} c", "A b c"), ("1900<ref>x</ref>1950", "1900 1950"),
    ("B ({{IPA|b}}; 1900) c", "B (1900) c"), ("a{{unknown}}, b", "a, b"),
    # reported for wikiextractor (189, 98, 275, 80, 374) and cv-sentence-extractor (154)
    ("är {{formatnum:3}}&nbsp;°C och {{formatNum:-10}}&nbsp;°C.", "är 3 °C och -10 °C."),
    ("of {{convert|93|m|ft|abbr=off|sp=us}} high", "of 93 m high"),
    ("The {{nihongo|'''J League'''|日本|lead=yes|extra=''N''}}, is", "The J League, is"),
    ("included {{quote|[[Louise Michel]], the}} and", "included Louise Michel, the and"),
    ("a {{open [[b]] {{c}} d\nThe {{lang|la|Homo}} is [[e|f]].", "a\nThe Homo is f."),
    ("vers {{unité|2000|m}} le {{date|1|mai|1900}} à", "vers 2000 m le 1 mai 1900 à")])
def test_wikitext_as_a_reader_sees_it(wikitext: str, plain: str) -> None:
    assert opening_text(wikitext) == plain


def test_few_real_openings_lose_a_word_inside_a_sentence(
        raw_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """19 of 96 did before templates were read. Pronunciations and footnotes are no words of the
    sentence, so they may go."""
    no_words = ("IPA|respell|refn|sfn|efn|rp\\b|ref\\b|cn\\b|by whom|citation|not verified|note|"
                "coord|anchor|increase|decrease")
    template_text = data._template_text

    def mark_what_vanishes(match: re.Match) -> str:
        text = template_text(match)
        is_word = not re.match(no_words, match[1].strip(), flags=re.I)
        return "\u2588" if text == data.VANISHED and is_word else text

    monkeypatch.setattr(data, "_template_text", mark_what_vanishes)
    with bz2.open(raw_data / "wikipedia/enwiki-excerpt-211-pages.xml.bz2") as file:
        found = [article_of(title, text) for title, text in iterate_pages([file.read()])]
    openings = [article.text for article in found if article]
    damaged = [text for text in openings if re.search(r"[^\W\u2588][^\n\u2588]*\u2588", text)]
    assert len(openings) >= 80
    assert len(damaged) <= 3
