"""Peak memory of encoding one clip with ViT-L/16, each dtype in a process of its own."""

import dataclasses
import json
import resource
import subprocess
import sys
import time

import torch

from jepa_fast.recipes import get_recipe


def encode(dtype: str, depth: int | None = None) -> dict:
    """One 64 x 256 x 256 clip through the encoder of V-JEPA 2's ViT-L cool-down, all of it in `dtype`."""
    config = get_recipe("vjepa2_vitl16_cooldown").objective.encoder
    config = dataclasses.replace(config, depth=depth or config.depth)
    torch.set_default_dtype(getattr(torch, dtype))
    encoder = config.build().eval()
    clip = torch.randn(1, config.in_chans, config.num_frames, config.image_size, config.image_size)
    start = time.perf_counter()
    with torch.inference_mode():
        tokens = encoder(clip)
    seconds = time.perf_counter() - start
    if tokens.dtype != clip.dtype or not tokens.isfinite().all():
        raise RuntimeError(f"tokens must be finite {clip.dtype}, got {tokens.dtype}")
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def bench_video_memory(depth: int | None = None) -> list[dict]:
    """A row per dtype; `peak_mb` is the whole process, PyTorch included."""
    rows = []
    for dtype in ("float32", "bfloat16", "float16"):
        code = f"from bench.video_memory import encode, json; print(json.dumps(encode({dtype!r}, {depth})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{dtype}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout)
        rows.append({"bench": "video-memory", "case": "vitl16-64x256-b1", "provider": f"ours, {dtype}",
                     "ms": result["seconds"] * 1e3, "peak_mb": result["peak_bytes"] / 1e6})
    return rows
