"""Named configurations: the released model, its muP ladder, and a tiny model for tests."""

from __future__ import annotations

from typing import Any

# muP base width of the family: the hyper-parameters were tuned at this n_embd.
MUP_BASE_WIDTH = 256

# Shared by every preset: fields of the released model that do not depend on its size.
_BTLM: dict[str, Any] = dict(
    activation_function="swiglu",
    position_embedding_type="alibi",
    initializer_range=0.073,
    mup_embeddings_scale=14.6,
    mup_output_alpha=2.2200000000000003,
    mup_scale_qk_dot_by_d=True,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)


def _ladder(width: int) -> dict[str, Any]:
    """Returns a rung of the muP ladder: the released model with only the width changed.

    Depth stays 32, heads are 64 wide, n_inner follows floor(8/3 * width) as 6826 does for 2560.
    """
    return _BTLM | dict(
        n_positions=8192,
        n_embd=width,
        n_layer=32,
        n_head=width // 64,
        n_inner=8 * width // 3,
        mup_width_scale=MUP_BASE_WIDTH / width,
    )


# Fields of `BTLMConfig` by name of the preset.
PRESETS: dict[str, dict[str, Any]] = {
    "btlm-3b-8k": _BTLM
    | dict(n_positions=8192, n_embd=2560, n_layer=32, n_head=32, n_inner=6826, mup_width_scale=0.1),
    # Small enough for a test; its muP base width is 32.
    "tiny": _BTLM
    | dict(
        vocab_size=512,
        n_positions=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=170,
        mup_width_scale=0.5,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "btlm-40m": _ladder(256),
    "btlm-130m": _ladder(512),
    "btlm-450m": _ladder(1024),
    "btlm-1.7b": _ladder(2048),
}
