"""Shapes of a BAGEL checkpoint. The defaults are BAGEL-7B-MoT's, also where the reference hard-codes a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hyperbagel.core.errors import InputError

T = TypeVar("T", bound="_Shape")


class _Shape(BaseModel):
    # Checkpoint JSON files carry many keys of their training framework: extra keys are theirs, not mistakes.
    model_config = ConfigDict(extra="ignore", frozen=True)


class LLMConfig(_Shape):
    """`llm_config.json`: a Qwen2 shape, used twice (understanding and generation expert)."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    vocab_size: int = 152064
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class ViTConfig(_Shape):
    """`vit_config.json`: a SigLIP shape. The file counts one layer more than BAGEL uses."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 980
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    @property
    def layers_used(self) -> int:
        return self.num_hidden_layers - 1

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size


class VaeConfig(_Shape):
    """`vae_config.json` (optional): the FLUX autoencoder. The reference hard-codes these defaults."""

    resolution: int = 256
    in_channels: int = 3
    downsample: int = 8
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    norm_groups: int = 32  # ours: smaller than 32 for the embedded model's narrow layers


class ImageSizes(_Shape):
    """Resize limits of one image pathway, pixels (see data.transforms)."""

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024


class BagelOptions(_Shape):
    """`bagel_config.json` (optional): what the reference passes in code."""

    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    vae_transform: ImageSizes = ImageSizes(max_size=1024, min_size=512, stride=16)
    vit_transform: ImageSizes = ImageSizes(max_size=980, min_size=224, stride=14)
    default_size: tuple[int, int] = (1024, 1024)  # (height, width) of a picture when none is asked for
    text_to_image_interval: tuple[float, float] | None = (
        None  # times at which guidance acts on pictures from text; None: the program's usual
    )


class BagelConfig(_Shape):
    """All shapes of one model folder."""

    llm: LLMConfig = LLMConfig()
    vit: ViTConfig = ViTConfig()
    vae: VaeConfig = VaeConfig()
    options: BagelOptions = BagelOptions()

    @property
    def latent_channels(self) -> int:
        """Values of one latent token: z * p * p, 64 in BAGEL."""
        return self.vae.z_channels * self.options.latent_patch_size**2

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token and side, 16 in BAGEL."""
        return self.vae.downsample * self.options.latent_patch_size

    @classmethod
    def from_folder(cls, folder: Path) -> BagelConfig:
        """Reads the four JSON files; the last two may be missing.

        Raises InputError for a missing or unreadable file.
        """
        return cls(
            llm=_read(folder / "llm_config.json", LLMConfig),
            vit=_read(folder / "vit_config.json", ViTConfig),
            vae=_read(folder / "vae_config.json", VaeConfig, optional=True),
            options=_read(folder / "bagel_config.json", BagelOptions, optional=True),
        )

    def files(self) -> dict[str, dict[str, Any]]:
        """The JSON files of a folder, by name."""
        return {
            "llm_config.json": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **self.llm.model_dump(mode="json")},
            "vit_config.json": {"model_type": "siglip_vision_model", **self.vit.model_dump(mode="json")},
            "vae_config.json": self.vae.model_dump(mode="json"),
            "bagel_config.json": self.options.model_dump(mode="json"),
        }


def _read(path: Path, kind: type[T], optional: bool = False) -> T:
    if not path.exists():
        if optional:
            return kind()
        raise InputError(
            f"{path}: missing; a BAGEL folder has llm_config.json, vit_config.json, ema.safetensors, ae.safetensors and tokenizer.json"
        )
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); replace the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise InputError(f"{path}: {where}: {first['msg']}, got {first['input']!r}; correct the file") from error
