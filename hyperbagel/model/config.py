"""Shapes of a BAGEL checkpoint. The defaults are BAGEL-7B-MoT's, also where the reference hard-codes a value."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import read_json

T = TypeVar("T", bound=BaseModel)
Count = Annotated[int, Field(ge=1, le=2**24)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Shape(BaseModel):
    # A checkpoint's JSON files carry many keys of its training framework: extra keys are not mistakes.
    model_config = ConfigDict(extra="ignore", frozen=True)


class LLMConfig(_Shape):
    """`llm_config.json`: a Qwen2 shape, used twice (understanding and generation expert)."""

    hidden_size: Count = 3584
    intermediate_size: Count = 18944
    num_hidden_layers: Count = 28
    num_attention_heads: Count = 28
    num_key_value_heads: Count = 4
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1e6
    vocab_size: Count = 152064
    max_position_embeddings: Count = 32768

    @model_validator(mode="before")
    @classmethod
    def _newer_form(cls, value: Any) -> Any:
        """transformers 5 writes the rotary base one level down; both forms can ask for stretched positions, which are not run here."""
        nested = value.get("rope_parameters") or value.get("rope_scaling") if isinstance(value, dict) else None
        if not isinstance(nested, dict):
            return value
        if (kind := nested.get("rope_type", nested.get("type", "default"))) != "default":
            raise ValueError(f"got rope_type {kind!r}, expected 'default', all that is run here")
        return {"rope_theta": nested.get("rope_theta", cls.model_fields["rope_theta"].default)} | value

    @model_validator(mode="after")
    def _heads_fit(self) -> LLMConfig:
        e, h, k = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if e % (2 * h) or h % k:  # RoPE turns pairs of a head's values
            raise ValueError(f"got {h} heads over {k} for hidden_size {e}, expected an even width a head, and heads shared evenly")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class ViTConfig(_Shape):
    """`vit_config.json`: a SigLIP shape. The file counts one layer more than BAGEL uses."""

    hidden_size: Count = 1152
    intermediate_size: Count = 4304
    num_hidden_layers: Count = 27
    num_attention_heads: Count = 16
    num_channels: Count = 3
    image_size: Count = 980
    patch_size: Count = 14
    layer_norm_eps: Positive = 1e-6

    @model_validator(mode="after")
    def _sizes_fit(self) -> ViTConfig:
        if self.hidden_size % self.num_attention_heads or self.patch_size > self.image_size:
            raise ValueError(
                f"got {self.num_attention_heads} heads for hidden_size {self.hidden_size} and patches of {self.patch_size} in pictures of "
                f"{self.image_size}, expected heads that divide it and patches that fit"
            )
        return self

    @property
    def layers_used(self) -> int:
        return self.num_hidden_layers - 1

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size


class VaeConfig(_Shape):
    """`vae_config.json` (optional): the FLUX autoencoder. The reference hard-codes these defaults."""

    resolution: Count = 256
    in_channels: Count = 3
    downsample: Count = 8
    ch: Count = 128
    out_ch: Count = 3
    ch_mult: tuple[Count, ...] = Field(default=(1, 2, 4, 4), min_length=1)
    num_res_blocks: Count = 2
    z_channels: Count = 16
    scale_factor: Positive = 0.3611
    shift_factor: Finite = 0.1159
    norm_groups: Count = 32  # ours: smaller than 32 for the embedded model's narrow layers

    @model_validator(mode="after")
    def _sizes_fit(self) -> VaeConfig:
        if any(self.ch * wider % self.norm_groups for wider in self.ch_mult) or self.downsample != 2 ** (len(self.ch_mult) - 1):
            raise ValueError(
                f"got norm_groups {self.norm_groups}, ch {self.ch}, ch_mult {list(self.ch_mult)} and downsample {self.downsample}, "
                "expected groups that divide every width, and a halving for each width after the first"
            )
        return self


class _Own(BaseModel):
    # Only this program writes these settings: an unknown key is a typo.
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageSizes(_Own):
    """Resize limits of one image pathway, in pixels (see data.transforms.ImageTransform)."""

    max_size: Count
    min_size: Count
    stride: Count
    max_pixels: Count = 14 * 14 * 9 * 1024


class GuidanceDefaults(_Own):
    """This model's guidance where a request does not set it. None: the program's default, which is BAGEL's."""

    interval: tuple[Finite, Finite] | None = None  # times at which guidance acts
    text_scale: Positive | None = None
    image_scale: Positive | None = None


