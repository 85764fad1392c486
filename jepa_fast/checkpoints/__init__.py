"""Other people's checkpoints, to ours and back.

`read` takes any file or folder; `load_checkpoint` and `load_encoder` put one role of it into a module;
`load_official` and `save_official` carry a whole objective with its optimizer; `convert` goes from any format to any
other; `released` says where the official files are.
"""

from .convert import convert
from .load import Report, infer_config, load_checkpoint, load_encoder, load_official
from .native import export
from .official import save_official
from .released import released
from .sniff import Foreign, read

__all__ = ["Foreign", "Report", "convert", "export", "infer_config", "load_checkpoint", "load_encoder", "load_official",
           "read", "released", "save_official"]
