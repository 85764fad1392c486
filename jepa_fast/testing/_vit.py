"""Shapes of the parameters of real runs, in the order of the official state dicts."""


def vit_shapes(embed_dim: int, depth: int, patch_size: int = 16, num_tokens: int = 196) -> list[tuple[int, ...]]:
    """Of an encoder: frozen position table, patch embedding, blocks, last norm."""
    D = embed_dim
    shapes = [(1, num_tokens, D), (D, 3, patch_size, patch_size), (D,)]
    return shapes + depth * _block(D) + [(D,), (D,)]


def predictor_shapes(embed_dim: int, predictor_dim: int, depth: int) -> list[tuple[int, ...]]:
    """Of an I-JEPA predictor, without its frozen position table."""
    D, E = predictor_dim, embed_dim
    return [(1, 1, D), (D, E), (D,)] + depth * _block(D) + [(D,), (D,), (E, D), (E,)]


def _block(D: int) -> list[tuple[int, ...]]:
    return [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,)]
