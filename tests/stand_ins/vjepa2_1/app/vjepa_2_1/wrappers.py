from torch import nn


class MultiSeqWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks=None, gram_mode=False, training_mode=False):
        if masks is None:
            return [self.backbone(clips, training=training_mode) for clips in x]
        return [[self.backbone(clips, masks=mask, training=training_mode) for mask in of_clips]
                for clips, of_clips in zip(x, masks, strict=True)]


class PredictorMultiSeqWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks_x, masks_y, mod="video"):
        outs = [[self.backbone(*call, mask_index=i, mod=mod) for call in zip(*of_clips, strict=True)]
                for i, of_clips in enumerate(zip(x, masks_x, masks_y, strict=True))]
        return [[out[0] for out in of_clips] for of_clips in outs], [[out[1] for out in of_clips] for of_clips in outs]
