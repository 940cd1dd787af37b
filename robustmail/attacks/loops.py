"""The inner loops of torchattacks' APGD, APGD-T and FAB-T, with the same outcomes in less time; `square.py` has Square.

APGD leaves an image that is broken for good; FAB projects without sorting; targets are attacked side by side. An
image's outcome does not depend on the images beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.square import square_l2, square_linf
from robustmail.attacks.steps import per_image, sums
from robustmail.attacks.view import rows_in_pass

__all__ = ["project_linf", "use_fast_loops"]

ENOUGH = 5  # misclassified iterates after which APGD leaves an image: the last of them lies deeper than the first
NEWTON = 30  # most iterations of a projection; it ends when no pixel meets its bound any more


def use_fast_loops(attack: Any) -> Any:
    """Let an attack object of torchattacks run the loop for its settings, if one is here; returns the same object.

    torchattacks' APGD-T has two faults which ours does not have: its l2 steps have the first image's length for all
    images, and it keeps a graph of the clean images alive.
    """
    import torchattacks

    is_linf = getattr(attack, "norm", None) == "Linf"
    if isinstance(attack, torchattacks.APGDT) and attack.eot_iter == 1:
        attack.attack_single_run = lambda x, y, targets: _apgd_targeted(attack, x, y, targets)
        attack.perturb = lambda x, y, **_: (None, _all_targets(attack, x, y))
    elif isinstance(attack, torchattacks.APGD) and attack.eot_iter == 1:
        loss = nn.CrossEntropyLoss(reduction="none") if attack.loss == "ce" else attack.dlr_loss
        attack.attack_single_run = lambda x, y: _apgd(
            attack, x, y, _apgd_start(attack, x), lambda logits, rows: loss(logits, y[rows])
        )
    elif isinstance(attack, torchattacks.FAB) and is_linf and attack.n_restarts == 1 and attack.multi_targeted:
        attack.attack_single_run = lambda x, y, targets: _fab_targeted(attack, x, y, targets)
        attack.perturb = lambda x, y: _all_targets(attack, x, y)
    elif isinstance(attack, torchattacks.Square):
        loop = square_linf if is_linf else square_l2
        attack.attack_single_run = lambda x, y: loop(attack, x, y)
    return attack


@torch.no_grad()
def _all_targets(attack: Any, x: Tensor, y: Tensor) -> Tensor:
    """The images after one attack towards each target, the likeliest first, [B, C, H, W]; others stay as they are.

    An image that a target breaks is not attacked further. The first target has most of the work; the others are
    attacked side by side, as many as fill a pass of the model. Of those that break an image the first counts, so with
    noise of its own an image ends as after one target at a time. x: [B, C, H, W]. y: [B].
    """
    torch.manual_seed(attack.seed)
    logits = attack.get_logits(x)
    found, order, stands = x.clone(), logits.sort(dim=1, descending=True)[1], logits.argmax(1) == y
    ranks = [rank for rank in range(1, attack.n_target_classes + 1) for _ in range(attack.n_restarts)]
    n = 1
    while ranks and stands.any():
        now, ranks = ranks[:n], ranks[n:]
        rows = stands.nonzero().flatten()
        images, is_broken = attack.attack_single_run(x[rows], y[rows], order[rows][:, now])
        found[rows[is_broken]], stands[rows[is_broken]] = images[is_broken], False
        n = max(rows_in_pass(attack, len(x)) // max(int(stands.sum()), 1), 1)
    return found


def _side_by_side(x: Tensor, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(images, labels, target) of one row for each image and target: all images with the first target come first.

    targets: [B, T].
    """
    n = targets.shape[1]
    return x.repeat(n, 1, 1, 1), y.repeat(n), targets.T.flatten()


