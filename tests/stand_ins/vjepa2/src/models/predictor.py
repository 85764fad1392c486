import torch
from src.masks.utils import apply_masks
from src.models.utils.modules import Block
from src.utils.tensors import repeat_interleave_batch
from torch import nn
from torch.utils.checkpoint import checkpoint


class VisionTransformerPredictor(nn.Module):
    def __init__(self, img_size=224, patch_size=16, num_frames=2, tubelet_size=2, embed_dim=768, predictor_embed_dim=384,
                 depth=6, num_heads=12, drop_path_rate=0.0, norm_layer=nn.LayerNorm, num_mask_tokens=2, use_mask_tokens=True,
                 zero_init_mask_tokens=True, use_activation_checkpointing=False, return_all_tokens=False,
                 chop_last_n_tokens=0, use_rope=False):
        super().__init__()
        D, side = predictor_embed_dim, img_size // patch_size
        self.return_all_tokens, self.chop_last_n_tokens = return_all_tokens, chop_last_n_tokens
        self.num_mask_tokens, self.use_rope = num_mask_tokens, use_rope
        self.use_activation_checkpointing = use_activation_checkpointing
        self.num_patches = num_frames // tubelet_size * side * side
        self.predictor_embed = nn.Linear(embed_dim, D)
        self.mask_tokens = nn.ParameterList(nn.Parameter(0.02 * torch.randn(1, 1, D)) for _ in range(num_mask_tokens))
        self.predictor_pos_embed = None if use_rope else nn.Parameter(torch.randn(1, self.num_patches, D),
                                                                      requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(
            D, num_heads, qkv_bias=True, drop_path=drop_path_rate, norm_layer=norm_layer, use_rope=use_rope, grid_size=side)
            for _ in range(depth))
        self.predictor_norm, self.predictor_proj = norm_layer(D), nn.Linear(D, embed_dim)

    def forward(self, x, masks_x, masks_y, mask_index=1, has_cls=False):
        masks_x, masks_y = ([m] if isinstance(m, torch.Tensor) else m for m in (masks_x, masks_y))
        B = len(x) // len(masks_x)
        x = self.predictor_embed(x)
        cls, x = x[:, :has_cls], x[:, int(has_cls):]
        tokens = self.mask_tokens[mask_index % self.num_mask_tokens].repeat(B, self.num_patches, 1)
        tokens = apply_masks(tokens, masks_y)
        if not self.use_rope:
            places = self.predictor_pos_embed.repeat(B, 1, 1)
            x += apply_masks(places, masks_x)
            tokens += repeat_interleave_batch(apply_masks(places, masks_y), B, repeat=len(masks_x))
        num_context, masks = x.shape[1], torch.cat([torch.cat(masks_x), torch.cat(masks_y)], 1)
        x = torch.cat([x.repeat(len(masks_x), 1, 1), tokens], 1)
        order = masks.argsort(1)
        last = order.shape[1] - self.chop_last_n_tokens
        masks = torch.stack([m[row] for m, row in zip(masks, order, strict=True)])[:, :last]
        x = torch.cat([cls, torch.stack([t[row] for t, row in zip(x, order, strict=True)])[:, :last]], 1)
        for block in self.predictor_blocks:
            if self.use_activation_checkpointing:
                x = checkpoint(block, x, masks, None, use_reentrant=False)
            else:
                x = block(x, mask=masks, attn_mask=None)
        x = self.predictor_norm(x)[:, int(has_cls):]
        if not self.return_all_tokens:
            x = torch.stack([t[row] for t, row in zip(x, order.argsort(1), strict=True)])[:, num_context:]
        return self.predictor_proj(x)
