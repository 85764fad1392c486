"""V-JEPA 2 of Hugging Face's VJEPA2Model and VJEPA2ForVideoClassification: names, and config.json.

transformers 4 and 5 have the same names, in files and in memory. Mask tokens are one tensor [M, 1, 1, D] there. Its
predictor always takes mask_tokens[1], while V-JEPA 2 trains mask_tokens[0] alone.
"""

import torch

from ._names import State, inverse, join_split, rename, split_joined, strip

BLOCK = {"norm1": "norm1", "attn.q": "attention.query", "attn.k": "attention.key", "attn.v": "attention.value",
         "attn.proj": "attention.proj", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
TABLES = {
    "encoder": {"patch_embed.proj": "encoder.embeddings.patch_embeddings.proj", "norm": "encoder.layernorm"}
    | {f"blocks.{{n}}.{ours}": f"encoder.layer.{{n}}.{theirs}" for ours, theirs in BLOCK.items()},
    "predictor": {"mask_tokens": "predictor.embeddings.mask_tokens",
                  "predictor_embed": "predictor.embeddings.predictor_embeddings",
                  "predictor_norm": "predictor.layernorm", "predictor_proj": "predictor.proj"}
    | {f"predictor_blocks.{{n}}.{ours}": f"predictor.layer.{{n}}.{theirs}" for ours, theirs in BLOCK.items()},
    # the official attentive probe: self-attention blocks, a cross-attention block, a Linear
    "probe": {"pooler.query_tokens": "pooler.query_tokens", "linear": "classifier"}
    | {f"pooler.cross_attention_block.{ours}": f"pooler.cross_attention_layer.{theirs}" for ours, theirs in {
        "norm1": "layer_norm1", "xattn.q": "cross_attn.q_proj", "xattn.k": "cross_attn.k_proj",
        "xattn.v": "cross_attn.v_proj", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items()}
    | {f"pooler.blocks.{{n}}.{ours}": f"pooler.self_attention_layers.{{n}}.{theirs}" for ours, theirs in {
        "norm1": "layer_norm1", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2"}.items()}}
DEFAULTS = {"patch_size": 16, "crop_size": 256, "frames_per_clip": 64, "tubelet_size": 2, "hidden_size": 1024, "in_chans": 3,
            "num_attention_heads": 16, "num_hidden_layers": 24, "mlp_ratio": 4.0, "pred_hidden_size": 384,
            "pred_num_attention_heads": 12, "pred_num_hidden_layers": 12, "pred_num_mask_tokens": 10,
            "pred_mlp_ratio": 4.0}  # of VJEPA2Config, where a file leaves one out
TABLE_NAMES = ("pos_embed", "predictor_pos_embed")  # in released files, unused since positions are rotary


def is_ours(state: State) -> bool:
    """Whether these are names of one of the two classes."""
    return any(name.removeprefix("vjepa2.") == "encoder.embeddings.patch_embeddings.proj.weight" for name in state)


def to_hf(roles: dict[str, State]) -> State:
    """{"encoder": ..., "predictor": ..., "probe": optional} -> VJEPA2Model's, or the classifier's, state."""
    out = {}
    for role in ("encoder", "predictor"):
        state = {name: value for name, value in roles[role].items() if name not in TABLE_NAMES}
        out |= rename(split_joined(_stack(state)), TABLES[role], f"Hugging Face's VJEPA2Model, {role},")
    if "probe" not in roles:
        return out
    probe = rename(split_joined(roles["probe"]), TABLES["probe"], "Hugging Face's VJEPA2ForVideoClassification")
    return {f"vjepa2.{name}": value for name, value in out.items()} | probe


def from_hf(state: State) -> dict[str, State]:
    """Either class -> {"encoder", "predictor", and "probe" of a classifier}. ValueError for other names."""
    state = {name.removeprefix("vjepa2."): value for name, value in strip(state).items()}
    roles: dict[str, State] = {"encoder": {}, "predictor": {}, "probe": {}}
    for name, value in state.items():
        role = name.split(".", 1)[0]
        roles[role if role in ("encoder", "predictor") else "probe"][name] = value
    return {role: _unstack(join_split(rename(part, inverse(TABLES[role]), f"jepa_fast's V-JEPA 2 {role}")))
            for role, part in roles.items() if part}


def config_to_hf(encoder: dict, predictor: dict, probe: State | None = None) -> dict:
    """Fields of a VideoTransformerConfig and a VideoPredictorConfig -> config.json."""
    if encoder.get("positions", "rotary") != "rotary":
        raise ValueError("VJEPA2Model needs an encoder with rotary positions, got a position table (V-JEPA)")
    missing = [name for name in ("image_size", "num_frames") if name not in encoder]
    if missing:
        options = " ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"the weights do not tell {' and '.join(missing)}: pass them in encoder ({options})")
    config = {
        "architectures": ["VJEPA2Model"], "model_type": "vjepa2", "patch_size": encoder["patch_size"],
        "crop_size": encoder["image_size"], "frames_per_clip": encoder["num_frames"],
        "tubelet_size": encoder["tubelet_size"], "hidden_size": encoder["embed_dim"], "in_chans": encoder["in_chans"],
        "num_attention_heads": encoder["num_heads"], "num_hidden_layers": encoder["depth"],
        "mlp_ratio": encoder["mlp_ratio"], "layer_norm_eps": 1e-6, "qkv_bias": True, "hidden_act": "gelu",
        "drop_path_rate": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0,
        "pred_hidden_size": predictor["embed_dim"], "pred_num_attention_heads": predictor["num_heads"],
        "pred_num_hidden_layers": predictor["depth"], "pred_num_mask_tokens": predictor["num_mask_tokens"],
        "pred_zero_init_mask_tokens": True, "pred_mlp_ratio": predictor["mlp_ratio"]}
    if probe is not None:
        layers = {name.split(".")[2] for name in probe if name.startswith("pooler.blocks.")}
        names = [f"LABEL_{i}" for i in range(len(probe["linear.weight"]))]
        config |= {"architectures": ["VJEPA2ForVideoClassification"], "num_pooler_layers": len(layers),
                   "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return config


def config_from_hf(config: dict) -> dict[str, dict]:
    """config.json -> {"encoder": fields of a VideoTransformerConfig, "predictor": fields of a VideoPredictorConfig}."""
    config = DEFAULTS | config
    return {
        "encoder": {"image_size": config["crop_size"], "num_frames": config["frames_per_clip"],
                    "patch_size": config["patch_size"], "tubelet_size": config["tubelet_size"],
                    "in_chans": config["in_chans"], "embed_dim": config["hidden_size"],
                    "depth": config["num_hidden_layers"], "num_heads": config["num_attention_heads"],
                    "mlp_ratio": config["mlp_ratio"], "positions": "rotary"},
        "predictor": {"embed_dim": config["pred_hidden_size"], "depth": config["pred_num_hidden_layers"],
                      "num_heads": config["pred_num_attention_heads"], "mlp_ratio": config["pred_mlp_ratio"],
                      "num_mask_tokens": config["pred_num_mask_tokens"]}}


def _stack(state: State) -> State:
    """mask_tokens.j [1, 1, D] as mask_tokens [M, 1, 1, D]."""
    tokens = sorted((name for name in state if name.startswith("mask_tokens.")), key=lambda name: int(name[12:]))
    if not tokens:
        return state
    rest = {name: value for name, value in state.items() if name not in tokens}
    return {"mask_tokens": torch.stack([state[name] for name in tokens])} | rest


def _unstack(state: State) -> State:
    if "mask_tokens" not in state:
        return state
    rest = {name: value for name, value in state.items() if name != "mask_tokens"}
    return {f"mask_tokens.{j}": token.clone() for j, token in enumerate(state["mask_tokens"])} | rest
