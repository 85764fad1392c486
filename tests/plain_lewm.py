"""A small LeWorldModel with the names and signatures of le-wm (JEPA) and stable-worldmodel (LeWM), for its patch's tests."""

import types

import torch
import torch.nn.functional as F
from torch import nn


class SIGReg(nn.Module):
    def __init__(self, knots=17, num_proj=1024):
        super().__init__()
        self.num_proj = num_proj
        t = torch.linspace(0, 3, knots)
        weights = torch.full((knots,), 6 / (knots - 1))
        weights[0] = weights[-1] = 3 / (knots - 1)
        self.register_buffer("t", t)
        self.register_buffer("phi", torch.exp(-t * t / 2))
        self.register_buffer("weights", weights * self.phi)

    def forward(self, proj):
        directions = torch.randn(proj.size(-1), self.num_proj, device=proj.device)
        directions = (directions / directions.norm(dim=0)).to(proj.dtype)
        angles = torch.einsum("...nd,dk,t->...nkt", proj, directions, self.t.to(proj.dtype))
        distance = (angles.cos().mean(-3) - self.phi) ** 2 + angles.sin().mean(-3) ** 2
        return proj.size(-2) * (distance * self.weights).sum(-1).mean()


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(hidden_dim, dim), nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, x, causal=True):
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class ConditionalBlock(nn.Module):
    def __init__(self, dim, heads, dim_head, mlp_dim, dropout=0.0):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads, dim_head, dropout), FeedForward(dim, mlp_dim, dropout)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(shift1 + self.norm1(x) * (1 + scale1))
        return x + gate2 * self.mlp(shift2 + self.norm2(x) * (1 + scale2))


class Transformer(nn.Module):
    def __init__(self, input_dim, hidden_dim, output_dim, depth, heads, dim_head, mlp_dim, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.layers = nn.ModuleList(ConditionalBlock(hidden_dim, heads, dim_head, mlp_dim, dropout) for _ in range(depth))
        same = input_dim == hidden_dim
        self.input_proj, self.cond_proj = (nn.Identity() if same else nn.Linear(input_dim, hidden_dim) for _ in range(2))
        self.output_proj = nn.Identity() if output_dim == hidden_dim else nn.Linear(hidden_dim, output_dim)

    def forward(self, x, c=None):
        x, c = self.input_proj(x), self.cond_proj(c)
        for layer in self.layers:
            x = layer(x, c)
        return self.output_proj(self.norm(x))


class Embedder(nn.Module):
    def __init__(self, input_dim=10, smoothed_dim=10, emb_dim=10, mlp_scale=4):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(input_dim, mlp_scale * emb_dim), nn.SiLU(),
                                   nn.Linear(mlp_scale * emb_dim, emb_dim))

    def forward(self, x):
        return self.embed(x)


class ARPredictor(nn.Module):
    def __init__(self, *, num_frames, depth, heads, mlp_dim, input_dim, hidden_dim, output_dim=None, dim_head=64,
                 dropout=0.0, emb_dropout=0.0):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, num_frames, input_dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(input_dim, hidden_dim, output_dim or input_dim, depth, heads, dim_head, mlp_dim,
                                       dropout)

    def forward(self, x, c):
        return self.transformer(self.dropout(x + self.pos_embedding[:, :x.size(1)]), c)


class Pixels(nn.Module):
    """What an encoder returns, from mean colours."""

    def __init__(self, dim):
        super().__init__()
        self.embed = nn.Linear(3, dim)

    def forward(self, pixels, interpolate_pos_encoding=False):
        return types.SimpleNamespace(last_hidden_state=self.embed(pixels.mean((-2, -1))).unsqueeze(1))


class _World(nn.Module):
    def __init__(self, encoder, predictor, action_encoder, projector=None, pred_proj=None):
        super().__init__()
        self.encoder, self.predictor, self.action_encoder = encoder, predictor, action_encoder
        self.projector, self.pred_proj = projector or nn.Identity(), pred_proj or nn.Identity()

    def encode(self, info):
        features = self.encoder(info["pixels"].flatten(0, 1), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        info["emb"] = self.projector(features).unflatten(0, info["pixels"].shape[:2])
        if "action" in info:
            info["act_emb"] = self.action_encoder(info["action"])
        return info

    def predict(self, emb, act_emb):
        return self.pred_proj(self.predictor(emb, act_emb).flatten(0, 1)).unflatten(0, emb.shape[:2])

    def _roll(self, info, actions, history):
        """Every step from scratch: the whole window, of which the newest row counts."""
        states = info["emb"].flatten(0, 1)
        for end in range(states.shape[1], actions.shape[2] + 1):
            embedded = self.action_encoder(actions[:, :, :end].flatten(0, 1))
            predicted = self.predict(states[:, -history:], embedded[:, -history:])
            states = torch.cat([states, predicted[:, -1:]], 1)
        info["predicted_emb"] = states.unflatten(0, actions.shape[:2])
        return info


def _first_samples(info):
    return {key: value[:, 0] for key, value in info.items() if torch.is_tensor(value)}


class JEPA(_World):
    def rollout(self, info, action_sequence, history_size: int = 3):
        info["action"] = action_sequence[:, :, :info["pixels"].size(2)]
        info["emb"] = self.encode(_first_samples(info))["emb"].unsqueeze(1).expand(*action_sequence.shape[:2], -1, -1)
        return self._roll(info, action_sequence, history_size)

    def criterion(self, info_dict):
        return (info_dict["predicted_emb"][..., -1, :] - info_dict["goal_emb"][:, None, -1].detach()).square().sum(-1)

    def get_cost(self, info_dict, action_candidates):
        goal = _first_samples(info_dict) | {"pixels": info_dict["goal"][:, 0]}
        info_dict["goal_emb"] = self.encode(goal)["emb"]
        return self.criterion(self.rollout(info_dict, action_candidates))


class LeWM(_World):
    def rollout(self, info, action_sequence, history_size: int = None):
        actions = torch.cat([info["action_history"], action_sequence], 2) if "action_history" in info else action_sequence
        info["action"] = actions[:, :, :info["pixels"].size(2)]
        if "emb" not in info:
            first = self.encode(_first_samples(info))["emb"].detach()
            info["emb"] = first.unsqueeze(1).expand(*action_sequence.shape[:2], -1, -1)
        return self._roll(info, actions, history_size or 3)
