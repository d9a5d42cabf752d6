"""The bodies that requests may have, their limits, and errors in OpenAI's form.

Our own knobs are extra fields beside OpenAI's; the official client sends them with `extra_body`. An unknown field of a body is an error, so
that a misspelt knob does not go unnoticed. OpenAI's fields that cannot change an answer here (quality, user, ...) are accepted and ignored.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, WithJsonSchema, model_validator

PROMPT_CHARACTERS = 100_000  # a first bound; the model's own limit, in tokens, is checked when a request is prepared
PARTS = 1000  # of one message: millions of tiny parts would take far more memory than their JSON


@dataclass(frozen=True)
class Limits:
    """What one server accepts. A request beyond a limit gets a 4xx before any work is done."""

    body_bytes: int = 64 * 2**20
    bodies_bytes: int = 512 * 2**20  # of all unanswered requests together: a body is kept until its request is answered
    body_seconds: float = 60.0  # the longest wait for the next piece of a body
    json_values: int = 200_000  # in a JSON body: small values take far more memory than their text
    image_pixels: int = 4096 * 4096  # of one uploaded picture
    images: int = 16  # pictures in one request
    n: int = 10  # results of one request
    max_tokens: int = 4096  # of an answer or a plan
    steps: int = 1000  # denoising steps
    waiting: int = 64  # pictures and answers in the queue; beyond it: 429
    live: int = 32  # connections to /v1/live
    batch: int = 8  # pictures or answers that share forward passes; of pictures no more than the model draws together


def _sendable(text: str) -> str:
    """The text with lone surrogates replaced: a client may send one in JSON, but UTF-8 cannot encode it in an answer."""
    return text.encode(errors="replace").decode()


class ApiError(Exception):
    """A refusal or failure as OpenAI's API reports it: an HTTP status, and a body with message, type, param and code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(_sendable(message))
        self.status, self.type, self.code, self.headers = status, type, code, headers or {}
        self.param = None if param is None else _sendable(param)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every 4xx and 5xx answer."""

    error: ErrorDetail


class Strict(BaseModel):
    """Refuses unknown fields, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


Time = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0, lt=1000)]


class Knobs(Strict):
    """Our own fields. Where one is absent, the default of the model (or the student) holds."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """A null asks for nothing, whatever its field: client libraries write them for fields of OpenAI's that are unknown here."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the first result; the next ones take seed + 1, ...")
    think: bool | None = Field(None, description="Let the model write its plan first.")
    student: str | None = Field(None, max_length=64, description="Distilled weights that draw: a name from /v1/models, or 'none'.")
    steps: int | None = Field(None, ge=1, description="Denoising steps.")
    text_scale: Scale | None = Field(None, description="Guidance towards the text; 1 is none.")
    image_scale: Scale | None = Field(None, description="Guidance towards the source picture; 1 is none.")
    interval: tuple[Time, Time] | None = Field(None, description="Times [LO, HI] in [0, 1] between which guidance acts.")
    renorm: Literal["global", "channel", "text_channel"] | None = Field(None, description="How the guided velocity gets back its length.")
    renorm_min: Time | None = Field(None, description="Lowest factor of that renormalisation.")
    shift: Scale | None = Field(None, description="Timestep shift; above 1 spends more steps on noisy times.")
    max_think_tokens: int | None = Field(None, ge=1, description="Longest plan of a picture, in tokens.")
    think_temperature: float | None = Field(None, ge=0, le=100, description="Of a picture's plan; above 0 other seeds give other plans.")
    drafter: str | None = Field(
        None,
        max_length=64,
        description="Who drafts text (answers, plans) ahead: auto, lookup, one of /v1/models, or none. Chains also change sampled answers.",
    )


class Ignored(Strict):
    """OpenAI's fields that cannot change an answer here."""

    user: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")
    metadata: Any = Field(None, description="Ignored.")


class Neutral:
    """Annotates a field of OpenAI's that has no effect here: it may only be null or hold one of the values that ask for nothing."""

    def __init__(self, *values: Any, instead: str = "leave it out") -> None:
        """instead: the error's advice for any other value."""
        self.choices, self.instead = (*values, None), instead

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[Any, BeforeValidator(self._check), WithJsonSchema({"enum": [*self.choices]})])

    def _check(self, value: Any) -> None:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.choices):  # true is not 1 here
            expected = " or ".join(json.dumps(one) for one in self.choices)
            raise ValueError(f"got {reprlib.repr(value)}, expected {expected}; {self.instead}")


