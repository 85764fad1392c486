from torch import nn


class MultiSeqWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks=None):
        if masks is None:
            return [self.backbone(clips) for clips in x]
        return [[self.backbone(clips, masks=mask) for mask in of_clips] for clips, of_clips in zip(x, masks, strict=True)]


class PredictorMultiSeqWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks_x, masks_y, has_cls=False):
        return [[self.backbone(*call, mask_index=i, has_cls=has_cls) for call in zip(*of_clips, strict=True)]
                for i, of_clips in enumerate(zip(x, masks_x, masks_y, strict=True))]
