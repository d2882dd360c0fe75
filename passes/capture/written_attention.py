"""Attention that a model writes out, captured as the fused op that frameworks have a kernel for.

    queries @ keys -> scale, cap, mask, bias, sinks -> softmax -> dropout, sinks left out -> @ values

Only for prices: the op computes neither caps nor sinks nor dropout, which a kernel does on scores that it holds in
registers. Followed are functions of torch as the model calls them, before autograd, so that backward is the op's own.
What is not known on the way (a product with anything else, a learned bias, a shape that no kernel takes) ends it, and
the model's own ops stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

F = nn.functional

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_DIFFERENCES = {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__}
_SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_DROPOUTS = {F.dropout, torch.dropout}
_FILLS = {torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_}
_CHOICES = {torch.where, Tensor.where}
_JOINS = {torch.cat, torch.concat, torch.concatenate}
_VIEWS = {Tensor.view, Tensor.reshape, torch.reshape}
_TIMES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}
_CASTS = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.type_as}
_ALIKE = {
    *_TIMES,
    *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__),
    *(torch.tanh, Tensor.tanh, F.tanh, Tensor.tanh_),
    *(Tensor.contiguous, torch.clone, Tensor.clone, torch.nan_to_num, Tensor.nan_to_num),
}
"""What leaves one number of scores or weights one number, by itself and by numbers or constants."""
_SOME = {Tensor.__getitem__, Tensor.narrow, torch.narrow}
_INTERLEAVES = {torch.repeat_interleave, Tensor.repeat_interleave}
_EXPANDS = {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to}
_TURNS = {Tensor.transpose, torch.transpose, Tensor.permute, Tensor.swapaxes}


@dataclass(frozen=True)
class _Scores:
    """Scores on their way to weights: of which queries (..., s, d) and keys (..., d, t), what was added to them and
    what hides keys of them (True where seen), and whether they are weights by now. `keys`: t, where sinks make it more
    than the scores' own last dim has."""

    query: Tensor
    key: Tensor
    added: tuple[Tensor, ...] = ()
    seen: tuple[Tensor, ...] = ()
    weights: bool = False

    @property
    def keys(self) -> int:
        return int(self.key.shape[-1])