def _first_that_breaks(images: Tensor, is_broken: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(the images by the first of n targets that breaks them [B, C, H, W], whether there is one [B])."""
    is_broken = is_broken.view(n, -1)
    first, image = is_broken.to(torch.uint8).argmax(0), torch.arange(is_broken.shape[1], device=images.device)
    return images.view(n, -1, *images.shape[1:])[first, image], is_broken.any(0)


Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [M, classes], their M rows in the batch) -> loss of each, [M]"""


def _apgd_targeted(attack: Any, x: Tensor, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(the last misclassified iterates [B, C, H, W], whether there is one [B]); targets: classes to go to, [B, T]."""
    n, dlr = targets.shape[1], attack.dlr_loss_targeted
    start = torch.cat([_apgd_start(attack, x) for _ in range(n)])
    x, y, target = _side_by_side(x, y, targets)
    _, stands, _, found = _apgd(attack, x, y, start, lambda logits, rows: dlr(logits, y[rows], target[rows]))
    return _first_that_breaks(found, ~stands, n)


def _apgd(attack: Any, x: Tensor, y: Tensor, start: Tensor, loss: Loss) -> tuple[None, Tensor, None, Tensor]:
    """(None, whether each image stands, None, its last misclassified iterate), as APGD.attack_single_run returns them.

    x: [B, C, H, W], all classified correctly. y: [B]. start: the first iterates, [B, C, H, W].
    """
    steps = attack.steps
    low, high = (x - attack.eps).clamp(min=0), (x + attack.eps).clamp(max=1)
    found, stands = start, torch.ones_like(y, dtype=torch.bool)
    rows = torch.arange(len(x), device=x.device)  # of the images that are still attacked
    iterate = found.clone()
    best_loss, gradient, wrong = _loss_and_gradient(attack, iterate, y, rows, loss)
    stands &= ~wrong
    previous, best, best_gradient = iterate, iterate, gradient
    length = torch.full((len(x), 1, 1, 1), 2 * attack.eps, device=x.device, dtype=x.dtype)
    history = torch.zeros(steps, len(x), device=x.device)
    n_wrong, last_best, was_halved = torch.zeros_like(y), best_loss, torch.ones_like(stands)
    period, since = max(int(0.22 * steps), 1), 0
    for i in range(steps):
        moved = _apgd_move(
            attack, x[rows], (low[rows], high[rows]), iterate, previous, gradient, length, 0.75 if i else 1.0
        )
        previous, iterate = iterate, moved
        losses, gradient, wrong = _loss_and_gradient(attack, iterate, y, rows, loss)
        n_wrong = n_wrong + wrong
        newly = (wrong & (n_wrong <= ENOUGH)).nonzero().flatten()
        found[rows[newly]], stands[rows[newly]] = iterate[newly], False
        history[i] = losses
        better = losses > best_loss
        best = torch.where(per_image(better), iterate, best)
        best_gradient = torch.where(per_image(better), gradient, best_gradient)
        best_loss = torch.where(better, losses, best_loss)
        since += 1
        if since == period:
            rises = (history[torch.arange(i - period + 1, i + 1)] > history[torch.arange(i - period, i)]).sum(0)
            halve = (rises <= period * attack.thr_decr) | (~was_halved & (last_best >= best_loss))
            was_halved, last_best = halve, best_loss
            length = torch.where(per_image(halve), length / 2, length)
            iterate, gradient = (
                torch.where(per_image(halve), there, here)
                for there, here in ((best, iterate), (best_gradient, gradient))
            )
            since, period = 0, max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        go_on = n_wrong < ENOUGH
        if int(go_on.sum()) <= 0.8 * len(rows):
            state = (rows, iterate, previous, gradient, best, best_gradient, best_loss, length, n_wrong, last_best)
            rows, iterate, previous, gradient, best, best_gradient, best_loss, length, n_wrong, last_best = (
                part[go_on] for part in state
            )
            was_halved, history = was_halved[go_on], history[:, go_on]
            if not len(rows):
                break
    return None, stands, None, found


def _loss_and_gradient(attack: Any, x: Tensor, y: Tensor, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [M], its gradient [M, C, H, W], whether misclassified [M])."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = attack.get_logits(x)
        losses = loss(logits, rows)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), gradient, logits.detach().argmax(1) != y[rows]


def _apgd_start(attack: Any, x: Tensor) -> Tensor:
    """A random image on the surface of each ball, [B, C, H, W]."""
    if attack.norm == "Linf":
        noise: Tensor = 2 * torch.rand(x.shape).to(x.device) - 1
        noise = attack.eps * noise / per_image(noise.flatten(1).abs().amax(1))
    else:
        noise = torch.randn(x.shape).to(x.device)
        noise = attack.eps * noise / _l2(noise)
    start: Tensor = (x + noise).clamp(0, 1)
    return start


def _apgd_move(
    attack: Any, x: Tensor, bounds: tuple[Tensor, Tensor], iterate: Tensor, previous: Tensor, gradient: Tensor,
    length: Tensor, share: float,
) -> Tensor:  # fmt: skip
    """The next iterate: a projected step, of which `share` is taken, and momentum for the rest."""
    momentum = (iterate - previous) * (1 - share)
    if attack.norm == "Linf":
        step = torch.clamp(iterate + length * gradient.sign(), *bounds)
        return torch.clamp(iterate + (step - iterate) * share + momentum, *bounds)
    step = _into_l2_ball(attack.eps, x, iterate + length * gradient / _l2(gradient), 0.0)
    return _into_l2_ball(attack.eps, x, iterate + (step - iterate) * share + momentum, 1e-12)


def _into_l2_ball(eps: float, x: Tensor, moved: Tensor, more: float) -> Tensor:
    delta = moved - x
    length = per_image(sums(delta.square()).sqrt())
    return (x + delta / (length + 1e-12) * (length + more).clamp(max=eps)).clamp(0, 1)


def _l2(images: Tensor) -> Tensor:
    return per_image(sums(images.square()).sqrt()) + 1e-12


def _fab_targeted(attack: Any, x: Tensor, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(the nearest images found that are misclassified [B, C, H, W], whether in the ball [B]).

    Each iteration goes to the plane on which the logits of class y and of the target are equal to first order.
    x: [B, C, H, W], all classified correctly. y: [B]. targets: [B, T].
    """
    x, y, target = _side_by_side(x, y, targets)
    found, nearest, iterate = x.clone(), torch.full((len(x),), 1e10, device=x.device), x.clone()
    clean, row = x.flatten(1), torch.arange(len(x), device=x.device)
    for _ in range(attack.steps):
        image = iterate.detach().requires_grad_()
        with torch.enable_grad():
            logits = attack.get_logits(image)
            difference = logits[row, target] - logits[row, y]
            (gradient,) = torch.autograd.grad(difference.sum(), image)
        w, difference = gradient.flatten(1), difference.detach()
        from_clean = difference + sums(w * (clean - iterate.flatten(1)))
        there, here = project_linf(iterate.flatten(1), w, difference), project_linf(clean, w, from_clean)
        long, short = (d.abs().amax(1).clamp(min=1e-8) for d in (there, here))
        share = per_image((long / (long + short)).clamp(max=attack.alpha_max))
        from_iterate, back = iterate + attack.eta * there.view_as(x), x + attack.eta * here.view_as(x)
        iterate = (from_iterate * (1 - share) + back * share).clamp(0, 1)
        with torch.no_grad():
            is_wrong = attack.get_logits(iterate).argmax(1) != y
        distance = (iterate - x).flatten(1).abs().amax(1)
        better = is_wrong & (distance < nearest)
        found, nearest = torch.where(per_image(better), iterate, found), torch.where(better, distance, nearest)
        iterate = torch.where(per_image(is_wrong), x + (iterate - x) * attack.beta, iterate)
    return _first_that_breaks(found, nearest <= attack.eps, targets.shape[1])


def project_linf(x: Tensor, w: Tensor, value: Tensor) -> Tensor:
    """The smallest d in l-inf with w . d = -value and x + d in [0, 1], or the d that comes nearest to it.

    d_i = -s sign(w_i) min(t, room_i), s the sign of `value`; Newton's method finds t, the root of an increasing,
    concave, piecewise linear function, from below.
    x: [B, D] in [0, 1]. w: [B, D]. value: [B]. Returns d, [B, D].
    """
    direction = -w.sign() * torch.where(value >= 0, 1.0, -1.0)[:, None]
    room = torch.where(direction > 0, 1 - x, x)
    weight, goal = w.abs(), value.abs()
    reach = weight * room
    length = goal / sums(weight).clamp(min=1e-30)
    for _ in range(NEWTON):
        is_free = room > length[:, None]
        rest = goal - sums(reach.masked_fill(is_free, 0))
        slope = sums(weight.masked_fill(~is_free, 0))
        longer = torch.where(slope > 0, rest / slope, math.inf).maximum(length)
        if torch.equal(longer, length):
            break
        length = longer
    return direction * torch.minimum(room, length[:, None])
