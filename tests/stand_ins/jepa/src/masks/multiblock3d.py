"""Stand-in for the module of this name in facebookresearch/jepa: the constructor only."""


class MaskCollator:
    def __init__(self, cfgs_mask, crop_size=(224, 224), num_frames=16, patch_size=(16, 16), tubelet_size=2):
        pass
