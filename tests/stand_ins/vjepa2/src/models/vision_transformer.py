import torch
from src.masks.utils import apply_masks
from src.models.utils.modules import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


class PatchEmbed3D(nn.Module):
    def __init__(self, size, embed_dim):
        super().__init__()
        self.proj = nn.Conv3d(3, embed_dim, size, stride=size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, img_size=224, patch_size=16, num_frames=2, tubelet_size=2, embed_dim=768, depth=12, num_heads=12,
                 drop_rate=0.0, drop_path_rate=0.0, norm_layer=nn.LayerNorm, out_layers=None, use_silu=False, use_sdpa=True,
                 use_activation_checkpointing=False, use_rope=False, handle_nonsquare_inputs=True):
        super().__init__()
        side = img_size // patch_size
        self.patch_size, self.tubelet_size, self.out_layers = patch_size, tubelet_size, out_layers
        self.use_rope, self.handle_nonsquare_inputs = use_rope, handle_nonsquare_inputs
        self.use_activation_checkpointing = use_activation_checkpointing
        self.patch_embed = PatchEmbed3D((tubelet_size, patch_size, patch_size), embed_dim)
        num_patches = num_frames // tubelet_size * side * side
        self.pos_embed = None if use_rope else nn.Parameter(torch.randn(1, num_patches, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(
            embed_dim, num_heads, qkv_bias=True, drop=drop_rate, drop_path=drop_path_rate * i / max(depth - 1, 1),
            act_layer=nn.SiLU if use_silu else nn.GELU, norm_layer=norm_layer, use_sdpa=use_sdpa, use_rope=use_rope,
            grid_size=side) for i in range(depth))
        self.norm = norm_layer(embed_dim)

    def interpolate_pos_encoding(self, x, pos_embed):
        return pos_embed

    def forward(self, x, masks=None):
        masks = [masks] if isinstance(masks, torch.Tensor) else masks
        grid = x.shape[2] // self.tubelet_size, *(size // self.patch_size for size in x.shape[3:])
        grid = dict(zip(("T", "H_patches", "W_patches"), grid if self.handle_nonsquare_inputs else [None] * 3, strict=True))
        x = self.patch_embed(x)
        if not self.use_rope:
            x += self.pos_embed
        if masks is not None:
            x, masks = apply_masks(x, masks), torch.cat(masks)
        outs = []
        for i, block in enumerate(self.blocks):
            if self.use_activation_checkpointing:
                x = checkpoint(block, x, masks, None, **grid, use_reentrant=False)
            else:
                x = block(x, mask=masks, attn_mask=None, **grid)
            if self.out_layers is not None and i in self.out_layers:
                outs.append(self.norm(x))
        return self.norm(x) if self.out_layers is None else outs