@dataclass
class WrittenAttention:
    """Follows what a model calls; `count`: of attentions that it wrote out, captured as fused ops."""

    count: int = 0
    _scores: dict[int, tuple[Tensor, _Scores]] = field(default_factory=dict)
    """By a tensor's id, the tensor too, so that no other gets its id."""
    _grouped: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The same, and what it repeats."""

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """What `func` gives, which `run` computes."""
        product = _product(func, args)
        if product is not None and (weights := self._of(product.a)) is not None and weights.weights:
            made = self._attended(weights, product)
            if made is not None:
                return made
        if func is F.scaled_dot_product_attention:
            args, kwargs = _without_dropout(args, kwargs)
        out = run(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and out.dim() >= 3:
            self._repeats(func, args, kwargs, out)
            if (found := _scores_of(product, out) or self._followed(func, args, kwargs, out)) is not None:
                self._scores[id(out)] = out, found
            else:  # it may have been changed in place
                self._scores.pop(id(out), None)
        return out

    def _repeats(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        """Notes keys or values that are repeated for each query head of a group: by `repeat_interleave`, or by a dim of
        one that is expanded and joined to the heads. Turned round they are still."""
        given = args[0] if args else None
        if not isinstance(given, Tensor):
            return
        known = self._grouped.get(id(given))
        if func in _INTERLEAVES:
            dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
            if dim is not None and given.dim() == 4 and dim % 4 == 1 and given.shape[1]:
                self._grouped[id(out)] = out, given
        elif func in _EXPANDS and given.dim() == out.dim() == 5 and given.shape[2] == 1 < out.shape[2]:
            self._grouped[id(out)] = out, given.squeeze(2)
        elif known is not None and func in _VIEWS and given.dim() == 5 and out.dim() == 4:
            if out.shape[1] == given.shape[1] * given.shape[2]:
                self._grouped[id(out)] = out, known[1]
        elif known is not None and func in _TURNS and out.shape[:2] == given.shape[:2]:
            self._grouped[id(out)] = out, known[1].transpose(-1, -2)

    def _unrepeated(self, tensor: Tensor) -> Tensor:
        found = self._grouped.get(id(tensor))
        return tensor if found is None else found[1]

    def _of(self, value: Any) -> _Scores | None:
        found = self._scores.get(id(value))
        return found[1] if found is not None else None

    def _followed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> _Scores | None:
        """What `out` is, where it is scores or weights."""
        if func in _JOINS and args:
            return self._with_sinks(args[0], out)
        if func in _CHOICES:
            return self._chosen(func, args)
        of = [(arg, self._of(arg)) for arg in args if isinstance(arg, Tensor)]
        followed = [(arg, scores) for arg, scores in of if scores is not None]
        if func not in _RULES or len(followed) != 1:
            return None
        ((given, scores),) = followed
        if args[0] is not given and func not in _SUMS | _TIMES:
            return None
        others = [arg for arg, known in of if known is None and arg.numel() > 1]
        return _RULES[func](_Step(func, args, kwargs, given, scores, others, out))

    def _with_sinks(self, parts: Any, out: Tensor) -> _Scores | None:
        """Scores with further ones behind them, which have no values."""
        if not isinstance(parts, (list, tuple)) or len(parts) != 2:
            return None
        scores = self._of(parts[0])
        behind = scores is not None and not scores.weights and out.shape[:-1] == parts[0].shape[:-1]
        return scores if behind else None

    def _chosen(self, func: Any, args: Sequence[Any]) -> _Scores | None:
        """`torch.where(seen, scores, hidden)`, or `scores.where(seen, hidden)`."""
        if len(args) != 3:
            return None
        choice, given = (args[1], args[0]) if func is Tensor.where else (args[0], args[1])
        scores = self._of(given)
        if scores is None or scores.weights or not isinstance(choice, Tensor):
            return None
        return replace(scores, seen=(*scores.seen, choice))

    def _attended(self, scores: _Scores, product: _Product) -> Tensor | None:
        """The fused op; None where it takes no such operands."""
        weights, value = product.a, product.b
        lead = weights.shape[:-2]
        if len(lead) not in (1, 2) or weights.shape[-1] != scores.keys or value.shape[:-1] != (*lead, scores.keys):
            return None
        query, key = scores.query, self._unrepeated(scores.key).transpose(-1, -2)
        if query.dim() != value.dim():  # heads were joined to the batch, or told apart again, on the way
            query = query.reshape(*lead, *query.shape[-2:])
            key = scores.key.transpose(-1, -2).reshape(*lead, scores.keys, query.shape[-1])
        if value.shape[-1] > query.shape[-1]:
            return None
        if len(lead) == 1:
            query, key, value = (each.unsqueeze(1) for each in (query, key, value))
        value = self._unrepeated(value) if key.shape[1] != query.shape[1] else value
        if key.shape[1] != value.shape[1]:
            return None
        mask = _mask(scores, (*lead, *weights.shape[-2:]))
        mask = mask.unsqueeze(1) if mask is not None and len(lead) == 1 and mask.dim() == 3 else mask
        made = _attention(query.to(value.dtype), key.to(value.dtype), value, mask)
        self.count += 1
        return product.placed(made.squeeze(1) if len(lead) == 1 else made)


@dataclass(frozen=True)
class _Product:
    """A product of matrices, (..., m, k) by (..., k, n): `a` and `b` as that takes them; `added`: to what it gives;
    `places`: where dims of its result lie in the call's."""

    a: Tensor
    b: Tensor
    added: Tensor | None = None
    places: tuple[int, ...] | None = None

    def placed(self, made: Tensor) -> Tensor:
        """What the call gives."""
        return made if self.places is None else made.permute(self.places)


def _product(func: Any, args: Sequence[Any]) -> _Product | None:
    """The product of activations that a call is."""
    found: _Product | None = None
    if func in _PRODUCTS and len(args) == 2:
        found = _Product(args[0], args[1])
    elif func in _ADDED_PRODUCTS and len(args) == 3:
        found = _Product(args[1], args[2], args[0])
    elif func is torch.einsum and len(args) == 3 and isinstance(args[0], str):
        return _of_letters(args[0], args[1], args[2])
    if found is None or not isinstance(found.a, Tensor) or not isinstance(found.b, Tensor):
        return None
    alike = found.a.dim() == found.b.dim() in (3, 4) and found.a.shape[:-2] == found.b.shape[:-2]
    return found if alike else None


