class MaskCollator:
    def __init__(self, cfgs_mask, dataset_fpcs, crop_size=(224, 224), patch_size=(16, 16), tubelet_size=2):
        pass

    def __call__(self, batch):
        return batch
