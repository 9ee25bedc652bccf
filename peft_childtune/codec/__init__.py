"""Children to bytes and back, in memory; the layout is in FORMAT.md."""

from .child import Demand, decode_child, encode_child, measure_child
from .header import FORMAT_VERSION
from .step import STEP_BYTES, advance_step_, is_resampled, read_step, step_view, write_step_

__all__ = [
    "FORMAT_VERSION",
    "STEP_BYTES",
    "Demand",
    "advance_step_",
    "decode_child",
    "encode_child",
    "is_resampled",
    "measure_child",
    "read_step",
    "step_view",
    "write_step_",
]
