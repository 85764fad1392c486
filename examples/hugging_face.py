"""V-JEPA 2 of Hugging Face, a model that is there already:  python examples/hugging_face.py"""

import time

import torch
from transformers import VJEPA2Config, VJEPA2Model

import jepa_fast

torch.manual_seed(0)
# as VJEPA2Model.from_pretrained("facebook/vjepa2-vitl-fpc64-256") would be, but small and random
model = VJEPA2Model(VJEPA2Config(crop_size=64, frames_per_clip=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
                                 pred_hidden_size=48, pred_num_hidden_layers=2, pred_num_attention_heads=4)).eval()
clips = torch.randn(2, 8, 3, 64, 64)


@torch.no_grad()
def predict() -> tuple[torch.Tensor, float]:
    """What the predictor makes of all tokens, and milliseconds: the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        out = model(clips).predictor_output.last_hidden_state
        seconds.append(time.perf_counter() - start)
    return out, 1e3 * min(seconds)


if __name__ == "__main__":
    before, ms_before = predict()
    report = jepa_fast.patches.auto(model)  # here the same as jepa_fast.patches.hf_vjepa2.apply(model)
    print(report)
    after, ms_after = predict()
    difference = float((after - before).abs().max())
    print(f"before {ms_before:.1f} ms, after {ms_after:.1f} ms, difference at most {difference:.1e}")
    report.undo()
