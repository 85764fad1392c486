"""Pictures of what an encoder makes of clips: frames above, the principal components of their tokens below."""

from collections.abc import Mapping
from pathlib import Path

import torch
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
    frames = clips[:, :, ::clips.shape[2] // time].detach().cpu().float().clamp(0, 1)
    strips = {"clip": frames.expand(-1, 3, -1, -1, -1).permute(0, 2, 3, 4, 1)}                 # [B, time, H, W, 3]
    for name, features in tokens.items():
        colours, fraction = _colours(name, features, (time * rows, columns), len(clips))
        strips[f"{name}\n{100 * fraction:.0f} % of\nthe variance"] = colours.view(len(clips), time, rows, columns, 3)
    num_clips, (H, W) = min(num_clips, len(clips)), clips.shape[3:]
    tile_w, tile_h = 0.9, 0.9 * H / W   # inches
    with drawing(out_png, 1.1 + time * tile_w, 0.5 + num_clips * len(strips) * tile_h) as figure:
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.01)
        axes = figure.subplots(num_clips * len(strips), time, squeeze=False)
        for row, (i, (label, pictures)) in enumerate((i, strip) for i in range(num_clips) for strip in strips.items()):
            for ax, picture in zip(axes[row], pictures[i], strict=True):
                ax.imshow(picture.numpy(), interpolation="nearest", extent=(0, W, H, 0))
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", color=INK)
        figure.suptitle("Principal components of tokens over time, as RGB", x=0.01, ha="left")
    return Path(out_png)


def event_strips(pairs: Tensor, names: list[str], out_png: Path | str, *, num_frames: int = 12) -> Path:
    """Draw pairs uint8 [n, 2, C, T, H, W]: `names[i]`'s possible clip above its impossible one, evenly spaced frames."""
    n, _, _, T, H, W = pairs.shape
    if len(names) != n:
        raise ValueError(f"names must name each of the {n} pairs, got {len(names)}")
    chosen = torch.linspace(0, T - 1, min(num_frames, T)).round().long()
    pictures = pairs[:, :, :, chosen].expand(-1, -1, 3, -1, -1, -1).permute(0, 1, 3, 4, 5, 2)
    with drawing(out_png, 1.4 + 0.7 * len(chosen), 0.5 + 1.5 * n * H / W) as figure:
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01, hspace=0.01)
        axes = figure.subplots(2 * n, len(chosen), squeeze=False)
        for row, axes_of_row in enumerate(axes):
            for ax, picture in zip(axes_of_row, pictures[row // 2, row % 2], strict=True):
                ax.imshow(picture.numpy(), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
            axes_of_row[0].set_ylabel(f"{names[row // 2]}\n{('possible', 'impossible')[row % 2]}", rotation=0, ha="right",
                                      va="center", color=INK)
        figure.suptitle("Pairs of clips, equal up to the event", x=0.01, ha="left")
    return Path(out_png)
