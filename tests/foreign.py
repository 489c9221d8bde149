"""Small random models of other projects, and the files that those projects would publish."""

import copy
from pathlib import Path

import bert_reference
import torch
import torch_reference
import transformers
from torch import nn

torch.set_num_threads(1)

WIDTH, DEPTH, HEADS, PATCH, PROJECTION = 128, 3, 2, 7, 12


def clip_model(
    image_size: int = 28, *, heads: int = HEADS, width: int = WIDTH
) -> transformers.CLIPModel:
    """Hugging Face's, by default with heads of 64 channels, as all of OpenAI's have."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": PATCH,
    }
    ends = {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text | ends, vision_config=vision, projection_dim=PROJECTION
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # off 0 and 1, where a swap would hide
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def openai_weights(model: transformers.CLIPModel) -> dict[str, torch.Tensor]:
    """The same weights as OpenAI's `model.state_dict()` names them."""
    tower = model.vision_model
    state = {
        "visual.class_embedding": tower.embeddings.class_embedding,
        "visual.positional_embedding": tower.embeddings.position_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
        "visual.conv1.weight": tower.embeddings.patch_embedding.weight,
    }
    modules = {"visual.ln_pre": tower.pre_layrnorm, "visual.ln_post": tower.post_layernorm}
    for i, layer in enumerate(tower.encoder.layers):
        block, own = f"visual.transformer.resblocks.{i}", layer.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(p, kind) for p in (own.q_proj, own.k_proj, own.v_proj)]
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        modules[f"{block}.attn.out_proj"] = own.out_proj
        modules[f"{block}.ln_1"], modules[f"{block}.ln_2"] = layer.layer_norm1, layer.layer_norm2
        modules[f"{block}.mlp.c_fc"], modules[f"{block}.mlp.c_proj"] = layer.mlp.fc1, layer.mlp.fc2
    for name, module in modules.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = module.weight, module.bias
    # The text tower: names and all that matters of it.
    state["transformer.resblocks.0.attn.in_proj_weight"] = torch.randn(3, 2)
    for name in ("token_embedding.weight", "ln_final.weight", "ln_final.bias", "text_projection"):
        state[name] = torch.randn(3)
    state["positional_embedding"], state["logit_scale"] = torch.randn(4, 2), torch.tensor(4.6)
    numbers = {"input_resolution": 28, "context_length": 77, "vocab_size": 50}
    state |= {name: torch.tensor(value) for name, value in numbers.items()}
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def open_clip_config(head_width: int = WIDTH // HEADS, **vision) -> dict:
    """open_clip_config.json of `clip_model`, as models on the hub have it, with these changes."""
    return {
        "model_cfg": {
            "embed_dim": PROJECTION,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": 28,
                "layers": DEPTH,
                "width": WIDTH,
                "head_width": head_width,
                "mlp_ratio": 2.0,
                "patch_size": PATCH,
            }
            | vision,
            "text_cfg": {"context_length": 4, "vocab_size": 50, "width": 16, "heads": 2},
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "resize_mode": "squash",
        },
    }


def bert_model(kind: type = transformers.BertForMaskedLM) -> nn.Module:
    config = bert_reference.make_config(vocab=60, width=32, heads=2, hidden=64, length=40)
    config.num_hidden_layers = 3
    model = kind(config).eval()
    bert_reference.randomise(model, seed=3)
    return model


class UMT(nn.Module):
    """UMT's stage-2 model out of the parts that other tests compare with ours; its names, except
    for the text tower's, which `umt_weights` changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.vision_encoder = torch_reference.Student(
            width=32, depth=2, heads=2, hidden=64, patch=4, taps=2, projection=16
        )
        self.vision_encoder.pool_norm = nn.LayerNorm(32, eps=1e-6)
        config = bert_reference.make_config(vocab=60, width=32, heads=2, hidden=64, length=40)
        self.tower = bert_reference.Tower(config, 2, 1, vision_width=32).eval()
        bert_reference.randomise(self.tower, seed=2)
        self.vision_proj, self.text_proj = nn.Linear(32, 16), nn.Linear(32, 16)
        self.temp = nn.Parameter(torch.tensor(0.05))
        self.itm_head = nn.Linear(32, 2)


def umt_weights(model: UMT) -> dict[str, torch.Tensor]:
    """As `multi_modality/tasks/pretrain.py` saves them, with the frozen teacher's beside."""

    def rename(name: str) -> str:
        name = name.replace("tower.embeddings.", "text_encoder.bert.embeddings.")
        name = name.replace("tower.text.", "text_encoder.bert.encoder.layer.")
        name = name.replace("tower.fusion.0.", "text_encoder.bert.encoder.layer.2.")
        return name.replace("tower.head.", "text_encoder.cls.predictions.")

    state = {rename(name): tensor.clone() for name, tensor in model.state_dict().items()}
    state["text_encoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["clip_teacher.proj"] = torch.randn(4, 4)
    return state


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    """Writes a state dict in the format of the suffix."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(copy.copy(state), path)
    return path
