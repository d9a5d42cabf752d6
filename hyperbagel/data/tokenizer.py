"""Byte-level BPE in Qwen2.5's format: reading a tokenizer, streaming text from it, and training a small one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
# Qwen2.5's pre-tokenizer: contractions, words with one leading sign or space, single digits, runs of punctuation, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table, used by Qwen)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to ids and back.

    A special token that is spelt out in a text becomes its id, as in the reference. Text comes back as it went in, but in NFC form.
    Raises InputError (naming `origin`) without BAGEL's special tokens or the byte alphabet.
    """

    def __init__(self, backend: tokenizers.Tokenizer, origin: str) -> None:
        self._backend = backend
        alphabet = byte_alphabet()
        wanted = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", *alphabet)
        ids = {token: i for token in wanted if (i := backend.token_to_id(token)) is not None}
        missing = [token for token in wanted if token not in ids]
        if missing:
            raise InputError(
                f"{origin}: got a tokenizer without {missing[0]!r}, expected Qwen2.5's byte-level BPE with BAGEL's special tokens; "
                "copy tokenizer.json from the model's own folder"
            )
        self.im_start, self.im_end = ids["<|im_start|>"], ids["<|im_end|>"]
        self.vision_start, self.vision_end = ids["<|vision_start|>"], ids["<|vision_end|>"]
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.largest_id = max(backend.get_vocab(with_added_tokens=True).values())
        self._alphabet = alphabet

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a model folder. Raises InputError if tokenizer.json is missing, damaged or of another kind."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: missing, expected a tokenizer in Qwen2.5's format; copy it from the model's own folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: got a file that is no tokenizer ({error}), expected Qwen2.5's format; copy it again") from error
        if not isinstance(backend.model, models.BPE):
            raise InputError(f"{path}: got a {type(backend.model).__name__} tokenizer, expected byte-level BPE; use the model's own file")
        return cls(backend, str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added around it. Raises InputError for text that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"got text with a broken character at position {error.start}, expected valid Unicode; remove it") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelt out; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Ids beyond the vocabulary (padding rows of the embedding) have none."""
        content = self._backend.id_to_token(token)
        if content is None:
            return b""
        if token in self.special_ids or any(c not in self._alphabet for c in content):
            return content.encode()
        return bytes(self._alphabet[c] for c in content)

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Turns tokens into text as they arrive: a character comes out once all its bytes are in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The new text that this token completes, often "" or more than one character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left at the end: "" unless the ids ended inside a character."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path | str) -> Tokenizer:
    """Learn a vocabulary of at most `vocab_size` entries, the eleven special tokens included, and write its files into `folder`:
    tokenizer.json, tokenizer_config.json, vocab.json and merges.txt (the last two for readers of Qwen's older format).

    The same texts in the same order give the same files. Raises InputError if the size leaves no room for all bytes.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise InputError(f"got vocab_size {vocab_size}, expected at least {least} (256 bytes and the special tokens); raise it")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False, initial_alphabet=list(byte_alphabet()))
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    _write(backend, Path(folder))
    return Tokenizer.from_folder(folder)


def _write(backend: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(backend.to_str())
    added = {
        str(t["id"]): {k: t[k] for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for t in raw["added_tokens"]
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    merges = [" ".join(m) if isinstance(m, list) else m for m in raw["model"]["merges"]]
    for name, text in (
        ("tokenizer.json", json.dumps(raw, ensure_ascii=False, separators=(",", ":"))),
        ("tokenizer_config.json", json.dumps(config, indent=2)),
        ("vocab.json", json.dumps(raw["model"]["vocab"], ensure_ascii=False, separators=(",", ":"))),
        ("merges.txt", "\n".join(["#version: 0.2", *merges])),
    ):
        atomic_write_text(folder / name, text + "\n")
