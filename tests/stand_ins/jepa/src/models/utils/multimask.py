"""Stand-in for the module of this name in facebookresearch/jepa."""

from torch import nn


class MultiMaskWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks=None):
        if masks is None:
            return self.backbone(x)
        return [self.backbone(x, masks=mask) for mask in (masks if isinstance(masks, list) else [masks])]


class PredictorMultiMaskWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, ctxt, tgt, masks_ctxt, masks_tgt):
        return [self.backbone(*lists, mask_index=i)
                for i, lists in enumerate(zip(ctxt, tgt, masks_ctxt, masks_tgt, strict=True))]
