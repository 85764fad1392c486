import torch
from app.vjepa_2_1.models.utils.modules import Block
from src.masks.utils import apply_masks
from torch import nn
from torch.utils.checkpoint import checkpoint


class VisionTransformerPredictor(nn.Module):
    def __init__(self, img_size=224, patch_size=16, num_frames=2, tubelet_size=2, embed_dim=768, predictor_embed_dim=384,
                 depth=4, num_heads=12, drop_path_rate=0.0, norm_layer=nn.LayerNorm, num_mask_tokens=2, use_mask_tokens=True,
                 zero_init_mask_tokens=True, is_causal=False, use_activation_checkpointing=False, return_all_tokens=False,
                 use_rope=True, interpolate_rope=False, img_temporal_dim_size=None):
        super().__init__()
        D, side = predictor_embed_dim, img_size // patch_size
        self.return_all_tokens, self.chop_last_n_tokens, self.num_mask_tokens = return_all_tokens, 0, num_mask_tokens
        self.use_rope, self.use_activation_checkpointing = use_rope, use_activation_checkpointing
        self.num_patches = num_frames // tubelet_size * side * side
        self.predictor_embed = nn.Sequential(nn.Linear(4 * embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, D))
        self.mask_tokens = nn.ParameterList(nn.Parameter(0.02 * torch.randn(1, 1, D)) for _ in range(num_mask_tokens))
        self.modality_embedding = True
        self.video_mod_embed, self.img_mod_embed = (nn.Parameter(torch.randn(1, 1, D)) for _ in range(2))
        self.predictor_blocks = nn.ModuleList(Block(
            D, num_heads, qkv_bias=True, drop_path=drop_path_rate, norm_layer=norm_layer, use_rope=use_rope, grid_size=side,
            is_causal=is_causal, interpolate_rope=interpolate_rope, patch_size=patch_size) for _ in range(depth))
        self.predictor_norm, self.predictor_proj = norm_layer(D), nn.Linear(D, 4 * embed_dim)
        if return_all_tokens:
            self.predictor_proj_context = nn.Linear(D, 4 * embed_dim)

    def forward(self, x, masks_x, masks_y, mod="video", mask_index=1):
        masks_x, masks_y = ([m] if isinstance(m, torch.Tensor) else m for m in (masks_x, masks_y))
        x = self.predictor_embed(x)
        num_context, tokens = x.shape[1], self.mask_tokens[mask_index % self.num_mask_tokens]
        x = torch.cat([x, apply_masks(tokens.repeat(len(x), self.num_patches, 1), masks_y)], 1)
        masks = torch.cat([torch.cat(masks_x), torch.cat(masks_y)], 1)
        order = masks.argsort(1)
        masks = torch.stack([m[row] for m, row in zip(masks, order, strict=True)])
        x = torch.stack([t[row] for t, row in zip(x, order, strict=True)])
        x = x + (self.img_mod_embed if mod == "image" else self.video_mod_embed)
        for block in self.predictor_blocks:
            x, _ = checkpoint(block, x, masks, use_reentrant=False) if self.use_activation_checkpointing else block(
                x, mask=masks)
        x = self.predictor_norm(x)
        x = torch.stack([t[row] for t, row in zip(x, order.argsort(1), strict=True)])
        context = self.predictor_proj_context(x[:, :num_context]) if self.return_all_tokens else None
        return self.predictor_proj(x[:, num_context:]), context
