"""Wikitext, dump XML, and articles drawn from a dump over the network, from a hand-made dump on loopback."""
from __future__ import annotations

import bz2
import hashlib
import json
import os
import random
import re
import time
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

import data
from data import Article, InputError, article_of, iterate_pages, opening_text, read_dump, wikimedia_articles
from loopback import Loopback

RAW_DATA = Path(os.environ.get("TLM_RAW_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
EXCERPT = RAW_DATA / "wikipedia" / "enwiki-excerpt-211-pages.xml.bz2"

# ---- wikitext ----


@pytest.mark.parametrize("wikitext, plain", [
    ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
    ("A [[town]] in [[Northern France|the north]], [[:Category:Towns|one]] of [[:France]].", "A town in the north, one of France."),
    ("[[File:a.jpg|thumb|A [[cat]] and {{nowrap|a [[dog]]}}]]Text.", "Text."),
    ("[[Image:a.jpg|b]][[image:c.png]][[Category:Towns]][[fr:Ville]][[zh-min-nan:Ville]]Text.", "Text."),
    ("[[CSI: Miami]] and [[2001: A Space Odyssey|2001]].", "CSI: Miami and 2001."),
    ("See [http://a.org/x?y=(z) the site] or [https://b.org].", "See the site or."),
    ("{{Infobox|a={{b|{{c}}}}|d=[[e|f]]|g=}}Text.", "Text."),
    ("{{Infobox\n| a = {{b|}}\n| c = {{d\n|}}\n|}}\nText.", "Text."),
    ("{|\n! a\n|-\n| {{b}}\n{| \n| inner\n|}\n|}\nText.", "Text."),
    ("A {{b|}}town {{c\n|}}by a river.", "A town by a river."),
    ("{{navbox|\n{|\n| a\n|}\n}}Text.", "Text."),
    ("<table><tr><td><table>a</table>b</td></tr></table>Text.", "Text."),
    ("<TABLE class=x>a</TABLE>Text.", "Text."),
    ("One<ref name=a/> two<ref>x <b>y</b></ref> three<ref name=\"b\" />.", "One two three."),
    ("One<REF group=n>{{cite|a=[[b]]}}</Ref> two.", "One two."),
    ("One<ref>x <ref name=y/> z</ref> two.", "One two."),
    ("One<!-- two <ref> {{ -->, three.", "One, three."),
    ("An area <math>\\{{x^2}</math>is<br />wide<gallery>a.jpg|b</gallery>.", "An area is wide."),
    ("H<sub>2</sub>O <small>is</small> <span style=\"x\">water</span>.", "H2O is water."),
    ("<nowiki>[[a]] {{b}}</nowiki> text.", "[[a]] {{b}} text."),
    ("__NOTOC__A &amp; B&nbsp;&ndash;&#32;C &#x41; &lt;d&gt;.", "A & B – C A <d>."),
    ("* one\n# two\n:; three\n*: four", "one\ntwo\nthree\nfour"),
    ("A\n\n== History ==\nB\n=== More ===\nC\n==References==\nD", "A"),
    ("'''Ana''' ({{lang-ru|A}}; born 1900) was.", "Ana (A; born 1900) was."),
    ("'''Ana''' ({{IPA|a}}), ({{b}} ; ) was, ( ) so.", "Ana, was, so."),
    ("'''Ana''' (1900–1950; {{IPA|x}}) was.", "Ana (1900–1950) was."),
    ("Call main() of  \t .NET .", "Call main() of .NET."),
    ("a\u00a0 b\n\n\n  c  \n", "a b\nc"),
    ("", ""),
    ("{{only|a template}}", ""),
])
def test_wikitext(wikitext, plain):
    assert opening_text(wikitext) == plain


@pytest.mark.parametrize("broken", [
    "{{Infobox\n| a = b\n| c = [[d]]\n", "{{Infobox\n| a = {{b}}\n}\n", "{|\n! a\n|-\n| b\n", "[[File:a.jpg|thumb|caption\n",
    "<!-- comment\n", "<ref>", "<ref name=a>", "<ref ", "<math>", "<table>\n", "<nowiki>", "}}", "]]", "|}\n", "</ref>", "</table>",
    "-->", "{{a|[[b}}", "<ref>{{cite</ref>", "[[a|[[b]]\n", "[http://a.org b\n", "{{a\n\n{{b}}\n\n<ref>c</ref>\n",
])
def test_broken_markup_does_not_cost_the_article(broken):
    text = opening_text(broken + "The town lies on a river. It is [[old|very old]].<ref>x</ref>\n\nIt is {{b}}big.")
    assert "The town lies on a river. It is very old.\nIt is big." in text
    assert not re.search(r"\{\{|\[\[|\]\]|\}\}|<ref|</", text)


def test_refs_that_are_closed_alone_do_not_swallow_what_follows():
    assert opening_text('A<ref name="x"/> town<ref name=y /> by a<ref>z</ref> river.') == "A town by a river."


def test_ref_never_closed_ends_where_the_next_begins():
    assert "river" in opening_text("A town<ref> by a river<ref>x</ref> and a hill.")
    assert opening_text("A town<ref> by a river<ref>x</ref> and a hill.").endswith("and a hill.")


def test_cut_at_a_word():
    words = "abcdefg " * 400
    for most in (1, 7, 8, 9, 100, 1200):
        text = opening_text(words, most)
        assert len(text) <= most and (words.startswith(text + " ") or most < 7)
    assert opening_text(words, 15) == "abcdefg abcdefg"
    assert opening_text("x" * 5000, 1200) == "x" * 1200
    assert opening_text("a b\nc d", 4) == "a b"


HOSTILE = ["{{", "[[", "<ref>", "<ref", "<!--", "<!-->", "{|", "|}", "}}", "]]", "[[File:", "[[a|", "[http:", "<math>", "<table>",
           "<table", "</table>", "<nowiki>", "&#", "(", "( ", ";", "''", "'", "=\n", "\n|", " ", "<", "[", "__A", "{{{|", "a\n"]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_wikitext_takes_linear_time(unit):
    begun = time.process_time()
    for wikitext in (unit * 200_000, "{{" * 39 + unit * 200_000):
        assert len(opening_text(wikitext)) <= 1200
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("wikitext", ["&#" + "9" * 100_000 + ";", "&#xD800; &#0; &#x110000; \ud800 \x00", "[http:" + "a" * 200_000,
                                      "<ref " + "a" * 200_000, "[[:" + " " * 200_000, "=" + " " * 200_000, "{{ " * 100_000, "{{disambig" + " " * 200_000])
def test_strange_wikitext_never_raises(wikitext):
    begun = time.process_time()
    article_of("A", wikitext)
    opening_text(wikitext, 10_000)
    assert time.process_time() - begun < 2


def test_random_markup_never_raises():
    draw = random.Random(0)
    marks = HOSTILE + ["a", " ", "\n", "</ref>", "-->", "|", "b]]", "</nowiki>", "{{disambig}}", "<ref/>", "File:"]
    for _ in range(2000):
        text = opening_text("".join(draw.choices(marks, k=draw.randrange(60))), 50)
        assert len(text) <= 50


# ---- pages and articles ----

PROSE = "'''{0}''' is a [[town]] on a river in the north of the country. " + "It is known for its old bridge and the market. " * 5


def page(title: str, text: str, ns: int = 0, redirect: bool = False) -> str:
    mark = '<redirect title="X" />' if redirect else ""
    return (f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{ns}</ns>\n    <id>1</id>{mark}\n    <revision>\n"
            f'      <text bytes="1" xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n')


HEADER = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo><sitename>W</sitename></siteinfo>\n'
PAGES = (page("A & B", "one < two é") + page("Talk:A", "x", ns=1) + page("R", "#REDIRECT [[X]]", redirect=True)
         + "<page><title>Bad</title><ns>0</ns><revision><text>a & b</text></revision></page>" + page("C", ""))


@pytest.mark.parametrize("size", [1, 3, 7, 100, 1 << 20])
@pytest.mark.parametrize("xml", [PAGES, HEADER + PAGES + "</mediawiki>", PAGES + "  <page>\n <title>Cut"])
def test_pages(xml, size):
    raw = xml.encode()
    chunks = (raw[i:i + size] for i in range(0, len(raw), size))
    assert list(iterate_pages(chunks)) == [("A & B", "one < two é"), ("C", "")]


def test_pages_that_are_too_long_are_passed_over_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(data, "MOST_PAGE_BYTES", 2000)
    for long in (2000, 20_000):
        raw = (page("A", "a") + page("Long", "x" * long) + page("B", "b")).encode()
        for size in (10, 1000, 50_000):
            assert [title for title, _ in iterate_pages(raw[i:i + size] for i in range(0, len(raw), size))] == ["A", "B"]

    import tracemalloc
    tracemalloc.start()
    assert list(iterate_pages([b"<page>"] + [b"x" * 1000] * 5000)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_long_pages_in_small_chunks_take_linear_time():
    begun = time.process_time()
    raw = page("A", "x" * 3_000_000).encode()
    assert len(list(iterate_pages(raw[i:i + 200] for i in range(0, len(raw), 200)))) == 1
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("title, wikitext, kept", [
    ("Aa", PROSE, True),
    ("Aa", "too short", False),
    ("List of towns", PROSE, False),
    ("Listing of towns", PROSE, True),
    ("Aa (disambiguation)", PROSE, False),
    ("Aa", PROSE + "{{disambig}}", False),
    ("Aa", PROSE + "{{ Disambiguation |geo}}", False),
    ("Aa", PROSE + "{{Human name disambiguation}}", False),
    ("Aa", PROSE + "{{hndis|name=A}}", False),
    ("Aa", PROSE + "{{Geodis}}", False),
    ("Aa", "{{other uses|Aa (disambiguation)}}" + PROSE + "{{disambiguation needed|date=May}}", True),
])
def test_article_of(title, wikitext, kept):
    article = article_of(title, wikitext)
    assert (article is not None) == kept
    assert not kept or (article.title, article.wiki) == (title, "") and len(article.text) >= 200


@pytest.mark.parametrize("name", ["d.xml", "d.xml.bz2", "multistream.xml.bz2"])
def test_read_dump(tmp_path, name):
    parts = [HEADER] + [page(title, PROSE.format(title)) for title in "ABC"] + ["</mediawiki>"]
    raw = "".join(parts).encode()
    if name.startswith("multi"):
        raw = b"".join(bz2.compress(part.encode()) for part in parts)
    elif name.endswith(".bz2"):
        raw = bz2.compress(raw)
    (tmp_path / name).write_bytes(raw)
    articles = list(read_dump(tmp_path / name))
    assert [article.title for article in articles] == ["A", "B", "C"]
    assert articles[0].text.startswith("A is a town on a river")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: raw[:60] + b"xxxx" + raw[64:], lambda raw: b"not bz2" + raw])
def test_damaged_dump(tmp_path, damage):
    raw = bz2.compress(page("A", PROSE).encode())
    (tmp_path / "d.xml.bz2").write_bytes(damage(raw))
    with pytest.raises(InputError, match=r"d\.xml\.bz2 cannot be read"):
        list(read_dump(tmp_path / "d.xml.bz2"))


@pytest.mark.skipif(not EXCERPT.exists(), reason="the dump excerpt is not there")
def test_real_pages_come_out_clean():
    with bz2.open(EXCERPT) as file:
        pages = list(iterate_pages([file.read()]))
    assert len(pages) == 106
    begun = time.process_time()
    openings = {title: opening_text(wikitext) for title, wikitext in pages}
    assert (time.process_time() - begun) / len(pages) < 0.02  # seconds a page; about 0.003 on a common machine
    for title, text in openings.items():
        left_over = re.search(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|<ref|</?\w+>|''|\(\)|\( |\(;| \)|\[http|__|  | ,|&\w+;|^[=|*#:]", text, re.M)
        assert not left_over, (title, left_over)
    assert sum(len(text) > 1000 for text in openings.values()) >= 60
    assert openings["Anarchism"].startswith("Anarchism is a political philosophy that advocates self-governed societies based on "
                                            "voluntary institutions. These are often described as stateless societies, although")
    articles = list(read_dump(EXCERPT))
    assert 90 <= len(articles) <= 100 and not any("may refer to" in article.text[:100] for article in articles)


# ---- random articles over the network ----

PATH = "/simplewiki/20240801/simplewiki-20240801-pages-articles-multistream"
DUMP, INDEX = PATH + ".xml.bz2", PATH + "-index.txt.bz2"
STREAMS, ARTICLES_A_STREAM = 12, 5


def publish(server: Loopback) -> list[int]:
    """Puts a dump of 12 streams (5 articles, a redirect and a template page each) on the server; where they begin."""
    dump, index, offsets = bz2.compress(HEADER.encode()), [], []
    for stream in range(STREAMS):
        titles = [f"Town {stream}-{number}" for number in range(ARTICLES_A_STREAM)]
        pages = [page(title, PROSE.format(title)) for title in titles]
        pages[2:2] = [page("Way", "#REDIRECT [[X]]" + PROSE, redirect=True), page("Template:T", PROSE, ns=10)]
        offsets.append(len(dump))
        index += [f"{len(dump)}:{number}:Title: with colons\n" for number in range(len(pages))]
        dump += bz2.compress("".join(pages).encode())
    dump += bz2.compress(b"</mediawiki>")
    files = {DUMP: dump, INDEX: bz2.compress("".join(index).encode())}
    listed = {path.rpartition("/")[2]: {"size": len(body), "url": path, "md5": "", "sha1": hashlib.sha1(body).hexdigest()}
              for path, body in files.items()}
    done = {"jobs": {"articlesmultistreamdump": {"status": "done", "files": listed}}}
    begun = {"jobs": {"articlesmultistreamdump": {"status": "in-progress", "files": listed},
                      "articlesmultistreamdumprecombine": {"status": "waiting"}}}
    server.files |= files | {
        "/simplewiki/": b'<a href="../">../</a><a href="20240701/">20240701/</a>\n<a href="20240801/">20240801/</a>\n'
                        b'<a href="20240820/">20240820/</a><a href="20240901/">20240901/</a><a href="latest/">latest/</a>',
        "/simplewiki/20240701/dumpstatus.json": json.dumps(done).encode(),
        "/simplewiki/20240801/dumpstatus.json": json.dumps(done).encode(),
        "/simplewiki/20240820/dumpstatus.json": json.dumps(begun).encode(),  # and that of 20240901 is not there yet
    }
    return offsets


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", (2.0, 1.0))
    with Loopback() as loopback:
        publish(loopback)
        monkeypatch.setattr(data, "WIKIMEDIA", loopback.url)
        yield loopback


def draw(server: Loopback, folder: Path, count: int, seed: int = 42) -> list[Article]:
    return wikimedia_articles("simplewiki", count, folder, seed)


def test_random_articles(server, tmp_path):
    articles = draw(server, tmp_path, STREAMS * ARTICLES_A_STREAM)
    assert {article.title for article in articles} == {f"Town {i}-{j}" for i in range(STREAMS) for j in range(ARTICLES_A_STREAM)}
    assert len(articles) == STREAMS * ARTICLES_A_STREAM
    assert articles[0].text.startswith(f"{articles[0].title} is a town on a river") and articles[0].wiki == "simple"
    streams = [int(article.title[5:].split("-")[0]) for article in articles[::ARTICLES_A_STREAM]]
    assert streams != sorted(streams)
    sidecar = json.loads((tmp_path / "wikipedia" / "simplewiki-dump.json").read_text())
    assert sidecar["date"] == "20240801" and sidecar["dump"]["url"] == server.url + DUMP
    assert sidecar["dump"]["sha1"] == hashlib.sha1(server.files[DUMP]).hexdigest()
    assert len(server.asked(DUMP)) == STREAMS + 1 and all(request.range for request in server.asked(DUMP))


def test_a_smaller_count_is_the_beginning_of_a_larger_one(server, tmp_path):
    few, many = draw(server, tmp_path / "a", 7), draw(server, tmp_path / "b", 31)
    assert len(few) == 7 and len(many) == 31 and many[:7] == few
    assert draw(server, tmp_path / "a", 31) == many  # grown from the smaller one
    assert draw(server, tmp_path / "b", 3) == many[:3]
    assert draw(server, tmp_path / "c", 31, seed=7) != many


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    many = draw(server, tmp_path, 20)
    server.requests.clear()
    assert draw(server, tmp_path, 20) == many and server.requests == []
    assert len(draw(server, tmp_path, 35)) == 35
    assert {request.path for request in server.requests} == {DUMP}  # no listing, no index


@pytest.mark.parametrize("damage", ["", "cut short", "left over"])
def test_interrupted_run_goes_on_where_it_was(server, tmp_path, damage):
    whole = draw(server, tmp_path / "whole", 40)
    ranges = [request.range for request in server.asked(DUMP)]
    server.requests.clear()
    server.behaviours[DUMP] = ["ok"] * 5 + ["404"] * 8
    with pytest.raises(InputError, match="status 404.*simplewiki-dump.json"):
        draw(server, tmp_path / "cut", 40)
    streams = tmp_path / "cut" / "wikipedia" / "simplewiki-20240801"
    files = sorted(streams.iterdir())
    assert len(files) == 5 and all(path.suffix == ".bz2" and bz2.decompress(path.read_bytes()) for path in files)
    if damage == "cut short":
        files[-1].write_bytes(files[-1].read_bytes()[:50])
    if damage == "left over":
        (streams / "123.bz2.77.tmp").write_bytes(b"half")
    server.requests.clear()
    server.behaviours.clear()
    assert draw(server, tmp_path / "cut", 40) == whole
    assert len(server.asked(DUMP)) == len(ranges) - 5 + (damage == "cut short")


def test_two_connections_and_no_more(server, tmp_path):
    server.delay = 0.03
    draw(server, tmp_path, STREAMS * ARTICLES_A_STREAM)
    assert server.most_at_once == 2
    assert len({request.connection for request in server.asked(DUMP)[1:]}) == 2
    assert all("tiny-language-models" in request.user_agent for request in server.requests)


@pytest.mark.parametrize("word", ["corrupt", "short", "503", "wrong range"])
def test_damaged_streams_are_fetched_again(server, tmp_path, word):
    server.behaviours[DUMP] = ["ok", word]
    assert len(draw(server, tmp_path, 60)) == 60
    assert len(server.asked(DUMP)) == STREAMS + 2


def test_streams_that_stay_damaged(server, tmp_path):
    raw = server.files[DUMP]
    server.files[DUMP] = b"\0" * len(raw)
    with pytest.raises(InputError, match="damaged twice"):
        draw(server, tmp_path, 10)


def test_server_that_ignores_ranges(server, tmp_path):
    server.behaviours[DUMP] = ["no ranges"] * 10
    with pytest.raises(InputError, match="does not give the bytes"):
        draw(server, tmp_path, 10)


def test_damaged_index_is_not_used(server, tmp_path):
    server.behaviours[INDEX] = ["corrupt"]
    with pytest.raises(InputError, match="wrong file"):
        draw(server, tmp_path, 10)
    assert len(draw(server, tmp_path, 10)) == 10


def test_more_than_there_are(server, tmp_path):
    assert len(draw(server, tmp_path, 61)) == len(draw(server, tmp_path, 60)) == 60


def test_the_dump_stays_the_same_when_a_newer_one_appears(server, tmp_path):
    few = draw(server, tmp_path, 5)
    server.files["/simplewiki/20240820/dumpstatus.json"] = server.files["/simplewiki/20240801/dumpstatus.json"].replace(
        b"20240801", b"20240820")
    assert draw(server, tmp_path, 40)[:5] == few
    with pytest.raises(InputError, match="20240820.*simplewiki-dump.json"):
        draw(server, tmp_path / "new", 5)  # which is what a new folder would take


@pytest.mark.parametrize("job, other", [("articlesmultistreamdumprecombine", "articlesmultistreamdump"),
                                        ("articlesmultistreamdump", "articlesmultistreamdumprecombine")])
def test_either_job_will_do(server, tmp_path, job, other):
    """Of a large wiki, one job makes parts and the other joins them; of a small one, one job makes the whole."""
    status = "/simplewiki/20240801/dumpstatus.json"
    files = json.loads(server.files[status])["jobs"]["articlesmultistreamdump"]["files"]
    parts = {"status": "done", "files": {"simplewiki-20240801-pages-articles-multistream1.xml-p1p9.bz2": {"size": 1}}}
    server.files[status] = json.dumps({"jobs": {job: {"status": "done", "files": files}, other: parts}}).encode()
    assert len(draw(server, tmp_path, 5)) == 5
    assert json.loads((tmp_path / "wikipedia" / "simplewiki-dump.json").read_text())["date"] == "20240801"


def test_no_finished_dump(server, tmp_path):
    server.files["/simplewiki/"] = b'<a href="20240820/">20240820/</a>'
    with pytest.raises(InputError, match="no finished dump"):
        draw(server, tmp_path, 5)


def test_no_network_names_the_place_for_a_dump(tmp_path, server, monkeypatch):
    with Loopback() as gone:
        monkeypatch.setattr(data, "WIKIMEDIA", gone.url)
    with pytest.raises(InputError, match=r"simplewiki-DATE-pages-articles\.xml\.bz2 by hand.*package index$"):
        draw(gone, tmp_path, 5)


@pytest.mark.parametrize("place", [".", "wikipedia"])
def test_a_dump_on_disk_is_used_instead(server, tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "simplewiki-20240801-pages-articles-multistream.xml.bz2").write_bytes(server.files[DUMP])
    (tmp_path / place / "simplewiki-20240901-pages-articles.xml.bz2.part").write_bytes(b"an unfinished one")
    many = draw(server, tmp_path, 30)
    assert len({article.title for article in many}) == 30 and many[0].wiki == "simple"
    assert draw(server, tmp_path, 10) == many[:10] and draw(server, tmp_path, 30, seed=1) != many
    assert [article.title for article in many] != sorted(article.title for article in many)
    assert {article.title[:7] for article in many} > {"Town 11"}  # from all of the file, not from its beginning
    assert len(draw(server, tmp_path, 61)) == 60 and server.requests == []


def test_an_opening_without_blanks_is_kept():
    assert len(opening_text("東京 " + "字" * 3000)) == 1200