# Ignored keys of the reference's own BagelConfig: the tensors show which parts there are, and timestep_shift concerns training.
_REFERENCE_KEYS = ("visual_gen", "visual_und", "connector_act", "timestep_shift")


class BagelOptions(_Own):
    """`bagel_config.json` (optional): what the reference sets in code."""

    latent_patch_size: Count = 2
    max_latent_size: Count = 64
    vit_max_num_patch_per_side: Count = 70
    interpolate_pos: bool = False
    vae_transform: ImageSizes = ImageSizes(max_size=1024, min_size=512, stride=16)
    vit_transform: ImageSizes = ImageSizes(max_size=980, min_size=224, stride=14)
    default_size: tuple[Count, Count] = (1024, 1024)  # (height, width) of a picture when none is asked for
    text_to_image: GuidanceDefaults = GuidanceDefaults()
    edit: GuidanceDefaults = GuidanceDefaults()
    planned_edits: bool = True  # edits were trained behind plans; where they were not, think mode says so

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if k not in _REFERENCE_KEYS} if isinstance(value, dict) else value


class BagelConfig(_Shape):
    """All shapes of one model folder."""

    llm: LLMConfig = LLMConfig()
    vit: ViTConfig = ViTConfig()
    vae: VaeConfig = VaeConfig()
    options: BagelOptions = BagelOptions()

    @property
    def latent_channels(self) -> int:
        """Values of one latent token, z_channels * latent_patch_size^2: 64 in BAGEL."""
        return self.vae.z_channels * self.options.latent_patch_size**2

    @property
    def latent_stride(self) -> int:
        """Side of one latent token in pixels: 16 in BAGEL."""
        return self.vae.downsample * self.options.latent_patch_size

    @classmethod
    def from_folder(cls, folder: Path) -> BagelConfig:
        """Reads the four JSON files; the last two may be missing.

        Raises InputError for a missing or unreadable file, or for shapes that do not fit together.
        """
        found = cls(
            llm=_read(folder / "llm_config.json", LLMConfig),
            vit=_read(folder / "vit_config.json", ViTConfig),
            vae=_read(folder / "vae_config.json", VaeConfig, optional=True),
            options=_read(folder / "bagel_config.json", BagelOptions, optional=True),
        )
        found.check_strides(folder)
        return found

    def check_strides(self, folder: Path) -> None:
        """Raises InputError for picture sizes that the model cannot cut into latents and patches."""
        own, latent, patch = self.options, self.latent_stride, self.vit.patch_size
        strides = (("vae_transform.stride", own.vae_transform.stride, latent), ("vit_transform.stride", own.vit_transform.stride, patch))
        for name, value, unit in (*strides, *(("default_size", side, latent) for side in own.default_size)):
            if value % unit:
                raise InputError(f"{folder / 'bagel_config.json'}: got {name} {value}, expected a multiple of {unit}; correct the file")

    def files(self) -> dict[str, dict[str, Any]]:
        """File name -> contents of the JSON files that `from_folder` reads."""
        return {
            "llm_config.json": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **self.llm.model_dump(mode="json")},
            "vit_config.json": {"model_type": "siglip_vision_model", **self.vit.model_dump(mode="json")},
            "vae_config.json": self.vae.model_dump(mode="json"),
            "bagel_config.json": self.options.model_dump(mode="json"),
        }


def _read(path: Path, kind: type[T], optional: bool = False) -> T:
    """One config file. `optional`: defaults stand in for a missing one. Raises InputError."""
    if optional and not path.exists():
        return kind()
    values = read_json(path, "a BAGEL folder has llm_config.json, vit_config.json, ema.safetensors, ae.safetensors and tokenizer.json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first: Any = error.errors()[0]
        if first["type"] == "value_error":  # a rule over several keys: the message names them
            raise InputError(f"{path}: {first['ctx']['error']}; correct the file") from error
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise InputError(f"{path}: {where}: {first['msg']}, got {first['input']!r}; correct the file") from error
