import torch
from src.models.utils.modules import Block, CrossAttention
from torch import nn


class AttentivePooler(nn.Module):
    def __init__(self, num_queries=1, embed_dim=768, num_heads=12, depth=1, complete_block=False):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, qkv_bias=True) for _ in range(depth - 1))
        self.cross_attention_block = CrossAttention(embed_dim, num_heads, qkv_bias=True)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.cross_attention_block(self.query_tokens.repeat(len(x), 1, 1), x)