def _of_letters(equation: str, a: Any, b: Any) -> _Product | None:
    """An einsum that is such a product, of which `a` has its rows."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    left, comma, right = given.partition(",")
    letters = left, right, result
    if not (arrow and comma) or any(not each.isalpha() or len(set(each)) != len(each) for each in letters):
        return None
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not {a.dim(), b.dim(), len(result)} <= {3, 4}:
        return None
    lead = [x for x in left if x in right and x in result]
    (m, k, n) = (
        [x for x in one if (x in two) == inside and x not in lead]
        for one, two, inside in ((left, result, True), (left, right, True), (right, result, True))
    )
    if not len(m) == len(k) == len(n) == 1 or {len(each) for each in letters} != {len(lead) + 2}:
        return None
    rows, columns, made = [*lead, *m, *k], [*lead, *k, *n], [*lead, *m, *n]
    turned = [left.index(x) for x in rows]
    return _Product(
        a if turned == sorted(turned) else a.permute(turned), b.permute([right.index(x) for x in columns]),
        places=tuple(made.index(x) for x in result),
    )  # fmt: skip


def _scores_of(product: _Product | None, out: Tensor) -> _Scores | None:
    """What any such product may come to be."""
    if product is None or (product.places is not None and list(product.places) != sorted(product.places)):
        return None
    made = _Scores(product.a, product.b)
    return made if product.added is None else _with_added(made, product.added)


def _with_added(scores: _Scores, added: Any) -> _Scores | None:
    """With a mask or distances; what is learned no kernel adds."""
    if not isinstance(added, Tensor):
        return scores
    return None if added.requires_grad else replace(scores, added=(*scores.added, added))


@dataclass(frozen=True)
class _Step:
    """A call that reads scores or weights, `given`; `others`: tensors of more than one number that it reads too."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    given: Tensor
    scores: _Scores
    others: Sequence[Tensor]
    out: Tensor

    @property
    def keeps_shape(self) -> bool:
        return self.out.shape == self.given.shape


def _softmaxed(step: _Step) -> _Scores | None:
    dim = step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else None)
    last = dim in (-1, step.given.dim() - 1) and not step.scores.weights
    return replace(step.scores, weights=True) if last else None


def _dropped(step: _Step) -> _Scores | None:
    return step.scores if step.scores.weights else None


def _without_sinks(step: _Step) -> _Scores | None:
    """Weights without those of sinks, which lie behind the others."""
    first = step.out.storage_offset() == step.given.storage_offset()
    taken = first and step.out.shape == (*step.given.shape[:-1], step.scores.keys)
    return step.scores if step.scores.weights and taken else None


def _viewed(step: _Step) -> _Scores | None:
    """Where heads are joined to the batch or told apart again."""
    same = step.out.dim() in (3, 4) and step.out.shape[-2:] == step.given.shape[-2:]
    return step.scores if same else None


def _cast(step: _Step) -> _Scores | None:
    return step.scores if step.keeps_shape else None


def _filled(step: _Step) -> _Scores | None:
    if step.scores.weights or len(step.args) != 3 or not isinstance(step.args[1], Tensor):
        return None
    return replace(step.scores, seen=(*step.scores.seen, ~step.args[1]))


def _summed(step: _Step) -> _Scores | None:
    if step.scores.weights or not step.keeps_shape:
        return None
    if not step.others or step.others[0].shape[-1] == 1:  # the same of every key, such as their maximum
        return step.scores
    return _with_added(step.scores, step.others[0]) if step.func in _SUMS else None


def _alike(step: _Step) -> _Scores | None:
    constant = not step.others if step.scores.weights else not any(each.requires_grad for each in step.others)
    return step.scores if step.keeps_shape and constant else None


_RULES: dict[Any, Callable[[_Step], _Scores | None]] = {
    func: rule
    for functions, rule in (
        (_SOFTMAXES, _softmaxed),
        (_DROPOUTS, _dropped),
        (_SOME, _without_sinks),
        (_VIEWS, _viewed),
        (_CASTS, _cast),
        (_FILLS, _filled),
        (_SUMS | _DIFFERENCES, _summed),
        (_ALIKE, _alike),
    )
    for func in functions
}
"""What calls make of scores or weights; None where that is neither."""


def _mask(scores: _Scores, shape: Sequence[int]) -> Tensor | None:
    """What is added to scores and hidden of them, as one mask that fits `shape`."""
    parts = [_fitting(part, shape) for part in (*scores.added, *scores.seen)]
    if not parts:
        return None
    added, seen = parts[: len(scores.added)], parts[len(scores.added) :]
    if not added:
        shown = seen[0]
        for part in seen[1:]:
            shown = shown & part
        return shown
    mask = added[0]
    for part in added[1:]:
        mask = mask + part
    for part in seen:
        mask = mask.masked_fill(~part, -math.inf)
    return mask


def _fitting(part: Tensor, shape: Sequence[int]) -> Tensor:
    """A part of a mask that was given for scores with heads joined to the batch, or told apart."""
    if part.dim() <= len(shape):
        return part
    return part.expand(-1, shape[0] // part.shape[0], -1, -1).reshape(shape[0], *part.shape[-2:])


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`F.scaled_dot_product_attention`, of values that may have a smaller head size."""
    short = query.shape[-1] - value.shape[-1]
    value = F.pad(value, (0, short)) if short else value
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(value.dtype)
    grouped = key.shape[1] != query.shape[1]
    made = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
    return made[..., : made.shape[-1] - short] if short else made


def _without_dropout(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments of `F.scaled_dot_product_attention`, whose kernel draws what it drops where it needs it."""
    if len(args) > 4:
        return (*args[:4], 0.0, *args[5:]), kwargs
    return args, {**kwargs, "dropout_p": 0.0}
