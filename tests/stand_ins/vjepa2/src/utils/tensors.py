import torch


def repeat_interleave_batch(x, B, repeat):
    return torch.cat([batch for batch in x.split(B) for _ in range(repeat)])
