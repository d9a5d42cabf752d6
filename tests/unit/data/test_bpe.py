"""The tokenizer: round trips, streaming, damage, and the shipped vocabulary."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

import hyperbagel
from hyperbagel.core.errors import InputError
from hyperbagel.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from hyperbagel.data.toybox_tokenizer import build_tokenizer, corpus
from hyperbagel.toybox.vocabulary import BACKGROUNDS, COLOURS, NOUNS

SHIPPED = Path(hyperbagel.__file__).parent / "assets" / "toybox"
TEXTS = [
    "",
    "a red car",
    " Émile 42\n\n<think> x </think>",
    "你好 world",
    "👩‍👩‍👧 ok\t\r\n  end ",
    "it's 'quoted' – naïve Ünïcödé",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(SHIPPED)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_round_trip_of_any_characters(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(128)))) for _ in range(12))
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == unicodedata.normalize("NFC", text)
    assert not any("\ufffd" in p for p in pieces)


def test_stream_that_stops_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你")
    assert len(ids) == 3
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids[:2]] == ["", ""]
    assert stream.finish() == "\ufffd" == tokenizer.decode(ids[:2])


def test_stream_equals_decode_for_any_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(1030) for _ in range(30)]  # beyond the vocabulary too
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_broken_unicode_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="position 2"):
        tokenizer.encode("a \ud800 b")


def test_shipped_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1024
    assert len(tokenizer.special_ids) == len(SPECIAL_TOKENS) == 11
    for word in (*NOUNS, *COLOURS, *BACKGROUNDS):
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(" " + word)) == 1, word
    texts = list(corpus(99, 100))
    assert sum(len(tokenizer.encode(t)) for t in texts) < 1.25 * sum(len(t.split()) for t in texts)
    vocab = json.loads((SHIPPED / "vocab.json").read_text())
    assert len(vocab) == 1024 - 11 and sorted(vocab.values()) == list(range(1013))


def test_recipe_is_deterministic(tmp_path: Path) -> None:
    build_tokenizer(tmp_path / "a", seed=3, samples=40)
    build_tokenizer(tmp_path / "b", seed=3, samples=40)
    names = ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_special_tokens_are_found_by_content(tmp_path: Path) -> None:
    small = train_bpe(["a b c"] * 3, 280, tmp_path)
    assert small.encode("<|im_start|>a<|im_end|>")[0] == small.im_start != Tokenizer.from_folder(SHIPPED).im_start
    assert small.decode([small.vision_start, small.vision_end]) == "<|vision_start|><|vision_end|>"


def test_damaged_or_foreign_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        Tokenizer.from_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(SHIPPED / "tokenizer.json", path)
    path.write_text(path.read_text().replace("<|vision_start|>", "<|picture|>"))
    with pytest.raises(InputError, match="vision_start"):
        Tokenizer.from_folder(tmp_path)
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    with pytest.raises(InputError, match="WordLevel"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(InputError, match="267"):
        train_bpe(["a"], 100, tmp_path)
