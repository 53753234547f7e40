"""The pieces of a Llama layer with their backward written out: only what is needed is kept or computed.

Frozen weights get no gradient, so the norms and products keep no more than their input, and the
backward of each is a handful of passes. Shapes: T tokens of many rows back to back, without padding.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from fedoppu.client.llama_attention import AttentionPlan, gather_sum


class _Norm(Function):
    """RMSNorm (Zhang and Sennrich 2019) whose weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        mean = wide.square().mean(-1, keepdim=True)
        factor = mean.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return wide.mul_(factor).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """With f the factor and g = dy * w: dx = f (g - x f^2 mean(g x))."""
        x, weight, factor = ctx.saved_tensors
        inner, wide = (gradients[0] * weight).float(), x.float()
        along = torch.linalg.vecdot(inner, wide).unsqueeze(-1).div_(-x.shape[-1])
        along.mul_(factor.square())
        return inner.addcmul_(wide, along).mul_(factor).to(x.dtype), None, None


class _Gated(Function):
    """silu(gate) * up (Shazeer 2020); silu is kept, its exponential costs more than the memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        active = functional.silu(gate)
        ctx.save_for_backward(gate, up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, active = ctx.saved_tensors
        gradient = gradients[0]
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * active


class _Rotated(Function):
    """Rotary positions (Su et al. 2021); the backward is the rotation by the opposite angle.

    The tables are as wide as x: without broadcasting each pass is one long loop, 2-4 times as fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return (x * cosine).add_(_halves_swapped(x).mul_(sine))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        (turned,) = gradients
        return (turned * cosine).sub_(_halves_swapped(turned).mul_(sine)), None, None


def _halves_swapped(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), -1)


class _Adapted(Function):
    """Adds B_u A_u x to the output rows of each user u; the users' rows follow each other.

    The factors, what is between them, and their gradients are float32 whatever the base computes
    in; a product whose result is added to the base's has the base's dtype, in one pass. What has
    one number for each rank is (rank, rows), since a product with few columns is 2-4 times as slow
    as one with few rows.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: tuple[int, ...]
    ) -> Tensor:
        inner = []
        upward = b.to(output.dtype).transpose(1, 2)
        for user, span in enumerate(_slices(spans)):
            inner.append(_inner(x[span], a[user]))
            output[span].addmm_(inner[user].t().to(output.dtype), upward[user])
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, a, b, *inner)
        ctx.spans = spans
        return output

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        x, a, b, *inner = ctx.saved_tensors
        gradient = gradients[0]
        needs_x, needs_a, needs_b = ctx.needs_input_grad[1:4]
        of_x = torch.empty_like(x) if needs_x else None
        of_a = torch.empty_like(a) if needs_a else None
        of_b = torch.empty_like(b) if needs_b else None
        downward = a.to(x.dtype)
        for user, span in enumerate(_slices(ctx.spans)):
            wide = gradient[span].float()
            if of_b is not None:
                of_b[user] = (inner[user] @ wide).t()
            if of_a is None and of_x is None:
                continue
            inward = b[user].t() @ wide.t()
            if of_a is not None:
                torch.mm(inward, x[span].float(), out=of_a[user])
            if of_x is not None:
                torch.mm(inward.t().to(x.dtype), downward[user], out=of_x[span])
        if of_x is not None:
            of_x[ctx.spans[-1] :].zero_()
        return gradient, of_x, of_a, of_b, None


def _inner(x: Tensor, a: Tensor) -> Tensor:
    """(rank, rows) A x in float32.

    Of a float32 x it is summed the slower way, which rounds half as much; a bfloat16 x is rounded
    far more than either.
    """
    return (x @ a.t()).t() if x.dtype == a.dtype else a @ x.float().t()


def _slices(spans: tuple[int, ...]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(spans)]


class _Attended(Function):
    """Softmax attention of groups of rows of similar length, scores written out.

    In bf16 on a CPU this is 1.9-4.8 times as fast as scaled_dot_product_attention.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        parts, kept = [], []
        width = query.shape[-1]
        q, k, v = (tensor.reshape(-1, width) for tensor in (query, key, value))
        for group in plan.groups:
            batch = (group.batch, -1, width)
            queries = q.index_select(0, group.queries).view(batch)
            keys = k.index_select(0, group.keys).view(batch)
            values = v.index_select(0, group.keys).view(batch)
            scores = torch.bmm(queries, keys.transpose(1, 2))
            scores.view(group.shape).add_(group.mask)
            shares = torch.softmax(scores, -1)
            parts.append(torch.bmm(shares, values).view(-1, width))
            kept += [queries, keys, values, shares]
        ctx.save_for_backward(*kept)
        ctx.plan, ctx.keys = plan, key.shape
        return torch.cat(parts).index_select(0, plan.found).view(query.shape)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        plan, width = ctx.plan, gradients[0].shape[-1]
        gradient = gradients[0].reshape(-1, width)
        needs = ctx.needs_input_grad[:3]
        of: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        saved = ctx.saved_tensors
        for index, group in enumerate(plan.groups):
            queries, keys, values, shares = saved[4 * index : 4 * index + 4]
            outer = gradient.index_select(0, group.queries)
            outer = outer.index_fill_(0, group.padding, 0.0).view(group.batch, -1, width)
            if needs[2]:
                of[2].append(torch.bmm(shares.transpose(1, 2), outer).view(-1, width))
            if not (needs[0] or needs[1]):
                continue
            scores = torch.bmm(outer, values.transpose(1, 2))
            scores = torch._softmax_backward_data(scores, shares, -1, shares.dtype)
            if needs[0]:
                of[0].append(torch.bmm(scores, keys).view(-1, width))
            if needs[1]:
                of[1].append(torch.bmm(scores.transpose(1, 2), queries).view(-1, width))
        query = torch.cat(of[0]).index_select(0, plan.found) if needs[0] else None
        key, value = (gather_sum(torch.cat(part), plan) if part else None for part in of[1:])
        return (
            None if query is None else query.view(gradients[0].shape),
            None if key is None else key.view(ctx.keys),
            None if value is None else value.view(ctx.keys),
            None,
        )


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """(T, width) x divided by its root mean square, times the frozen weight."""
    return _Norm.apply(x, weight, epsilon)  # type: ignore[no-any-return,no-untyped-call]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """(T, inner) silu(gate) * up."""
    return _Gated.apply(gate, up)  # type: ignore[no-any-return,no-untyped-call]


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns each pair of coordinates of x.

    Args:
        x: (T, heads, head width).
        cosine: Like x.
        sine: Like x; negative in the first half of a head.
    """
    return _Rotated.apply(x, cosine, sine)  # type: ignore[no-any-return,no-untyped-call]


def adapt(output: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: tuple[int, ...]) -> Tensor:
    """Adds the adapters' part to a product's output, in place.

    Args:
        output: (T, out), of no one else's use.
        x: (T, in).
        a: (users, rank, in) float32.
        b: (users, out, rank) float32, scaled.
        spans: (users + 1,) where each user's tokens begin, and the end.
    """
    return _Adapted.apply(output, x, a, b, spans)  # type: ignore[no-any-return,no-untyped-call]


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """(queries, heads, head width) attention; keys and values are (T, key heads, head width)."""
    return _Attended.apply(query, key, value, plan)  # type: ignore[no-any-return,no-untyped-call]
