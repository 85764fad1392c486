"""I-JEPA encoders of Hugging Face's IJepaModel: names, and config.json.

Files have one layout, written and read alike by transformers 4 and 5. In memory transformers 5 has names of its own,
which a plain torch.save of a state dict keeps. The predictor has no place in this class.
"""

from typing import Literal

from ._names import State, inverse, join_split, rename, split_joined, strip

OUTSIDE = {"pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection",
           "norm": "layernorm"}
ON_DISK = OUTSIDE | {f"blocks.{{n}}.{ours}": f"encoder.layer.{{n}}.{theirs}" for ours, theirs in {
    "norm1": "layernorm_before", "norm2": "layernorm_after",
    "attn.q": "attention.attention.query", "attn.k": "attention.attention.key", "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}.items()}
IN_MEMORY = OUTSIDE | {f"blocks.{{n}}.{ours}": f"layers.{{n}}.{theirs}" for ours, theirs in {
    "norm1": "layernorm_before", "norm2": "layernorm_after",
    "attn.q": "attention.q_proj", "attn.k": "attention.k_proj", "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items()}
TABLES = {"disk": ON_DISK, "memory": IN_MEMORY}
DEFAULTS = {"image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072}  # of IJepaConfig, where a file leaves one out


def is_ours(state: State) -> bool:
    """Whether these are names of IJepaModel or IJepaForImageClassification."""
    return any(name.removeprefix("ijepa.") == "embeddings.patch_embeddings.projection.weight" for name in state)


def to_hf(roles: dict[str, State], names: Literal["disk", "memory"] = "disk") -> State:
    """{"encoder": ..., "probe": a Linear on the mean token, optional} -> IJepaModel's, or the classifier's, state."""
    encoder = rename(split_joined(roles["encoder"]), TABLES[names], "Hugging Face's IJepaModel")
    if "probe" not in roles:
        return encoder
    return {f"ijepa.{name}": value for name, value in encoder.items()} \
        | rename(roles["probe"], {"linear": "classifier"}, "Hugging Face's IJepaForImageClassification")


def from_hf(state: State) -> dict[str, State]:
    """Any of the layouts -> {"encoder": ..., "probe": where there is a classifier}. ValueError for other names."""
    state = {name.removeprefix("ijepa."): value for name, value in strip(state).items()}
    probe = {name: value for name, value in state.items() if name.startswith("classifier.")}
    # weights that nothing in I-JEPA trains, left by `add_pooling_layer` and `use_mask_token`
    unused = {name for name in state if name.startswith("pooler.") or name == "embeddings.mask_token"}
    body = {name: value for name, value in state.items() if name not in probe and name not in unused}
    table = IN_MEMORY if any(name.startswith("layers.") for name in body) else ON_DISK
    roles = {"encoder": join_split(rename(body, inverse(table), "jepa_fast's VisionTransformer"))}
    if probe:
        roles["probe"] = rename(probe, {"classifier": "linear"}, "jepa_fast's probe")
    return roles


def config_to_hf(fields: dict, probe: State | None = None) -> dict:
    """Fields of a VisionTransformerConfig -> config.json."""
    for name, wanted in (("positions", "sincos"), ("class_token", False), ("num_outputs", 0)):
        if fields.get(name, wanted) != wanted:
            raise ValueError(f"IJepaModel needs an encoder with {name}={wanted!r}, got {fields[name]!r}")
    D = fields["embed_dim"]
    config = {
        "architectures": ["IJepaModel"], "model_type": "ijepa", "hidden_size": D, "num_hidden_layers": fields["depth"],
        "num_attention_heads": fields["num_heads"], "intermediate_size": int(D * fields["mlp_ratio"]),
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": True,
        # transformers' own default is 1e-12; the official models have 1e-6
        "layer_norm_eps": 1e-6,
        "image_size": fields["image_size"], "patch_size": fields["patch_size"], "num_channels": fields["in_chans"]}
    if probe is not None:
        config |= {"architectures": ["IJepaForImageClassification"], **_labels(len(probe["linear.weight"]))}
    return config


def config_from_hf(config: dict) -> dict[str, dict]:
    """config.json -> {"encoder": fields of a VisionTransformerConfig}."""
    config = DEFAULTS | config
    D = config["hidden_size"]
    return {"encoder": {"image_size": config["image_size"], "patch_size": config["patch_size"],
                        "in_chans": config["num_channels"], "embed_dim": D, "depth": config["num_hidden_layers"],
                        "num_heads": config["num_attention_heads"], "mlp_ratio": config["intermediate_size"] / D}}


def _labels(count: int) -> dict:
    names = [f"LABEL_{i}" for i in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
