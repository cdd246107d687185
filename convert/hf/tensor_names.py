"""Names of the tensors of Hugging Face checkpoints that conversion treats specially."""

from __future__ import annotations

import re

EMBEDDING = "transformer.wte.weight"
LM_HEAD = "lm_head.weight"
SLOPES = "transformer.relative_pe.slopes"
# Causal masks, which old checkpoints of the family store and the model rebuilds from the shape.
MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
