"""Ids and text against the reference's tokenizer, special tokens in the text included."""

import json

from archive import GOLDEN, TINY

from hyperbagel.data.tokenizer import Tokenizer


def test_ids_and_text() -> None:
    golden = json.loads((GOLDEN / "fp32" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_folder(TINY)
    assert len(golden["cases"]) == 8
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_special_tokens() -> None:
    special = json.loads((GOLDEN / "fp32" / "tokenizer.json").read_text(encoding="utf-8"))["special"]
    tokenizer = Tokenizer.from_folder(TINY)
    assert tokenizer.im_start == special["bos_token_id"] and tokenizer.im_end == special["eos_token_id"]
    assert tokenizer.vision_start == special["start_of_image"] and tokenizer.vision_end == special["end_of_image"]
