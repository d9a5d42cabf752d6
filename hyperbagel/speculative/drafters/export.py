"""EAGLE-3 drafters in the layout that SGLang and vLLM load: config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hyperbagel.core.config import check_config
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder
from hyperbagel.model.config import LLMConfig
from hyperbagel.model.weights import TensorFolder, load_tensors, save_tensors
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.eagle3 import Eagle3
from hyperbagel.speculative.drafters.folder import check_values

IDS = "eagle_aux_hidden_state_layer_ids"


def export_eagle3(folder: Path, module: Eagle3, llm: LLMConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the folder, whole or not at all. The keys are exactly the module's own: SGLang would skip an unknown one silently."""
    make_folder(folder.parent)
    c = module.config
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": llm.max_position_embeddings,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.draft_vocab or c.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Which hidden states of the target are fused. vLLM reads the list at the top and counts layers by what ENTERS them; SGLang reads
        # the nested one and counts by what LEAVES them (it adds one: drafters of a target of 94 layers say 1, 46, 90, which is 2, 47, 91).
        IDS: list(c.levels),
        "eagle_config": {IDS: [level - 1 for level in c.levels], "use_aux_hidden_state": True},
    }
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in module.state_dict().items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        atomic_write_text(temporary / "config.json", json.dumps(config, indent=1) + "\n")
        save_tensors(temporary / "model.safetensors", tensors)


def import_eagle3(folder: Path, llm: LLMConfig) -> Eagle3:
    """Reads such a folder, even of a drafter trained elsewhere, in fp32.

    Raises:
        InputError: another architecture, another target, or tensors that do not fit.
    """
    path = folder / "config.json"
    try:
        got = json.loads(path.read_text(encoding="utf-8"))
        architecture = got["architectures"]
        small = got.get("draft_vocab_size", got["vocab_size"])
        sizes = {"hidden_size": got["hidden_size"], "intermediate_size": got["intermediate_size"], "vocab_size": got["vocab_size"]}
        heads = {"heads": got["num_attention_heads"], "kv_heads": got.get("num_key_value_heads", got["num_attention_heads"])}
        newer = got.get("rope_parameters") or {}  # where transformers 5 writes the rotary base
        scales = {"rope_theta": got.get("rope_theta", newer.get("rope_theta", 10000.0)), "eps": got["rms_norm_eps"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: got no EAGLE-3 configuration ({error!r}), expected config.json of a drafter, check the folder"
        ) from error
    if architecture != ["LlamaForCausalLMEagle3"]:
        raise InputError(f"{path}: got architectures {architecture}, expected LlamaForCausalLMEagle3, give an EAGLE-3 drafter")
    nested = got.get("eagle_config") or {}
    layers = {"target_layers": llm.num_hidden_layers, "draft_vocab": None if small == sizes["vocab_size"] else small}
    config = check_config(DrafterConfig, {"kind": "eagle3", **sizes, **heads, **scales, **layers}, str(path))
    config.check_target(llm, str(folder))
    own = list(config.levels)
    for where, ids, expected in ((IDS, got.get(IDS), own), (f"eagle_config.{IDS}", nested.get(IDS), [level - 1 for level in own])):
        if ids and ids != expected:
            raise InputError(
                f"{path}: got {where} {ids}, expected {expected}, the layers that drafters of this kind read here; "
                "export it again if it was made here, else train one"
            )
    module = Eagle3(config)
    TensorFolder(folder, "model").check({name: tuple(x.shape) for name, x in module.state_dict().items()})
    tensors = load_tensors(folder / "model.safetensors")
    check_values(module, tensors, folder)
    module.load_state_dict(tensors)
    return module.float().eval().requires_grad_(False)
