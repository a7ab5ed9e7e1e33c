"""Paged attention behind transformers' attention interface: writes keys and values to their slots, attends over slots.

Plain torch: gathered slots, scaled_dot_product_attention for prompts, matmul and softmax for single tokens (on a CPU
several times faster than the former for one query row). Rows never mix; sequences of like length are padded alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from weft.server.backbone.step import DecodeSpan, PrefillSpan, Step, active

NAME = "weft"

# keys and values of prefixes
Before = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class Form:
    """How a layer attends: softmax(softcap(scale·QKᵀ))V over the last ``window`` positions, or over all."""

    scale: float
    window: int | None
    softcap: float | None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over the pages of the active step.

    query:    [1, heads, tokens, key size], after rope
    key:      [1, kv heads, tokens, key size], after rope
    value:    [1, kv heads, tokens, value size]
    returns:  [1, tokens, heads, value size]
    """
    step = active()
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = step.kv.keys[layer], step.kv.values[layer]
    keys.index_copy_(1, step.write_slots, key[0])
    values.index_copy_(1, step.write_slots, value[0])
    form = Form(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    rows = query[0].transpose(0, 1)
    if step.decode and step.decode[0].rows is None:
        same = step.decode[0]
        return _decode(rows, keys, values, same, form, _prefixes(step, same, layer, keys.shape[0]))[None], None
    out = rows.new_empty(rows.shape[0], rows.shape[1], values.shape[-1])
    for same in step.decode:
        assert same.rows is not None
        before = _prefixes(step, same, layer, keys.shape[0])
        out.index_copy_(0, same.rows, _decode(rows.index_select(0, same.rows), keys, values, same, form, before))
    for span in step.prefill:
        before = _prefix(step, span, layer, keys.shape[0]) if span.prefixed else None
        out[span.start : span.stop] = _prefill(rows[span.start : span.stop], keys, values, span, form, before)
    return out[None], None


def _prefix(step: Step, span: PrefillSpan, layer: int, heads: int) -> Before:
    """Keys and values [kv heads, p, size] of the sequence's adapter at this layer, or None."""
    assert step.kernels is not None
    assert step.rows is not None
    return step.kernels.prefix(step.rows, span.start, layer, heads, step.attention_inputs.get(layer))


def _prefixes(step: Step, span: DecodeSpan, layer: int, heads: int) -> Before:
    """Keys and values [kv heads, sequences, p, size] of the sequences' adapters at this layer, or None."""
    if not span.prefixed:
        return None
    assert step.kernels is not None
    assert step.rows is not None
    return step.kernels.prefixes(step.rows, span.prefixed, layer, heads, step.attention_inputs.get(layer))


def _decode(rows: Tensor, keys: Tensor, values: Tensor, span: DecodeSpan, form: Form, before: Before) -> Tensor:
    """One query row per sequence: [sequences, heads, key size] → [sequences, heads, value size]."""
    count, heads, size = rows.shape
    kv_heads = keys.shape[0]
    # [kv heads, sequences, context, size]: gathered so that no product needs a copy
    k = keys.index_select(1, span.slots).view(kv_heads, count, span.context, -1)
    v = values.index_select(1, span.slots).view(kv_heads, count, span.context, -1)
    k, v = _behind(before, k, v)
    # [kv heads, sequences, heads per kv head, size]
    q = rows.reshape(count, kv_heads, heads // kv_heads, size).transpose(0, 1)
    mask = span.mask(form.window, k.shape[2] - span.context)[:, None]
    weights = _softmax(torch.matmul(q, k.transpose(2, 3)), mask, form)
    return torch.matmul(weights.to(v.dtype), v).transpose(0, 1).reshape(count, heads, -1)


def _prefill(rows: Tensor, keys: Tensor, values: Tensor, span: PrefillSpan, form: Form, before: Before) -> Tensor:
    """The query rows of one sequence: [rows, heads, key size] → [rows, heads, value size]."""
    count, heads, _ = rows.shape
    # [heads, rows or context, size]
    k, v = _behind(before, keys.index_select(1, span.slots), values.index_select(1, span.slots))
    q = rows.transpose(0, 1)
    kv_heads, context, _ = k.shape
    if form.softcap is None:
        whole = count == context and (form.window is None or context <= form.window)
        mask = None if whole else ~span.mask(form.window, context - len(span.slots))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=whole, scale=form.scale, enable_gqa=heads != kv_heads
        )
        return out[0].transpose(0, 1)
    grouped = q.reshape(kv_heads, heads // kv_heads, count, -1)
    mask = span.mask(form.window, context - len(span.slots))
    weights = _softmax(torch.matmul(grouped, k[:, None].transpose(2, 3)), mask, form)
    return torch.matmul(weights.to(v.dtype), v[:, None]).reshape(heads, count, -1).transpose(0, 1)


def _behind(before: Before, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [.., context, size] behind those of a prefix."""
    if before is None:
        return k, v
    return torch.cat([before[0].to(k.dtype), k], dim=-2), torch.cat([before[1].to(v.dtype), v], dim=-2)


def _softmax(scores: Tensor, mask: Tensor, form: Form) -> Tensor:
    """Attention weights in fp32; ``mask``, true where nothing may be seen, broadcasts over [..., context]."""
    scores = scores.float() * form.scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    return torch.softmax(scores.masked_fill(mask, float("-inf")), dim=-1)


def register() -> None:
    """Make ``attn_implementation="weft"`` known; no mask function is registered, so no mask is ever built."""
    AttentionInterface.register(NAME, paged_attention)
