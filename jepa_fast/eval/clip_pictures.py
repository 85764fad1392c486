"""Pictures of what an encoder makes of clips: frames above, the principal components of their tokens below."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ._style import INK, drawing
from .pictures import _colours


def clip_strips(tokens: Mapping[str, Tensor], grid: tuple[int, int, int], clips: Tensor, out_png: Path | str, *,
                num_clips: int = 4) -> Path:
    """Draw a strip per clip: a frame of each time step, and below it the tokens of that step, coloured.

    tokens names [B, N, D] each, such as {"untrained": ..., "trained": ...}; grid (time steps, rows, columns), N tokens
    in this order; clips [B, 1 or 3, T, H, W] in [0, 1], of which the first frame of each time step is drawn. Red, green
    and blue are the first three components of all tokens of all clips and times together: colours compare over time and
    between clips, not between encoders. Returns the path. Raises ValueError for shapes that do not fit.
    """
    time, rows, columns = grid
    if clips.dim() != 5 or clips.shape[1] not in (1, 3) or clips.shape[2] % time:
        raise ValueError(f"clips must be [B, 1 or 3, T, H, W] in [0, 1], T a multiple of {time}, got {list(clips.shape)}")
    if num_clips < 1 or not tokens:
        raise ValueError(f"num_clips and the tokens must be at least one, got {num_clips} and {len(tokens)}")
    B, size = len(clips), clips.shape[3:]
    frames = clips[:, :, ::clips.shape[2] // time].detach().cpu().float().clamp(0, 1)
    strips = {"clip": frames.expand(-1, 3, -1, -1, -1).transpose(1, 2)}                        # [B, time, 3, H, W]
    for name, features in tokens.items():
        colours, fraction = _colours(name, features, (time * rows, columns), B)
        tiles = colours.view(B * time, rows, columns, 3).permute(0, 3, 1, 2).float()
        tiles = F.interpolate(tiles, size=size, mode="nearest-exact")
        strips[f"{name}\n{100 * fraction:.0f} % of\nthe variance"] = tiles.view(B, time, 3, *size)
    shown = range(min(num_clips, B))
    return _draw_rows([(label, strip[i]) for i in shown for label, strip in strips.items()],
                      "Principal components of tokens over time, as RGB", out_png)


def event_strips(pairs: Tensor, names: Sequence[str], out_png: Path | str, *, num_frames: int = 12) -> Path:
    """Draw pairs uint8 [n, 2, 1 or 3, T, H, W]: possible above impossible, some frames of each."""
    if pairs.dim() != 6 or pairs.shape[1] != 2 or pairs.shape[2] not in (1, 3) or len(names) != len(pairs):
        raise ValueError(f"pairs must be [{len(names)}, 2, 1 or 3, T, H, W], one per name, got {list(pairs.shape)}")
    chosen = torch.linspace(0, pairs.shape[3] - 1, min(num_frames, pairs.shape[3])).round().long()
    pictures = (pairs[:, :, :, chosen].cpu() / 255).expand(-1, -1, 3, -1, -1, -1).transpose(2, 3)
    return _draw_rows([(f"{name}\n{which}", clip) for name, pair in zip(names, pictures, strict=True)
                       for which, clip in zip(("possible", "impossible"), pair, strict=True)],
                      "Pairs of clips, equal up to the event", out_png)


def _draw_rows(rows: list[tuple[str, Tensor]], title: str, out_png: Path | str) -> Path:
    """Rows of (label, pictures [n, 3, H, W] in [0, 1]); each is one image, tiles side by side."""
    n, _, H, W = rows[0][1].shape
    gap = max(1, W // 24)
    tile = 0.9   # inches
    with drawing(out_png, 1.2 + n * tile, 0.5 + len(rows) * tile * H / W) as figure:
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.01)
        axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        for ax, (label, tiles) in zip(axes, rows, strict=True):
            strip = F.pad(tiles, (0, gap), value=1.0).permute(2, 0, 3, 1).reshape(H, n * (W + gap), 3)[:, :-gap]
            ax.imshow(strip.numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_ylabel(label, rotation=0, ha="right", va="center", color=INK)
        figure.suptitle(title, x=0.01, ha="left")
    return Path(out_png)
