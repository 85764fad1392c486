"""Images that the tests make themselves."""

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 60, height: int = 44, mode: str = "RGB") -> Image.Image:
    """A smooth random image with edges, so that crops and filters have something to get wrong."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 0, 40), (width // 3, height // 4, width // 2, height // 2))
    return image.convert(mode)
