"""What a drafter is: its kind, its shape, and the target it was made for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hyperbagel.core.config import Config, check_config
from hyperbagel.core.errors import InputError
from hyperbagel.model.config import LLMConfig

Kind = Literal["eagle3", "hyper-bagel", "block"]


class DrafterConfig(Config):
    """`drafter.json`. The fields from `hidden_size` to `target_layers` are the target's."""

    kind: Kind
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    rope_theta: float = Field(gt=0)
    eps: float = Field(gt=0)
    vocab_size: int = Field(ge=2)
    target_layers: int = Field(ge=1)
    layers: int = Field(default=1, ge=1)  # draft layers; EAGLE-3 has one, Hyper-Bagel two
    queries: int = Field(default=3, ge=1)  # hyper-bagel: meta queries Q; the skip connection carries three features
    zero_init: bool = True  # hyper-bagel: last projections start at zero
    block: int = Field(default=8, ge=1)  # block: tokens of one pass
    rank: int = Field(default=64, ge=1)  # block: of the Markov head
    draft_vocab: int | None = Field(default=None, ge=1)  # eagle3: tokens that can be drafted; None: all

    @model_validator(mode="after")
    def _fits(self) -> DrafterConfig:
        if self.kind == "eagle3" and self.layers != 1:
            raise ValueError(f"layers: got {self.layers} for eagle3, expected 1")
        if self.kind == "hyper-bagel" and self.queries != 3:
            raise ValueError(f"queries: got {self.queries}, expected 3 (low, middle, high)")
        if self.draft_vocab is not None and (self.kind != "eagle3" or self.draft_vocab > self.vocab_size):
            raise ValueError(f"draft_vocab: got {self.draft_vocab}, expected at most the vocabulary, and only for eagle3")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def levels(self) -> tuple[int, int, int]:
        """Low, middle, high: EAGLE-3 reads the hidden states that ENTER layers 2, L // 2 and L - 3."""
        n = self.target_layers
        return min(2, n), n // 2, max(n - 3, 0)

    @classmethod
    def for_target(cls, kind: Kind, llm: LLMConfig, **own: object) -> DrafterConfig:
        """The config of a drafter of this kind for this target; `own`: the kind's own settings. Raises InputError if they do not fit."""
        default = {"layers": 2} if kind == "hyper-bagel" else {}
        values = {
            "kind": kind,
            "hidden_size": llm.hidden_size,
            "intermediate_size": llm.intermediate_size,
            "heads": llm.num_attention_heads,
            "kv_heads": llm.num_key_value_heads,
            "rope_theta": llm.rope_theta,
            "eps": llm.rms_norm_eps,
            "vocab_size": llm.vocab_size,
            "target_layers": llm.num_hidden_layers,
        }
        if fixed := sorted(own.keys() & values.keys()):
            raise InputError(f"drafter: got {fixed[0]}, which is the target's, expected a drafter's own settings, leave it out")
        return check_config(cls, {**values, **default, **own}, "drafter")

    def check_target(self, llm: LLMConfig, name: str = "drafter") -> None:
        """Raises InputError if the drafter was made for another target."""
        pairs = {
            "hidden size": (self.hidden_size, llm.hidden_size),
            "vocabulary": (self.vocab_size, llm.vocab_size),
            "layers": (self.target_layers, llm.num_hidden_layers),
            "heads": ((self.heads, self.kv_heads), (llm.num_attention_heads, llm.num_key_value_heads)),
        }
        wrong = [f"{key} {mine} (the model has {theirs})" for key, (mine, theirs) in pairs.items() if mine != theirs]
        if wrong:
            raise InputError(f"{name}: got a drafter for another model: {', '.join(wrong)}; expected one trained for this model, use that")
