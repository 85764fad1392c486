import torch
from src.models.utils.modules import ACBlock as Block
from src.models.utils.modules import build_action_block_causal_attention_mask
from torch import nn
from torch.utils.checkpoint import checkpoint


class VisionTransformerPredictorAC(nn.Module):
    def __init__(self, img_size=224, patch_size=16, num_frames=2, tubelet_size=2, embed_dim=768, predictor_embed_dim=1024,
                 depth=24, num_heads=16, norm_layer=nn.LayerNorm, use_activation_checkpointing=False, use_rope=True,
                 action_embed_dim=7, use_extrinsics=False):
        super().__init__()
        D, side = predictor_embed_dim, img_size // patch_size
        self.grid_height = self.grid_width = side
        self.use_extrinsics, self.use_activation_checkpointing = use_extrinsics, use_activation_checkpointing
        self.predictor_embed = nn.Linear(embed_dim, D)
        self.action_encoder, self.state_encoder = nn.Linear(action_embed_dim, D), nn.Linear(action_embed_dim, D)
        self.extrinsics_encoder = nn.Linear(action_embed_dim - 1, D)
        self.predictor_blocks = nn.ModuleList(Block(D, num_heads, qkv_bias=True, norm_layer=norm_layer, use_rope=use_rope,
                                                    grid_size=side) for _ in range(depth))
        self.predictor_norm, self.predictor_proj = norm_layer(D), nn.Linear(D, embed_dim)
        self.attn_mask = build_action_block_causal_attention_mask(num_frames // tubelet_size, side, side,
                                                                  add_tokens=2 + use_extrinsics)

    def forward(self, x, actions, states, extrinsics=None):
        side = self.grid_height
        x = self.predictor_embed(x).unflatten(1, (-1, side * side))
        conditions = [self.action_encoder(actions), self.state_encoder(states)]
        if self.use_extrinsics:
            conditions.append(self.extrinsics_encoder(extrinsics))
        T, A = x.shape[1], len(conditions)
        x = torch.cat([torch.stack(conditions, 2), x], 2).flatten(1, 2)
        attn_mask = self.attn_mask[:x.shape[1], :x.shape[1]]
        for block in self.predictor_blocks:
            if self.use_activation_checkpointing:
                x = checkpoint(block, x, mask=None, attn_mask=attn_mask, T=T, H=side, W=side, action_tokens=A,
                               use_reentrant=False)
            else:
                x = block(x, mask=None, attn_mask=attn_mask, T=T, H=side, W=side, action_tokens=A)
        x = x.unflatten(1, (T, -1))[:, :, A:].flatten(1, 2)
        return self.predictor_proj(self.predictor_norm(x))
