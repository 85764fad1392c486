import torch
from app.vjepa_2_1.models.utils.modules import Block
from src.masks.utils import apply_masks
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
                 drop_path_rate=0.0, norm_layer=nn.LayerNorm, out_layers=None, use_activation_checkpointing=False,
                 use_rope=True, handle_nonsquare_inputs=True, img_temporal_dim_size=None, interpolate_rope=False):
        super().__init__()
        side, size = img_size // patch_size, (patch_size, patch_size)
        self.patch_size, self.tubelet_size, self.img_temporal_dim_size = patch_size, tubelet_size, img_temporal_dim_size
        self.use_activation_checkpointing = use_activation_checkpointing
        self.use_rope, self.out_layers = use_rope, out_layers
        self.handle_nonsquare_inputs, self.attn_out, self.return_hierarchical = handle_nonsquare_inputs, False, False
        self.modality_embedding = True
        self.patch_embed = PatchEmbed3D((tubelet_size, *size), embed_dim)
        self.patch_embed_img = PatchEmbed3D((1, *size), embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qkv_bias=True, drop_path=drop_path_rate, use_rope=use_rope,
                                          grid_size=side, norm_layer=norm_layer, interpolate_rope=interpolate_rope,
                                          patch_size=patch_size) for _ in range(depth))
        self.hierarchical_layers = self.out_layers_distillation = [2, 5, 8, 11]
        self.norms_block = nn.ModuleList(norm_layer(embed_dim) for _ in range(4))
        self.img_mod_embed = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.video_mod_embed = nn.Parameter(torch.randn(1, 1, embed_dim))

    def check_temporal_dim(self, shape):
        return self.img_temporal_dim_size is not None and shape[2] == self.img_temporal_dim_size

    def forward(self, x, masks=None, training=False):
        masks = [masks] if isinstance(masks, torch.Tensor) else masks
        is_image = self.check_temporal_dim(x.shape)
        grid = x.shape[2] // (1 if is_image else self.tubelet_size), *(size // self.patch_size for size in x.shape[3:])
        grid = dict(zip(("T", "H_patches", "W_patches"), grid if self.handle_nonsquare_inputs else [None] * 3, strict=True))
        x = self.patch_embed_img(x) if is_image else self.patch_embed(x)
        x += self.img_mod_embed if is_image else self.video_mod_embed
        if masks is not None:
            x, masks = apply_masks(x, masks), torch.cat(masks)
        levels = []
        for i, block in enumerate(self.blocks):
            if self.use_activation_checkpointing:
                x, _ = checkpoint(block, x, masks, **grid, use_reentrant=False, return_attn=self.attn_out)
            else:
                x, _ = block(x, mask=masks, **grid, return_attn=self.attn_out)
            if i in self.hierarchical_layers:
                levels.append(self.norms_block[self.hierarchical_layers.index(i)](x))
        if self.out_layers is not None:
            return levels
        return torch.cat(levels, 2) if training or self.return_hierarchical else self.norms_block[-1](x)
