class DeviceMultiCrop: pass
class Whole: pass
def pack_whole(x): pass
