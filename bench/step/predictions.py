"""What the performance model expects of one H200, and what was asked for: to stand beside what is measured."""

# ms of the reference and of an ideal exact engine, in the order of profile.COMPONENTS; 790 TFLOP/s, 4.3 TB/s
MODEL_MS = {
    "ijepa_vith14": ((63, 52, 19, 10, 134, 2, 22, 7), (52, 44, 12.5, 9, 10, 0.5, 6, 0)),
    "vjepa_vitl16": ((36, 32, 18, 56, 60, 2, 14, 36), (29, 26, 12, 31, 6, 0.5, 3, 0)),
    "vjepa2_vitl16": ((46, 57, 32, 96, 164, 2.5, 10, 6), (38, 35, 16, 47, 8, 0.7, 3, 0)),
    "vjepa2_vitg16": ((150, 183, 32, 147, 297, 3, 31, 6), (126, 118, 16, 79, 15, 1, 10, 0)),
    "vjepa2_ac_vitg": ((52, 0, 75, 78, 110, 0, 7, 3), (42, 0, 40, 17, 5, 0, 2, 0)),
}
MODEL_BATCH = {"ijepa_vith14": 128, "vjepa_vitl16": 24, "vjepa2_vitl16": 24, "vjepa2_vitg16": 24, "vjepa2_ac_vitg": 8}

# times as fast as the official code, as the tuned one, share of the device's peak; on one H200
GOALS = {"ijepa_vith14": (2.3, 1.5, 0.64), "vjepa2_vitl16": (2.8, None, 0.58), "vjepa2_vitg16": (2.3, None, None),
         "vjepa2_ac_vitg": (3.0, None, None)}
# two cores of a CPU, float32, ViT-S: times as fast as the official code
CPU_GOALS = {"ijepa": 2.0, "vjepa2": 3.0}
