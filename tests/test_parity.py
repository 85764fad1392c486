"""Our models against independent implementations from PyPI, by value."""

import pytest
import torch

from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.testing import error

transformers = pytest.importorskip("transformers")


def hugging_face_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official (and our) I-JEPA names to those IJepaModel stores on disk."""
    out = {"embeddings.position_embeddings": state["pos_embed"],
           "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
           "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
           "layernorm.weight": state["norm.weight"], "layernorm.bias": state["norm.bias"]}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for key, value in state.items():
        if not key.startswith("blocks."):
            continue
        _, layer, rest = key.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        if module == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), value.chunk(3, 0), strict=True):
                out[f"encoder.layer.{layer}.attention.attention.{part}.{kind}"] = piece.clone()
        else:
            out[f"encoder.layer.{layer}.{names[module]}.{kind}"] = value
    return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_ijepa_encoder_equals_hugging_face(dtype, tolerance, tmp_path):
    """IJepaModel.from_pretrained on a folder in its own layout, with official weights' epsilon."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    ours = VisionTransformerConfig(image_size=48, patch_size=8, embed_dim=64, depth=3, num_heads=4).build()
    for parameter in ours.parameters():  # every parameter matters: no zero biases, no unit norms
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = transformers.IJepaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
                                      image_size=48, patch_size=8, layer_norm_eps=1e-6)
    config.architectures = ["IJepaModel"]
    config.save_pretrained(tmp_path)
    save_file(hugging_face_state(ours.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    theirs, report = transformers.IJepaModel.from_pretrained(tmp_path, add_pooling_layer=False,
                                                             output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ours, theirs = ours.to(dtype), theirs.to(dtype).eval()
    images = torch.randn(3, 3, 48, 48, dtype=dtype)
    a, b = ours(images), theirs(images).last_hidden_state
    assert error(a, b) < tolerance
    a.square().sum().backward()
    b.square().sum().backward()
    patches = theirs.embeddings.patch_embeddings.projection
    assert error(ours.patch_embed.proj.weight.grad, patches.weight.grad) < 10 * tolerance