class ImageFields(Knobs, Ignored):
    """What generations and edits share."""

    model: str | None = Field(None, description="A name from /v1/models.")
    prompt: str = Field(min_length=1, max_length=PROMPT_CHARACTERS)
    n: int | None = Field(None, ge=1, description="Number of pictures.")
    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT, or auto.", examples=["512x512"])
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url gives a data: URL.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="A PNG carries its settings.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool | None = Field(None, description="Server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews in a stream.")
    progress: bool | None = Field(None, description="In a stream, an event after each denoising step too.")
    quality: Any = Field(None, description="Ignored.")
    style: Any = Field(None, description="Ignored.")
    background: Any = Field(None, description="Ignored.")
    moderation: Any = Field(None, description="Ignored.")


class GenerationBody(ImageFields):
    """POST /v1/images/generations"""


class EditFields(ImageFields):
    """POST /v1/images/edits, besides its files."""

    input_fidelity: Any = Field(None, description="Ignored.")


class Loose(BaseModel):
    """Ignores unknown fields: what clients put into messages beside the words (cache_control, ids) changes no answer."""

    model_config = ConfigDict(extra="ignore")


class ImageUrl(Loose):
    url: str = Field(description="A data: URL.")
    detail: Any = Field(None, description="Ignored.")


class Part(Loose):
    """A piece of a message's content."""

    type: Literal["text", "image_url"]
    text: str | None = Field(None, max_length=PROMPT_CHARACTERS)
    image_url: ImageUrl | None = None


class SentPicture(Loose):
    """A picture of an earlier answer; the other facts of its entry (seed, nfe) are ignored."""

    type: Literal["image_url"] = "image_url"
    image_url: ImageUrl


class Message(Loose):
    """One turn. An assistant's message may be sent back exactly as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=PROMPT_CHARACTERS)] | Annotated[list[Part], Field(max_length=PARTS)] | None = None
    images: list[SentPicture] | None = Field(None, max_length=PARTS, description="Pictures of an assistant's earlier answer.")


class StreamOptions(Loose):
    include_usage: bool | None = None


StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatBody(Knobs, Ignored):
    """POST /v1/chat/completions"""

    model: str | None = Field(None, description="A name from /v1/models.")
    messages: list[Message] = Field(min_length=1, max_length=1000)
    n: int | None = Field(None, ge=1, description="Number of answers.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer, in tokens, thinking included; else up to 1024.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens.")
    temperature: float | None = Field(None, ge=0, le=100, description="0, the default, always takes the likeliest token.")
    top_p: float | None = Field(
        None, strict=True, ge=0, le=1, description="Above temperature 0: only the likeliest tokens that make up this much."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = Field(
        None, description="Up to four texts; the answer ends before the first one. A thought may hold them."
    )
    modalities: list[Literal["text", "image"]] | None = Field(None, max_length=10, description="With 'image' the answer is a picture.")
    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT of a picture that is drawn.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Client libraries send the neutral values of these fields by themselves. Any other value is refused, as it would have no effect.
    presence_penalty: Annotated[Any, Neutral(0)] = None
    frequency_penalty: Annotated[Any, Neutral(0)] = None
    logit_bias: Annotated[Any, Neutral({})] = None
    logprobs: Annotated[Any, Neutral(False)] = None
    top_logprobs: Annotated[Any, Neutral(0)] = None
    response_format: Annotated[Any, Neutral({"type": "text"}, instead="leave it out, and ask for the form in the message")] = None
    tools: Annotated[Any, Neutral([], instead="leave it out, this model calls none")] = None
    tool_choice: Annotated[Any, Neutral("none", "auto", instead="leave it out, this model calls no tools")] = None
    functions: Annotated[Any, Neutral([], instead="leave it out, this model calls none")] = None
    function_call: Annotated[Any, Neutral("none", "auto", instead="leave it out, this model calls no functions")] = None
    reasoning_effort: Annotated[Any, Neutral("none", instead="leave it out, and set think")] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    parallel_tool_calls: bool | None = Field(None, description="Ignored: this model calls no tools.")
    store: Any = Field(None, description="Ignored.")
    service_tier: Any = Field(None, description="Ignored.")
    prompt_cache_key: Any = Field(None, description="Ignored.")
    prompt_cache_retention: Any = Field(None, description="Ignored.")
