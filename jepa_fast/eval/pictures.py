"""Pictures of features by their principal components: patches as colours, samples as a scatter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._check import check_features, check_labels
from ._style import INK, drawing
from .pca import principal_components


def pca_features(patch_features: Tensor, grid: tuple[int, int], images: Tensor, out_png: Path | str, *,
                 untrained: Tensor | None = None, num_images: int = 8) -> Path:
    """Draw images above their patches, coloured by the first three principal components of patch_features [B, N, D].

    grid (h, w) of patches, row by row, h * w = N; images [B, C, H, W] in [0, 1], C = 1 or 3; `untrained` [B, N, any D]
    is drawn between the two. Components are those of all patches of the batch. Red, green and blue run from percentile
    1 to 99 of the first, second and third: colours compare along a row of the picture, not between rows. The first
    `num_images` samples are drawn. Returns the path. Raises ValueError for shapes that do not fit.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images must be [B, 1 or 3, H, W] in [0, 1], got {list(images.shape)}")
    if num_images < 1:
        raise ValueError(f"num_images must be >= 1, got {num_images}")
    rows = [("image", images.detach().cpu().float().clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1))]
    named = {"features": patch_features} if untrained is None else {"untrained": untrained, "trained": patch_features}
    for name, features in named.items():
        colours, fraction = _colours("untrained" if name == "untrained" else "patch_features", features, grid,
                                     images.shape[0])
        rows.append((f"{name}\n{100 * fraction:.0f} % of\nthe variance", colours))
    num_columns = min(num_images, images.shape[0])
    tile_w, tile_h = 1.15, 1.15 * images.shape[2] / images.shape[3]   # inches
    with drawing(out_png, max(3.4, 1.0 + num_columns * tile_w), 0.5 + len(rows) * tile_h) as figure:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        axes = figure.subplots(len(rows), num_columns, squeeze=False)
        for row, (label, pictures) in enumerate(rows):
            for ax, picture in zip(axes[row], pictures, strict=False):   # more samples than columns
                ax.imshow(picture.numpy(), interpolation="nearest", extent=(0, images.shape[3], images.shape[2], 0))
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", color=INK)
        figure.suptitle("Principal components of patches, as RGB", x=0.01, ha="left")
    return Path(out_png)


def _colours(name: str, features: Tensor, grid: tuple[int, int], num_images: int) -> tuple[Tensor, float]:
    """features [B, N, D] -> colours [B, h, w, 3] in [0, 1], and the fraction of the variance they show."""
    if features.dim() != 3 or features.shape[:2] != (num_images, grid[0] * grid[1]):
        raise ValueError(f"{name} must be [{num_images}, {grid[0] * grid[1]}, D] for {num_images} images and a grid of "
                         f"{grid[0]} x {grid[1]}, got {list(features.shape)}")
    components, fraction = principal_components(features.flatten(0, 1), 3)
    low, high = torch.quantile(components, torch.tensor([0.01, 0.99], dtype=components.dtype), dim=0)
    # a component without spread is neutral grey
    colours = torch.where(high > low, (components - low) / (high - low), 0.5).clamp(0, 1)
    return colours.reshape(num_images, *grid, 3), float(fraction.sum())


def features_scatter(features: Tensor, labels: Tensor, out_png: Path | str, *, title: str = "Features by class",
                     class_names: Sequence[str] | None = None) -> Path:
    """Draw features [n, D] over their first two principal components, coloured by labels [n] int64 >= 0.

    Up to 20 classes are named in a legend and at the median of their points, more get a colour bar. `class_names[i]`
    names class i. Returns the path. Raises ValueError for what does not fit.
    """
    check_features("features", features)
    check_labels("labels", labels, "features", features)
    labels = labels.cpu()
    num_classes = int(labels.max()) + 1
    names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
    if len(names) < num_classes:
        raise ValueError(f"class_names must name all {num_classes} classes, got {len(names)}")
    points, fraction = principal_components(features, 2)
    x, y = points.unbind(1)
    with drawing(out_png, 6.4, 5.2) as figure:
        import matplotlib
        from matplotlib.colors import BoundaryNorm
        from matplotlib.patheffects import withStroke

        ax = figure.subplots()
        few = num_classes <= 20
        colours = matplotlib.colormaps["tab10" if num_classes <= 10 else "tab20" if few else "turbo"]
        # one call for all classes: no class hides another because it is drawn later
        size = float(max(5, min(40, 12000 / len(labels))))
        dots = ax.scatter(x, y, c=labels, s=size, cmap=colours, alpha=0.7, linewidths=0,
                          norm=BoundaryNorm(range(colours.N + 1), colours.N) if few else None)
        for i in labels.unique().tolist() if few else []:
            member = labels == i
            ax.scatter([], [], s=30, color=colours(i), label=names[i])
            ax.annotate(names[i], (x[member].median(), y[member].median()), ha="center", va="center", fontsize=11,
                        weight="bold", color=INK, path_effects=[withStroke(linewidth=3, foreground="white")])
        if few:
            ax.legend(title="class", loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            figure.colorbar(dots, ax=ax, label="class")
        ax.set(title=title, xlabel=f"principal component 1 ({100 * fraction[0]:.0f} % of the variance)",
               ylabel=f"principal component 2 ({100 * fraction[1]:.0f} % of the variance)")
    return Path(out_png)
